"""The progress of stages: a bar a stage on a terminal, a line every few seconds elsewhere."""

import logging
import threading
import time
from collections.abc import Iterable
from types import TracebackType
from typing import Any

from rich.console import RenderableType
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

from tasks.console import console, roughly
from tasks.stages.estimate import Estimate

SECONDS_BETWEEN_LINES = 5.0


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
        self.live = console.is_terminal and not console.is_dumb_terminal  # which moves no cursor
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
