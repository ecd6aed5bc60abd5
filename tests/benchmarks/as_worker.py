"""A benchmark in the surroundings of a worker process of ours."""

import os
import sys

from tasks.cluster import ENVIRONMENT


def as_worker() -> None:
    """Start this process anew unless it has the environment of Ray's workers, see tasks/cluster.py.

    Some of it counts from a process's first allocation on. For the first line of a main function.
    """
    wanted = {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    if wanted:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **wanted})
