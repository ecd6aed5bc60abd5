"""Ray: join a cluster, or start one on this machine; and what a worker process finds there."""

import contextlib
import ctypes
import json
import logging
import os
import socket
import tempfile
from collections.abc import Iterator, Mapping

import torch

from pipeline.config import ClusterConfig
from pipeline.errors import ClusterError

ENVIRONMENT = {
    # libgomp's threads spin at barriers: with more of them than cores a step takes 20 times as long
    "OMP_WAIT_POLICY": "PASSIVE",
    # glibc gives the memory of a network's large tensors back after each call, and the next call
    # faults it in anew, page by page, which takes up to a third of its time: keep it (sizes up to
    # glibc's own most, and however much is free)
    "MALLOC_MMAP_THRESHOLD_": str(32 << 20),
    "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    # Ray Train's barriers would wait for ever
    "RAY_TRAIN_COLLECTIVE_TIMEOUT_S": "3600",
}
"""Of the worker processes, where it does not say otherwise already."""
MOST_ASKED, LONGEST_LOOK = 16, 60.0
"""Nodes that are asked whether they see a folder, and the seconds that they are given."""


def keep_memory() -> None:
    """Let this process handle its memory as ENVIRONMENT makes its workers do, where it is glibc."""
    mmap_threshold, trim_threshold, most = -3, -1, 2**31 - 1
    with contextlib.suppress(AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        mallopt(mmap_threshold, int(ENVIRONMENT["MALLOC_MMAP_THRESHOLD_"]))
        mallopt(trim_threshold, most)


def default_address(config: ClusterConfig) -> str | None:
    """The address of the cluster to join; None to start a local one."""
    return config.address or os.environ.get("RAY_ADDRESS") or None


def job_metadata() -> dict[str, str] | None:
    """What was told of the job of a cluster that this process is of; None if it is of none."""
    told = os.environ.get("RAY_JOB_CONFIG_JSON_ENV_VAR")
    return None if told is None else dict(json.loads(told).get("metadata") or {})


@contextlib.contextmanager
def connect(
    config: ClusterConfig, num_cpus: int | None = None, num_gpus: float | None = None
) -> Iterator[str]:
    """Ray for the time of a command; yields where its logs are.

    A local Ray has a CPU more than the training workers take, so that small tasks (the judge of the
    samples) run beside them. Its processes end with this one, however it ends, because the kernel
    kills the children of the thread that started them; so this belongs on the main thread.

    Args:
        num_cpus: the CPUs that the command needs at once; by default those of training.
        num_gpus: likewise.

    Raises:
        ClusterError: the cluster cannot be joined, or lacks what is asked for.
    """
    if num_cpus is None:
        num_cpus = config.min_workers * config.cpus_per_worker
    if num_gpus is None:
        num_gpus = config.min_workers * config.gpus_per_worker
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import ray

    address = default_address(config)
    try:
        if address is None:
            context = ray.init(
                address="local",
                num_cpus=max(num_cores(), num_cpus) + 1,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        else:
            _check_reachable(address)  # Ray itself would try for more than a minute
            context = ray.init(
                address=address,
                log_to_driver=False,
                logging_level=logging.ERROR,
                runtime_env={"env_vars": ENVIRONMENT},
            )
    except (ConnectionError, ValueError, RuntimeError, OSError) as error:
        where = "a local Ray" if address is None else f"the Ray cluster at {address}"
        reason = str(error).splitlines()[0]
        remedy = "check cluster.address, RAY_ADDRESS and the head"
        if reason.startswith("Version mismatch"):
            reason, remedy = " ".join(str(error).split()), "install the same here and there"
        raise ClusterError(
            f"cannot {'start' if address is None else 'join'} {where}: {reason}; {remedy}"
        ) from error
    try:
        there = ray.cluster_resources()
        for kind, needed in (("CPU", num_cpus), ("GPU", num_gpus)):
            if needed > there.get(kind, 0):
                raise ClusterError(
                    f"{needed:g} {kind}s are needed at once, but Ray has {there.get(kind, 0):g}: "
                    f"lower cluster.workers or cluster.{kind.lower()}s_per_worker "
                    "(for `ddpm serve`, --replicas), or join a larger cluster"
                )
        yield os.path.join(str(context.address_info["session_dir"]), "logs")
    finally:
        ray.shutdown()


def check_shared(places: Mapping[str, tuple[str, str]]) -> None:
    """Raise ClusterError where another node does not see a folder of this machine that it needs.

    Args:
        places: the folder and what helps, by what the user has said, such as `storage=runs`.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    here = ray.get_runtime_context().get_node_id()
    others = [node for node in ray.nodes() if node["Alive"] and node["NodeID"] != here]
    if not places or not others:
        return
    with contextlib.ExitStack() as stack:
        marks = {}
        for place, (folder, _) in places.items():
            mark = stack.enter_context(tempfile.NamedTemporaryFile(dir=folder, prefix=".seen-"))
            marks[place] = mark.name
        look = ray.remote(num_cpus=0, max_retries=0)(_not_there)
        looks = {}
        for node in others[:MOST_ASKED]:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            looks[look.options(scheduling_strategy=there).remote(marks)] = node
        done, _ = ray.wait(list(looks), num_returns=len(looks), timeout=LONGEST_LOOK)
        for result in done:
            with contextlib.suppress(ray.exceptions.RayError):  # a node that was lost just now
                if missing := ray.get(result):
                    raise ClusterError(
                        f"{missing[0]} is on this machine, and the cluster's node "
                        f"{looks[result]['NodeManagerAddress']} does not see it: "
                        f"{places[missing[0]][1]}"
                    )


def _not_there(marks: dict[str, str]) -> list[str]:
    return [place for place, mark in marks.items() if not os.path.exists(mark)]


def num_cores() -> int:
    """The cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _check_reachable(address: str) -> None:
    """Raise ConnectionError unless something listens at HOST:PORT."""
    if address.startswith("ray://"):
        raise ConnectionError("Ray Client is not supported; use HOST:PORT or `ddpm submit`")
    host, colon, port = address.rpartition(":")
    if colon and port.isdigit():
        try:
            socket.create_connection((host, int(port)), timeout=10).close()
        except OSError as error:
            raise ConnectionError(f"nothing answers there ({error.strerror or error})") from error


def metrics_urls() -> list[str]:
    """Where Ray's agent on each node serves its metrics to Prometheus."""
    import ray

    nodes = [node for node in ray.nodes() if node["Alive"]]
    return [f"http://{n['NodeManagerAddress']}:{n['MetricsExportPort']}/metrics" for n in nodes]


def worker_needs(config: ClusterConfig) -> str:
    """`needs 2 workers of 1 CPU (cluster.workers, ...)`"""
    workers, cpus, gpus = config.min_workers, config.cpus_per_worker, config.gpus_per_worker
    return (
        f"needs {workers} worker{'s' * (workers > 1)} of {cpus} CPU{'s' * (cpus > 1)}"
        f"{' and a GPU' * gpus} "
        "(cluster.workers, cluster.cpus_per_worker, cluster.gpus_per_worker)"
    )


def check_room(config: ClusterConfig) -> None:
    """Raise ClusterError unless the nodes there have room for the fewest training workers."""
    import ray

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    needs = {"CPU": config.cpus_per_worker, "GPU": config.gpus_per_worker}
    room = sum(
        int(min(node.get(kind, 0) // needed for kind, needed in needs.items() if needed))
        for node in nodes
    )
    if room < config.min_workers:
        there = "; ".join(f"{n.get('CPU', 0):g} CPUs, {n.get('GPU', 0):g} GPUs" for n in nodes)
        raise ClusterError(
            f"training {worker_needs(config)}, and Ray has room for {room} on its nodes ({there}): "
            "ask for less, or join a larger cluster"
        )


def num_workers(config: ClusterConfig) -> int | tuple[int, int]:
    """How many training workers, as Ray Train takes it; a local Ray keeps its spare CPU."""
    if not isinstance(config.workers, list):
        return config.workers
    least, most = config.workers
    if default_address(config) is None:
        most = max(least, min(most, num_cores() // config.cpus_per_worker))
    return least, most


def gpus_beside_training(config: ClusterConfig) -> int:
    """GPUs of a task that runs beside training: a worker's share if the workers leave so many.

    One that asked for a GPU that training holds would begin when training has ended.
    """
    import ray

    workers = num_workers(config)
    most = workers if isinstance(workers, int) else workers[1]
    left = ray.cluster_resources().get("GPU", 0) - most * config.gpus_per_worker
    return config.gpus_per_worker if left >= config.gpus_per_worker else 0


def worker_device() -> torch.device:
    """The GPU that Ray gave this task or actor, else the CPU."""
    import ray

    has_one = ray.is_initialized() and ray.get_gpu_ids()
    return torch.device("cuda", 0) if has_one else torch.device("cpu")


def gpus_of_this_node() -> int:
    """The GPUs that Ray knows of where this task or actor runs, whether it has been given any."""
    import ray

    here = ray.get_runtime_context().get_node_id()
    (node,) = [node for node in ray.nodes() if node["NodeID"] == here]
    return int(node["Resources"].get("GPU", 0))


def check_port_is_free(host: str, port: int) -> None:
    """Raise ClusterError unless a server can listen there."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            raise ClusterError(
                f"cannot listen on {host}:{port} ({error.strerror}): choose another port with "
                "--port, or end the process that holds it"
            ) from error
        except OverflowError as error:
            raise ClusterError(f"--port {port} must be from 0 to 65535") from error
