"""What some tests need that not every machine has: they are skipped where it is missing.

Each skip says what is missing and how to get it; at the end of a run they are listed once more, by
reason. In CI (CI=true) a test fails instead for lack of what is required there.
"""

import os
import sys
from collections import Counter
from collections.abc import Generator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

FASHION_MNIST = Path("/usr/share/datasets/fashion-mnist")
"""Where Debian's package puts it."""
ORACLES = Path(sys.prefix) / "oracles"
"""Packages that cannot be imported beside others: torchmetrics takes torch-fidelity where it is
installed, and fails with it where torchvision is not."""


class Need(NamedTuple):
    what: str
    remedy: str
    in_ci: bool = False
    """Whether CI must have it."""

    @property
    def reason(self) -> str:
        return f"{self.what} is missing: {self.remedy}"

    def met_if(self, there: object) -> pytest.MarkDecorator:
        """A mark: skipped unless it is there."""
        return pytest.mark.skipif(not there, reason=self.reason)

    def skip(self) -> None:
        pytest.skip(self.reason)


CHROMIUM = Need("Chromium, which shows the page", "sudo apt-get install chromium", True)
POSTGRESQL = Need("PostgreSQL, for MLflow's server", "sudo apt-get install postgresql", True)
DATA_SET = Need("Fashion-MNIST", "sudo apt-get install dataset-fashion-mnist", True)
FIDELITY = Need("torch-fidelity", f"pip install --no-deps --target {ORACLES} torch-fidelity==0.4.0")
KUBECTL = Need("kubectl", "install Kubernetes' command-line tool, as kubernetes.io says")
SCHEMAS = Need(
    "the published schemas of compose and KubeRay", "set DDPM_SCHEMAS to a folder that has them"
)
MACHINES = Need(
    "a machine that can be divided (tests/machines.py)", "run the tests as root on Linux"
)
CLEAR_REFS = Need("/proc/self/clear_refs", "run the tests on Linux, which measures memory so")
COMPILER = Need("a C++ compiler, for a device apart", "sudo apt-get install g++", True)
CPU_INFO = Need("/proc/cpuinfo", "run the tests on Linux, which tells what a CPU has")
NO_GPU = Need("a device that counts copies", "run the tests without a GPU, too")
NEEDS = (
    COMPILER,
    CPU_INFO,
    NO_GPU,
    CHROMIUM,
    POSTGRESQL,
    DATA_SET,
    FIDELITY,
    KUBECTL,
    SCHEMAS,
    MACHINES,
    CLEAR_REFS,
)


def extra(package: str, name: str) -> str:
    """The reason of a skip for lack of a package that an extra of this project brings."""
    return Need(package, f"pip install -e '.[{name}]' in this repository").reason


def package(name: str, of: str) -> Any:
    """A module, or a skip that says which extra of this project brings it."""
    return pytest.importorskip(name, reason=extra(name, of))


# --- hooks of pytest, which tests/conftest.py has ----------------------------------------------


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport() -> Generator[None, pytest.TestReport, pytest.TestReport]:
    return _required((yield))


@pytest.hookimpl(wrapper=True)
def pytest_make_collect_report() -> Generator[None, pytest.CollectReport, pytest.CollectReport]:
    return _required((yield))


def _required(report: Any) -> Any:
    """The report; in CI a failure where a test was skipped for lack of what CI must have."""
    if report.skipped and os.environ.get("CI") == "true":
        reason = _reason(report)
        if reason in [need.reason for need in NEEDS if need.in_ci]:
            report.outcome, report.longrepr = "failed", f"{reason} (CI must have it)"
    return report


def _reason(report: Any) -> str:
    """Of a skip; empty for a failure that was expected."""
    if not isinstance(report.longrepr, tuple):
        return ""
    return str(report.longrepr[2]).removeprefix("Skipped: ")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    counts = Counter(map(_reason, terminalreporter.stats.get("skipped", [])))
    if counts.pop("", 0) or counts:
        terminalreporter.section("not tested here")
        for reason, count in sorted(counts.items()):
            terminalreporter.write_line(f"{count:>4} skipped: {reason}")
