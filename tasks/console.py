"""What a person sees: a bar a stage on a terminal, a line every few seconds elsewhere."""

import threading
import time
from types import TracebackType

from rich.console import Console
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

    def start(self, total: int, unit: str, done: int = 0) -> None:
        self._total, self._unit, self._done_before = total, unit, done
        self._started = time.monotonic()
        # a new clock, so that the rate is that of this run's own work
        self._board.bars.reset(self._task, total=total, completed=done, unit=unit, note="")
        if done:
            self.update(done, f"goes on from {done}")

    def update(self, done: int, note: str = "") -> None:
        self._board.bars.update(self._task, completed=done, note=note)
        now = time.monotonic()
        if not self._board.live and now - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = now
            seconds = now - self._started
            rate = (done - self._done_before) / seconds if seconds else 0.0
            left = f", {(self._total - done) / rate:.0f} s left" if self._total and rate else ""
            line = f"{self._stage}: {done}/{self._total} {self._unit}, {rate:,.1f}/s{left}"
            console.print(line + (f", {note}" if note else ""))

    def close(self, outcome: str) -> None:
        self._board.bars.remove_task(self._task)
        console.print(f"{self._stage}: {outcome}")


class Board:
    """Bars of the stages that run, above them the lines of those that are over."""

    def __init__(self) -> None:
        self.live = console.is_terminal
        self.bars = Progress(
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

    def add(self, stage: str) -> StageBar:
        with self._lock:
            return StageBar(self, stage)


def duration(seconds: float) -> str:
    """`12.3 s` or `2 min 05 s`."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    return f"{int(seconds) // 60} min {int(seconds) % 60:02d} s"
