"""A Ray cluster of several nodes on this machine, in a process of its own: `python -m tests.nodes`.

It takes a line at a time: `add CPUS` starts a node and answers with the address of the cluster and
the process id of the node's raylet; `remove I` ends the I-th node (from 0) as if its power failed.
The cluster goes when the input ends. In the process of a test Ray would keep what it has read of
another cluster's tokens.
"""

import sys

from ray.cluster_utils import Cluster


def main() -> None:
    cluster, nodes = Cluster(), []
    try:
        for line in sys.stdin:
            what, number = line.split()
            if what == "add":
                node = cluster.add_node(num_cpus=int(number), include_dashboard=False)
                nodes.append(node)
                (raylet,) = node.all_processes["raylet"]
                print(cluster.address, raylet.process.pid, flush=True)
            else:
                cluster.remove_node(nodes[int(number)], allow_graceful=False)
                print("removed", flush=True)
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
