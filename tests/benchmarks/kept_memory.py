"""What it brings that worker processes keep the memory they free, see tasks/cluster.py.

    python -m tests.benchmarks.kept_memory [--quick]

Each arm is a process of its own, once with the environment of our workers and once without what it
says of malloc, in turn, several times; medians count. The work: a call of the network of
configs/fashion_mnist.yaml with 16 rows, and the training steps of train_step.py, ours and the
peer's at its best setting. As a user meets them, ours keeps its memory and the peer's does not.

The last line is JSON: [{"what", "ours", "peer", "peer_name", "unit", "ratio", "goal"}], ratio above
1 where keeping, or ours, is better.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from tasks.cluster import ENVIRONMENT
from tests.benchmarks.engine import CONFIG, untrained
from tests.benchmarks.train_step import SIZES, diffusers, ours

CALL, STEP, PEER_STEP = "call, 16 rows", "training step", "diffusers' step at its best"
ROUNDS, UNITS = 5, 8
WARM_UP = 3


class Work(NamedTuple):
    """What a process does."""

    what: str
    size: int
    """Of train_step.SIZES."""
    threads: int

    def __str__(self) -> str:
        where = "" if self.what == CALL else f", {SIZES[self.size]}"
        return f"{self.what}{where}, {self.threads} thread{'s' * (self.threads > 1)}"


ALL = [Work(CALL, 0, 1)] + [Work(what, size, 1) for size in (0, 1) for what in (STEP, PEER_STEP)]


class Found(NamedTuple):
    """Of one call or step."""

    seconds: float
    faults: float
    """Pages that the process had to ask the kernel for."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="one round")
    parser.add_argument("--child", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child is not None:
        print(json.dumps(measured(ALL[options.child])))
        return
    print(
        f"torch {torch.__version__}, {os.cpu_count()} cores, "
        f"{platform.processor() or platform.machine()}, {' '.join(platform.libc_ver())}, "
        f"load {os.getloadavg()[0]:.2f}\n\n"
        f"{'':<66}{'ms kept':>9}{'faults':>8}{'ms given back':>15}{'faults':>8}{'ratio':>7}"
    )
    results = []
    medians: dict[tuple[Work, bool], float] = {}
    for number, work in enumerate(ALL):
        found: dict[bool, list[Found]] = {True: [], False: []}
        for _ in range(1 if options.quick else ROUNDS):
            for kept in (True, False):
                found[kept].append(in_process(number, work.threads, kept))
        for kept in (True, False):
            medians[work, kept] = statistics.median(f.seconds for f in found[kept])
        faults = {kept: statistics.median(f.faults for f in found[kept]) for kept in found}
        mine, theirs = medians[work, True], medians[work, False]
        print(
            f"{work!s:<66}{1e3 * mine:>9.1f}{faults[True]:>8.0f}{1e3 * theirs:>15.1f}"
            f"{faults[False]:>8.0f}{theirs / mine:>7.2f}",
            flush=True,
        )
        results.append(result(f"{work}: memory kept", mine, theirs, "given back", None))
    for work in ALL:
        if work.what == STEP:
            peer = work._replace(what=PEER_STEP)
            mine, theirs = medians[work, True], medians[peer, False]
            name = f"{PEER_STEP}, in a process as it starts"
            results.append(result(f"{work}, as our workers start", mine, theirs, name, 1.2))
            print(f"{work}, as our workers start: {theirs / mine:.2f} x {name}")
    print(f"load at the end {os.getloadavg()[0]:.2f}")
    print(json.dumps(results))


def in_process(number: int, threads: int, kept: bool) -> Found:
    environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": str(threads)}
    if not kept:
        for name in list(environment):
            if name.startswith("MALLOC_"):
                del environment[name]
    command = [sys.executable, "-m", __spec__.name, "--child", str(number)]
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout
    return Found(*json.loads(output))


def measured(work: Work) -> Found:
    torch.set_num_threads(work.threads)
    do = unit_of(work)
    for _ in range(WARM_UP):
        do()
    seconds, before = [], resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(UNITS):
        begin = time.perf_counter()
        do()
        seconds.append(time.perf_counter() - begin)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return Found(statistics.median(seconds), faults / UNITS)


def unit_of(work: Work) -> Callable[[], Any]:
    size = SIZES[work.size]
    if work.what == STEP:
        return ours(size, "float32")
    if work.what == PEER_STEP:
        return diffusers(size, "float32", True, torch.channels_last)
    model = untrained(str(CONFIG))
    x, half = torch.zeros(16, *model.spec.image_shape), torch.full((16,), 0.5).double()
    return partial(model.output, x, half, half, torch.zeros(16, dtype=torch.int64))


def result(what: str, ours: float, peer: float, peer_name: str, goal: float | None) -> Any:
    return {
        "what": what,
        "ours": round(1 / ours, 3),
        "peer": round(1 / peer, 3),
        "peer_name": peer_name,
        "unit": "1/s",
        "ratio": round(peer / ours, 3),
        "goal": goal,
    }


if __name__ == "__main__":
    main()
