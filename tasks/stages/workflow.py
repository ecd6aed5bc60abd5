"""Running the stages of a plan: independent ones at the same time, each made by one run alone."""

import contextlib
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from pipeline import storage
from pipeline.errors import StorageError
from pipeline.registry.runs import TrackedRun
from pipeline.storage import Manifest
from tasks.console import duration
from tasks.stages.plan import Plan, PlannedStage
from tasks.stages.progress import Board
from tasks.stages.stage import Outcome, StageContext


@dataclass(frozen=True)
class StageResult:
    """How a stage ended, for the table at the end."""

    name: str
    outcome: str
    seconds: float


def run(plan: Plan, board: Board, open_run: Callable[[Plan], TrackedRun]) -> list[StageResult]:
    """Run what must run.

    Args:
        open_run: opens the MLflow run of a plan; called once at most, when a stage asks for it.

    Raises:
        the first error of a stage; the others are left to end with the process.
    """
    tracked_run = _TrackedOnce(plan, open_run)
    finished: queue.Queue[tuple[str, StageResult | BaseException]] = queue.Queue()
    results = {
        each.name: StageResult(each.name, "cached", 0.0) for each in plan.stages if each.done
    }
    waiting = [planned for planned in plan.stages if not planned.done]
    running = 0
    try:
        while waiting or running:
            ready = [each for each in waiting if results.keys() >= set(each.stage.inputs)]
            for planned in ready:
                waiting.remove(planned)
                running += 1
                # a daemon, so that an interrupted command need not wait for it
                threading.Thread(
                    target=_run_in_thread,
                    args=(plan, planned, board, tracked_run, finished),
                    name=planned.name,
                    daemon=True,
                ).start()
            name, result = _get(finished)
            running -= 1
            if isinstance(result, BaseException):
                raise result
            results[name] = result
    except BaseException as error:
        with contextlib.suppress(StorageError):  # a store that is away must not hide the error
            tracked_run.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    tracked_run.finish("FINISHED")
    return [results[planned.name] for planned in plan.stages]


def _get(finished: queue.Queue[Any]) -> Any:
    while True:  # in slices, so that the main thread hears Ctrl-C
        try:
            return finished.get(timeout=0.2)
        except queue.Empty:
            continue


class _TrackedOnce:
    """The pipeline's MLflow run, opened once, by whichever stage first writes to it."""

    def __init__(self, plan: Plan, open_run: Callable[[Plan], TrackedRun]) -> None:
        self._plan, self._open = plan, open_run
        self._lock = threading.Lock()
        self._run: TrackedRun | None = None

    def __call__(self) -> TrackedRun:
        with self._lock:
            if self._run is None:
                self._run = self._open(self._plan)
            return self._run

    def finish(self, status: str) -> None:
        if self._run is not None:
            self._run.finish(status)


def _run_in_thread(
    plan: Plan,
    planned: PlannedStage,
    board: Board,
    tracked_run: Callable[[], TrackedRun],
    finished: "queue.Queue[tuple[str, StageResult | BaseException]]",
) -> None:
    try:
        finished.put((planned.name, _run_stage(plan, planned, board, tracked_run)))
    except BaseException as error:  # raised again on the main thread
        finished.put((planned.name, error))


def _run_stage(
    plan: Plan, planned: PlannedStage, board: Board, tracked_run: Callable[[], TrackedRun]
) -> StageResult:
    stage, begin = planned.stage, time.monotonic()
    bar = board.add(stage.name)
    outcome, note = "failed", ""

    def say_who(holder: str) -> None:
        bar.update(0, f"waits for {holder}, which is making the same output")

    try:
        with storage.exclusive(storage.join(planned.folder, ".lock"), say_who):
            there = storage.read_manifest(planned.folder)
            if there is not None and not planned.outdated:
                outcome = "made by another run"
            else:
                context = StageContext(
                    config=plan.config,
                    id=planned.id,
                    folder=planned.folder,
                    inputs={name: plan[name].folder for name in stage.inputs},
                    tracking_uri=plan.tracking_uri,
                    progress=bar,
                    tracked_run=tracked_run,
                    beside={
                        each.name: each.folder for each in plan.stages if each.name in stage.beside
                    },
                    external=planned.external,
                )
                made = stage.run(context)
                storage.commit(planned.folder, _manifest(planned, made))
                outcome, note = "done", made.note
    finally:
        seconds = time.monotonic() - begin
        bar.close(f"{outcome} in {duration(seconds)}" + (f", {note}" if note else ""))
    return StageResult(stage.name, outcome, seconds)


def _manifest(planned: PlannedStage, outcome: Outcome) -> Manifest:
    return Manifest(
        format=planned.stage.format,
        stage=planned.name,
        id=planned.id,
        inputs=planned.inputs,
        config=planned.reads,
        files=outcome.files,
        stats=outcome.stats,
        versions={name: version(name) for name in ("torch", "ray", "mlflow", "pyarrow", "numpy")},
    )
