"""What all benchmarks are: programs that say where they run, measure, and end with their figures.

    def main() -> None:
        options = program.parser(__doc__)
        options.add_argument("--rounds", type=int, default=3)
        program.run(options, measure, "torch")

    def measure(options) -> list[Figure]: ...

Each has `--quick`, which takes at most two minutes on two cores. The first line that is printed
names the kind of machine, the last is a JSON list of figures. What goes wrong ends the program with
one sentence and the exit code 1.
"""

import argparse
import json
import os
import platform
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, TypedDict, TypeVar

from pipeline.errors import PipelineError
from tasks.cluster import ENVIRONMENT
from tests.benchmarks.processes import Failed

CONFIGS = Path(__file__).parents[2] / "configs"
KINDS = ("AVX-512 with bf16", "AVX2", "GPU")
"""Of machines, which have a column each in RESULTS.md, as has any other kind that was found."""

Name = TypeVar("Name")


class Figure(TypedDict):
    """What was found out: ours, beside a peer if there is one."""

    what: str
    ours: float
    peer: float | None
    peer_name: str | None
    unit: str
    ratio: float | None
    """Above 1 where ours is better."""
    goal: float | None
    """Of the ratio."""


def figure(
    what: str,
    ours: float,
    peer: float,
    peer_name: str,
    goal: float | None = None,
    unit: str = "images/s",
    less_is_better: bool = False,
) -> Figure:
    ratio = peer / ours if less_is_better else ours / peer
    return {
        "what": what,
        "ours": _rounded(ours),
        "peer": _rounded(peer),
        "peer_name": peer_name,
        "unit": unit,
        "ratio": round(ratio, 3),
        "goal": goal,
    }


def constant(what: str, value: float, unit: str) -> Figure:
    """A figure that is compared with none."""
    return {
        "what": what,
        "ours": _rounded(value),
        "peer": None,
        "peer_name": None,
        "unit": unit,
        "ratio": None,
        "goal": None,
    }


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")


# --- the program --------------------------------------------------------------------------------


def parser(doc: str | None) -> argparse.ArgumentParser:
    """One that has --quick; its description is the first line of the docstring."""
    made = argparse.ArgumentParser(description=(doc or "").splitlines()[0])
    made.add_argument("--quick", action="store_true", help="little work, for two minutes at most")
    return made


def run(
    options: argparse.ArgumentParser,
    measure: Callable[[argparse.Namespace], list[Figure]],
    *packages: str,
) -> None:
    """Measure, in the surroundings of a worker process of ours, see tasks/cluster.py.

    Args:
        packages: whose versions are said; those that are not installed are left out.
    """
    as_worker()
    given = options.parse_args()
    device = getattr(given, "device", "cpu")  # of those that have the option
    where = surroundings(device, *packages)
    print(f"{kind(device)}; {where}, load {os.getloadavg()[0]:.2f}", flush=True)
    try:
        figures = measure(given)
    except (Failed, PipelineError, OSError) as error:
        sys.exit(f"error: {error}")
    print(f"load at the end {os.getloadavg()[0]:.2f}")
    print(json.dumps(figures, ensure_ascii=False))


def as_worker() -> None:
    """Start this process anew unless it has the environment of Ray's workers.

    Some of it counts from a process's first allocation on.
    """
    wanted = {name: value for name, value in ENVIRONMENT.items() if name not in os.environ}
    if wanted:
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **wanted})


# --- the machine --------------------------------------------------------------------------------


def kind(device: str = "cpu") -> str:
    """Of this machine: one of `KINDS`, or another instruction set.

    Of a CPU counts what torch and oneDNN compute with, not what it could do: ATEN_CPU_CAPABILITY
    and ONEDNN_MAX_CPU_ISA limit it.
    """
    import torch

    if device != "cpu":
        return "GPU"
    found = torch.backends.cpu.get_cpu_capability()
    if not found.startswith("AVX512"):
        return found
    if not torch.ops.mkldnn._is_mkldnn_bf16_supported():  # oneDNN may not use AVX-512
        return "AVX2"
    has_bf16: bool = torch.cpu._is_avx512_bf16_supported()  # type: ignore[attr-defined, no-untyped-call]
    return "AVX-512 with bf16" if has_bf16 else "AVX-512"


def surroundings(device: str, *packages: str) -> str:
    import torch

    gpu = [torch.cuda.get_device_name(device)] if device.startswith("cuda") else []
    versions = [f"{name} {there}" for name in packages if (there := _installed(name))]
    return ", ".join([*gpu, cpu(), f"{os.cpu_count()} cores", *versions])


def cpu() -> str:
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return ""


# --- measuring ----------------------------------------------------------------------------------


def in_turn(
    arms: Mapping[Name, Callable[[], Any]], rounds: int, clock: Callable[[], float] | None = None
) -> dict[Name, list[float]]:
    """Seconds of each arm; every arm has one turn in a round."""
    now = clock or time.perf_counter
    seconds: dict[Name, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            begin = now()
            arm()
            seconds[name].append(now() - begin)
    return seconds


def rates_in_turn(arms: Mapping[Name, Callable[[], float]], rounds: int) -> dict[Name, list[float]]:
    """What each arm returns, say its rate; every arm has one turn in a round."""
    found: dict[Name, list[float]] = {name: [] for name in arms}
    for _ in range(rounds):
        for name, arm in arms.items():
            found[name].append(arm())
    return found


def medians(of: Mapping[Name, list[float]]) -> dict[Name, float]:
    return {name: statistics.median(values) for name, values in of.items()}


def spread(values: list[float], digits: int = 1) -> str:
    """Median (least to most)."""
    middle = statistics.median(values)
    return f"{middle:,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"
