"""What a person sees while a command runs.

A bar a stage on a terminal, a line every few seconds elsewhere; an error as one sentence; and the
log file, where everything goes that frameworks have to say.
"""

import logging
import os
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    ProgressColumn,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from pipeline import storage
from pipeline.errors import PipelineError, UserError
from tasks.estimate import Estimate, roughly

SECONDS_BETWEEN_LINES = 5.0

console = Console(highlight=False, markup=False, soft_wrap=True)


class _RateColumn(ProgressColumn):
    def render(self, task: Task) -> Text:
        speed = task.finished_speed or task.speed
        return Text(f"{speed:,.1f}/s" if speed else "", style="cyan")


class StageBar:
    """The progress of one stage; made by Board.add."""

    def __init__(self, board: "Board", stage: str) -> None:
        self._board = board
        self._stage = stage
        self._task = board.bars.add_task(stage, total=None, note="", unit="")
        self._total: int | None = None
        self._unit = ""
        self._started = self._last_line = time.monotonic()
        self._done_before = 0
        board.estimate.begin(stage)

    def start(self, total: int, unit: str, done: int = 0) -> None:
        self._total, self._unit, self._done_before = total, unit, done
        self._started = time.monotonic()
        self._board.estimate.phase(self._stage, total, done)
        # a new clock, so that the rate is that of this run's own work
        self._board.bars.reset(self._task, total=total, completed=done, unit=unit, note="")
        if done:
            self.update(done, f"goes on from {done}")

    def update(self, done: int, note: str = "") -> None:
        self._board.bars.update(self._task, completed=done, note=note)
        self._board.estimate.progress(self._stage, self._total, done)
        now = time.monotonic()
        if not self._board.live and now - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = now
            seconds = now - self._started
            rate = (done - self._done_before) / seconds if seconds else 0.0
            left = f", {roughly((self._total - done) / rate)} left" if self._total and rate else ""
            in_all = self._board.left_in_all()
            line = f"{self._stage}: {done}/{self._total} {self._unit}, {rate:,.1f}/s{left}"
            console.print(line + "".join(f", {more}" for more in (in_all, note) if more))

    def say(self, sentence: str) -> None:
        console.print(f"{self._stage}: {sentence}")
        logging.getLogger("ddpm").info("%s: %s", self._stage, sentence)

    def close(self, outcome: str) -> None:
        self._board.estimate.end(self._stage)
        self._board.bars.remove_task(self._task)
        console.print(f"{self._stage}: {outcome}")


class _Bars(Progress):
    """Bars with a line below them."""

    def __init__(self, board: "Board", *columns: ProgressColumn, **options: Any) -> None:
        self._board = board
        super().__init__(*columns, **options)

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if in_all := self._board.left_in_all():
            yield Text(f"  {in_all}", style="dim")


class Board:
    """Bars of the stages that run, above them the lines of those that are over.

    Args:
        estimate: of the whole run, which the bars keep up to date.
    """

    def __init__(self, estimate: Estimate | None = None) -> None:
        self.live = console.is_terminal
        self.estimate = estimate or Estimate([], None)
        self.bars = _Bars(
            self,
            SpinnerColumn(),
            TextColumn("{task.description:<10}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TextColumn("{task.fields[unit]}"),
            _RateColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=console,
            disable=not self.live,
            speed_estimate_period=20,
        )
        self._lock = threading.Lock()

    def __enter__(self) -> "Board":
        self.bars.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.bars.stop()

    def left_in_all(self) -> str:
        """`about 2 min left in all`; empty if there is no more to say."""
        left = self.estimate.left()
        return f"about {roughly(left)} left in all" if left else ""

    def add(self, stage: str) -> StageBar:
        with self._lock:
            return StageBar(self, stage)


def duration(seconds: float) -> str:
    """`12.3 s` or `2 min 05 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"


# --- the log file, places, errors -----------------------------------------------------------------

_log_files: list[Path] = []
"""The file that this command logs to, if it does."""


def log_to_file(storage_uri: str | None) -> Path:
    """Send what frameworks log and warn of to a file, so that the terminal stays readable."""
    folder = storage.local_path(storage_uri) if storage_uri else None
    if folder is None:  # of this user: others share the machine
        folder = Path(tempfile.gettempdir()) / f"ray-ddpm-{os.getuid()}"
    folder = folder / "logs"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"ddpm-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}.log"
    handler = logging.FileHandler(path, delay=False)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(logging.INFO)
    logging.captureWarnings(True)
    _log_files.append(path)
    return path


def command(name: str) -> str:
    """How to call a program of this environment from the shell that called us."""
    beside = Path(sys.executable).parent / name
    on_path = shutil.which(name)
    if on_path is not None and Path(on_path).resolve() == beside.resolve():
        return name
    return shown(str(beside))


def shown(path: str) -> str:
    """A path relative to the working folder where that is shorter."""
    if storage.local_path(path) is None:
        return path
    relative = os.path.relpath(path)
    return path if relative.startswith("..") else relative


def shown_uri(uri: str) -> str:
    prefix = "sqlite:///"
    return prefix + shown(uri.removeprefix(prefix)) if uri.startswith(prefix) else uri


def _root_cause(error: BaseException) -> BaseException:
    """The error that a Ray task or a training worker raised, out of Ray's wrapping."""
    failures = getattr(error, "worker_failures", None) or {}
    inner = [
        getattr(error, "cause", None),
        getattr(error, "controller_failure", None),
        getattr(error, "_base_exc", None),
        *(failures.values() if isinstance(failures, dict) else ()),
    ]
    causes = [cause for cause in inner if isinstance(cause, BaseException)]
    return _root_cause(causes[0]) if causes else error


def show_error(error: BaseException) -> int:
    """Print one sentence about an error; returns the exit code."""
    cause = _root_cause(error)
    if _log_files:
        logging.getLogger("ddpm").error("the command failed", exc_info=error)
    if isinstance(cause, PipelineError):
        print(f"error: {cause}", file=sys.stderr)
        return 2 if isinstance(cause, UserError) else 1
    first_line = (str(cause).strip().splitlines() or [""])[0]
    print(f"error: {type(cause).__name__}: {first_line}", file=sys.stderr)
    if _log_files:
        print(f"the whole story is in {shown(str(_log_files[-1]))}", file=sys.stderr)
    return 1
