"""Shared surroundings of the tests: one thread, a tiny config, one trained pipeline on real Ray."""

import contextlib
import gc
import io
import os
import random
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# before torch is imported: libgomp's threads must not spin beside those of the pipelines under test
os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["RAY_TRAIN_HEALTH_CHECK_INTERVAL_S"] = "0.2"
os.environ["MLFLOW_CONFIGURE_LOGGING"] = "false"
os.environ["COLUMNS"] = "200"  # of the terminal: no table is cut
os.environ.pop("RAY_ADDRESS", None)
os.environ.pop("MLFLOW_TRACKING_URI", None)

import psutil
import pytest
import torch
from xdist.scheduler import LoadScopeScheduling

from pipeline import storage
from tests.needs import (  # noqa: F401  (hooks of pytest)
    pytest_make_collect_report,
    pytest_runtest_makereport,
    pytest_terminal_summary,
)

torch.set_num_threads(1)
# which a shell lets a suite in its background ignore, and all that it starts: Ctrl-C is tested, too
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
KEPT = ("PATH", "LANG", "ONEDNN_MAX_CPU_ISA", "ATEN_CPU_CAPABILITY", "MKL_ENABLE_INSTRUCTIONS")
"""What another machine has of this environment: it finds programs, and computes the same bits."""
FAULTS = {"PYTHONPATH": f"{ROOT}/tests/faults:{ROOT}"}
"""See tests/faults/sitecustomize.py."""
TINY = [
    "network.base_channels=8",
    "training.steps=60",
    "training.batch_size=32",
    "training.warmup_steps=5",
    "training.log_every=5",
    "training.checkpoint_every=20",
    "evaluation.samples=20",
    "evaluation.elbo_images=4",
    "evaluation.ode_images=2",
    "evaluation.classifier_epochs=2",
    "evaluation.during_training=10",
    "sampling.steps=4",
]
"""What makes configs/digits.yaml small."""


def _seconds_of_a_hang() -> float:
    """What nothing takes that still goes on: 300 s, or more on a slower or a busier machine.

    Measured once, when the suite starts, by the start of a process that imports torch.
    """
    begin = time.monotonic()
    subprocess.run([sys.executable, "-c", "import torch"], check=True)
    return 300 * max(1.0, (time.monotonic() - begin) / 2.0)


# its processes, of which pytest -n makes some, find it in their environment
HANG = float(os.environ.setdefault("DDPM_TESTS_HANG", str(_seconds_of_a_hang())))
"""Seconds after which a wait has hung: a bound of no wait that goes well."""


_started: list["subprocess.Popen[str]"] = []
"""The commands of all workplaces."""


@dataclass(frozen=True)
class Workplace:
    """A folder in which the `ddpm` command is used, as a person would."""

    folder: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    """Of its commands, beside that of the tests."""

    def start(self, *arguments: str, **environment: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-m", "tasks", *arguments],
            cwd=self.folder,
            env={**ENVIRONMENT, **self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        _started.append(process)
        return process

    def ddpm(self, *arguments: str, code: int = 0, **environment: str) -> str:
        """Run a command to its end, check its exit code, return what it printed."""
        process = self.start(*arguments, **environment)
        try:
            output, _ = process.communicate(timeout=HANG)
        finally:
            end(process)
        assert process.returncode == code, output
        return output

    def quick(self, *arguments: str, code: int = 0) -> str:
        """The same without a process of its own, for commands that neither start Ray nor log."""
        from tasks.__main__ import execute

        output = io.StringIO()
        with (
            contextlib.chdir(self.folder),
            contextlib.redirect_stdout(output),
            contextlib.redirect_stderr(output),
        ):
            assert execute(list(arguments)) == code, output.getvalue()
        return output.getvalue()

    def run_tiny(self, *overrides: str, verb: str = "run", code: int = 0) -> str:
        return self.ddpm(*tiny_command(verb, *overrides), code=code)

    def manifest(self, stage: str) -> Any:
        """The manifest of the only output of a stage."""
        import json

        (path,) = (self.folder / "runs" / stage).glob("*/manifest.json")
        return json.loads(path.read_text())


def tiny_command(verb: str, *overrides: str, config: str = "digits") -> list[str]:
    """`ddpm VERB configs/digits.yaml` with the small values and others on top."""
    sets = [word for value in [*TINY, *overrides] for word in ("--set", value)]
    return [verb, str(ROOT / "configs" / f"{config}.yaml"), *sets]


def end(process: subprocess.Popen[str]) -> None:
    """End a command that is still running, with all that it started."""
    if process.poll() is None:
        family = psutil.Process(process.pid).children(recursive=True)
        process.kill()
        process.wait()
        end_all(family)
    if process.stdout is not None:
        process.stdout.close()


def end_all(processes: list[psutil.Process]) -> None:
    """End processes; those of a Ray whose driver is gone end by themselves, given a moment."""
    _, left = psutil.wait_procs(processes, timeout=5)
    for process in left:
        with contextlib.suppress(psutil.NoSuchProcess):
            process.kill()
    psutil.wait_procs(left, timeout=HANG)


@contextmanager
def nothing_left_of(test: str) -> Iterator[None]:
    """End what is started meanwhile and left, however it is left: by a variable that it inherits.

    What fixtures of a wider scope have started does not have it: they end it themselves.
    """
    variable, value = "DDPM_TEST", f"{os.getpid()} {test}"
    before = len(_started)
    for environment in (os.environ, ENVIRONMENT):
        environment[variable] = value
    try:
        yield
    finally:
        for command in _started[before:]:
            end(command)
        left = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error):
                # Python's own tracker of semaphores ends with this process, and serves others
                ours = process.environ().get(variable) == value
                if ours and "multiprocessing.resource_tracker" not in " ".join(process.cmdline()):
                    left.append(process)
        end_all(left)
        if left:  # who does not hear of its end would be warned of in the middle of another test
            for popen in [it for it in gc.get_objects() if type(it) is subprocess.Popen]:
                popen.poll()
        for environment in (os.environ, ENVIRONMENT):
            del environment[variable]


def ray_workers(pid: int, title: str) -> list[psutil.Process]:
    """The Ray worker processes below `pid` whose title holds `title`."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        try:
            if title in " ".join(child.cmdline()):
                found.append(child)
        except psutil.Error:
            continue
    return found


def free_port() -> int:
    """One that the kernel gives no connection, and Ray no worker, before it is used."""
    while True:
        port = random.SystemRandom().randrange(20_000, 32_000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("127.0.0.1", port))
            return port


def listens(port: int, address: str = "127.0.0.1") -> bool:
    with socket.socket() as probe:
        probe.settimeout(1)
        return probe.connect_ex((address, port)) == 0


def wait_for(condition: Any, what: str, process: "subprocess.Popen[Any] | None" = None) -> Any:
    """The first true value of `condition()`.

    Fails with `what` was waited for when `process`, without which it cannot come true, has ended;
    or after HANG, which only ends a hang.
    """
    deadline = time.monotonic() + HANG
    while time.monotonic() < deadline:
        ended = process is not None and process.poll() is not None
        if value := condition():
            return value
        if ended:
            assert process is not None
            said = process.stdout.read() if process.stdout is not None else ""
            raise AssertionError(f"{what} did not come: the process ended, and said {said}")
        time.sleep(0.02)
    raise AssertionError(f"waited {HANG:.0f} s in vain for {what}")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A workplace in which the tiny pipeline has run once, undisturbed.

    The processes of `pytest -n 2` share it: the first that asks makes it.
    """
    shared = shared_folder(tmp_path_factory)
    workplace = Workplace(shared / "tiny")
    with storage.exclusive(str(shared / "tiny.lock")):
        if not workplace.folder.exists():
            workplace.folder.mkdir()
            (workplace.folder / "first_run.txt").write_text(workplace.run_tiny())
    assert (workplace.folder / "first_run.txt").exists(), "it failed in another process"
    return workplace


# --- which tests share a process, and in which order ----------------------------------------------

GROUPS = {
    "tests/system/head": "head",
    "tests/system/test_s3": "s3",
    "tests/system/service": "service",
    "tests/system/test_operation": "service",
    "tests/system/test_nodes": "nodes",
}
"""The tests of a group run in one process, one after the other: they share a Ray head, or a service
of which there is to be one at a time. The longest groups first; the rest, a file each, after them.
"""


def group_of(nodeid: str) -> tuple[int, str]:
    """The place of a test's group in the order, and its name."""
    for place, (start, name) in enumerate(GROUPS.items()):
        if nodeid.startswith(start):
            return place, name
    return len(GROUPS), nodeid.split("::")[0]


class InGroups(LoadScopeScheduling):
    """Deals whole groups out to the processes of `pytest -n 2`.

    Not by pytest-xdist's own marks of groups: 3.8 writes them into names of tests that pytest 9.2
    keeps elsewhere, and deals the tests of a group to all processes, without a word.
    """

    def _split_scope(self, nodeid: str) -> str:
        return group_of(nodeid)[1]


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> InGroups:
    return InGroups(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Sort the tests by group; in another order, by DDPM_TESTS_ORDER=NUMBER, to show that it is
    none that they rely on, but for those of tests/system within a file, of which some tell a story.
    """
    if number := os.environ.get("DDPM_TESTS_ORDER"):
        rng = random.Random(number)
        files = {path: rng.random() for path in dict.fromkeys(item.path for item in items)}
        units = {item: rng.random() for item in items if "unit" in item.path.parts}
        items.sort(key=lambda item: (files[item.path], units.get(item, 0.0)))
    items.sort(key=lambda item: group_of(item.nodeid)[0])


def mark_the_only(factory: pytest.TempPathFactory, what: str) -> None:
    """Fail if `what`, of which there is to be one for all processes of `pytest -n 2`, was started
    before: then its tests are no longer dealt out as a group.
    """
    (shared_folder(factory) / f"started-{what}").touch(exist_ok=False)


def shared_folder(factory: pytest.TempPathFactory) -> Path:
    """A folder that the processes of `pytest -n 2` have in common."""
    base = factory.getbasetemp()
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base
