"""What it brings that worker processes keep the memory they free, see tasks/cluster.py.

    python -m tests.benchmarks.kept_memory [--quick]

Each arm is a process of its own, once with the environment of our workers and once without what it
says of malloc, in turn, several times; medians count. The work: a call of the network of
configs/fashion_mnist.yaml with 16 rows, and the training steps of train_step.py, ours and the
peer's at its best setting. As a user meets them, ours keeps its memory and the peer's does not.
"""

import argparse
import resource
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch

from tasks.cluster import ENVIRONMENT
from tests.benchmarks import program
from tests.benchmarks.engine import CONFIG, untrained
from tests.benchmarks.processes import alone
from tests.benchmarks.program import Figure, figure
from tests.benchmarks.train_step import QUICK_SIZES, SIZES, diffusers, ours

CALL, STEP, PEER_STEP = "call, 16 rows", "training step", "diffusers' step at its best"
ROUNDS, UNITS = 5, 8
WARM_UP = 3
QUICK_UNITS = 2


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
    program.run(program.parser(__doc__), measure, "torch", "diffusers")


def measure(options: argparse.Namespace) -> list[Figure]:
    print(f"\n{'':<66}{'ms kept':>9}{'faults':>8}{'ms given back':>15}{'faults':>8}{'ratio':>7}")
    results = []
    medians: dict[tuple[Work, bool], float] = {}
    for work in ALL:
        found: dict[bool, list[Found]] = {True: [], False: []}
        for _ in range(1 if options.quick else ROUNDS):
            for kept in (True, False):
                found[kept].append(in_process(work, kept, options.quick))
        for kept in (True, False):
            medians[work, kept] = statistics.median(f.seconds for f in found[kept])
        faults = {kept: statistics.median(f.faults for f in found[kept]) for kept in found}
        mine, theirs = medians[work, True], medians[work, False]
        print(
            f"{work!s:<66}{1e3 * mine:>9.1f}{faults[True]:>8.0f}{1e3 * theirs:>15.1f}"
            f"{faults[False]:>8.0f}{theirs / mine:>7.2f}",
            flush=True,
        )
        results.append(
            figure(f"{work}: memory kept", 1 / mine, 1 / theirs, "given back", unit="1/s")
        )
    for work in ALL:
        if work.what == STEP:
            mine = medians[work, True]
            theirs = medians[work._replace(what=PEER_STEP), False]
            name, what = f"{PEER_STEP}, in a process as it starts", f"{work}, as our workers start"
            results.append(figure(what, 1 / mine, 1 / theirs, name, 1.2, "1/s"))
            print(f"{what}: {theirs / mine:.2f} x {name}")
    return results


def in_process(work: Work, kept: bool, quick: bool) -> Found:
    environment: dict[str, str | None] = {**ENVIRONMENT, "OMP_NUM_THREADS": str(work.threads)}
    if not kept:
        environment |= {name: None for name in ENVIRONMENT if name.startswith("MALLOC_")}
    return alone(measured, work, quick, environment=environment)


def measured(work: Work, quick: bool) -> Found:
    torch.set_num_threads(work.threads)
    do, units = unit_of(work, quick), QUICK_UNITS if quick else UNITS
    for _ in range(1 if quick else WARM_UP):
        do()
    seconds, before = [], resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(units):
        begin = time.perf_counter()
        do()
        seconds.append(time.perf_counter() - begin)
    faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return Found(statistics.median(seconds), faults / units)


def unit_of(work: Work, quick: bool) -> Callable[[], Any]:
    size = (QUICK_SIZES if quick else SIZES)[work.size]
    if work.what == STEP:
        return ours(size, "float32")
    if work.what == PEER_STEP:
        return diffusers(size, "float32", True, torch.channels_last)
    model = untrained(str(CONFIG))
    x, half = torch.zeros(16, *model.spec.image_shape), torch.full((16,), 0.5).double()
    return partial(model.output, x, half, half, torch.zeros(16, dtype=torch.int64))


if __name__ == "__main__":
    main()
