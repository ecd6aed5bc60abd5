"""The DAG of stages: what is done, what must run and why, and running it.

The id of an output is a hash of its stage, the stage's format, the config sections it reads and the
ids of its inputs. So all ids are known before anything runs, a stage whose manifest stands is not
run again, and a changed value reaches exactly the stages downstream of it.
"""

import contextlib
import functools
import queue
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from pipeline import storage
from pipeline.config import RunConfig
from pipeline.data.pieces import LookInto, look_on_threads
from pipeline.data.preprocess import SHARD_SET_FORMAT
from pipeline.data.sources import Source, scan
from pipeline.errors import StorageError
from pipeline.registry.runs import TrackedRun
from pipeline.storage import Manifest
from tasks.console import Board, duration
from tasks.stage import Outcome, StageContext


@dataclass(frozen=True)
class StageSpec:
    """A stage as the DAG sees it."""

    name: str
    sections: tuple[str, ...]
    """The parts of the config that it reads."""
    inputs: tuple[str, ...]
    """The stages whose outputs it reads."""
    beside: tuple[str, ...] = ()
    """The stages whose outputs it uses if they are there in time; what it makes is the same."""
    apart_from: tuple[str, ...] = ()
    """What makes no difference among `sections`."""
    format: int = 1
    """Raised when the output changes its form, which makes older outputs strangers."""


STAGES = (
    # not data.source and data.labels: a hash of what the scan found is an input
    StageSpec(
        "preprocess",
        (
            "data.class_names",
            "data.image_size",
            "data.channels",
            "data.resize",
            "data.min_size",
            "data.max_aspect",
            "data.drop_duplicates",
            "data.encoding",
            "data.holdout",
            "data.max_bad_fraction",
            "data.images_per_shard",
        ),
        (),
        format=SHARD_SET_FORMAT,
    ),
    StageSpec(
        "reference",
        ("name", "seed", "evaluation.classifier_epochs", "evaluation.extractor"),
        ("preprocess",),
        apart_from=("evaluation.extractor.file",),  # its hash stands beside it
        format=3,
    ),
    StageSpec(
        "train",
        ("seed", "network", "diffusion", "training"),
        ("preprocess",),
        beside=("reference",),
    ),
    StageSpec(
        "evaluate",
        ("seed", "evaluation", "sampling"),
        ("preprocess", "train", "reference"),
        apart_from=("evaluation.extractor.file", "evaluation.during_training"),
        format=2,
    ),
    StageSpec("register", ("name", "registry", "serving"), ("preprocess", "train", "evaluate")),
    StageSpec("sample", ("seed", "sampling"), ("register",)),
)


def needed_for(target: str) -> tuple[StageSpec, ...]:
    """The stages that `target` needs, itself last, in an order that can be run."""
    wanted = {target}
    for stage in reversed(STAGES):
        if stage.name in wanted:
            wanted |= set(stage.inputs)
    return tuple(stage for stage in STAGES if stage.name in wanted)


@dataclass(frozen=True)
class PlannedStage:
    """A stage of a given config: where its output lies, and whether and why it must run."""

    spec: StageSpec
    id: str
    folder: str
    done: bool
    reason: str
    outdated: bool = False
    """There is an output, but it must be made anew."""


@dataclass(frozen=True)
class Plan:
    """What a command has to do."""

    config: RunConfig
    tracking_uri: str
    source: Source
    stages: tuple[PlannedStage, ...]

    def folder(self, stage: str) -> str:
        return next(planned.folder for planned in self.stages if planned.spec.name == stage)


def plan(
    config: RunConfig,
    tracking_uri: str,
    target: str = "sample",
    remember: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    look_into: LookInto = look_on_threads,
) -> Plan:
    """Look at the source and the storage: what stands, what must run and why.

    Starts nothing and writes nothing, unless what is found in the source's files is to be
    remembered, or `look_into` does.

    Args:
        progress: called with the number of the source's files that were looked into, and of all.
        look_into: how to look into many files that no earlier scan has.
    """
    from tasks import preprocess, register

    index = preprocess.index_folder(config.storage)
    source = scan(config.data, index, remember, progress, look_into)
    planned: dict[str, PlannedStage] = {}
    for spec in needed_for(target):
        sections = _sections(config, spec)
        inputs = {name: planned[name].id for name in spec.inputs}
        if spec.name == "preprocess":
            inputs = {"source": source.fingerprint}
        stage_id = storage.digest([spec.name, spec.format, sections, inputs])
        folder = storage.join(config.storage, spec.name, stage_id)
        manifest = storage.read_manifest(folder)
        waits_for = [name for name in spec.inputs if not planned[name].done]
        if waits_for:
            done, reason = False, _why_inputs_changed(waits_for)
        elif manifest is None:
            done, reason = False, _why_missing(config, spec, sections, inputs, folder)
        elif spec.name == "register" and not register.still_registered(folder, tracking_uri):
            done, reason = False, f"the version it made is not in the registry at {tracking_uri}"
        else:
            done, reason = True, f"stands since {manifest.created_at}"
        outdated = not done and manifest is not None
        planned[spec.name] = PlannedStage(spec, stage_id, folder, done, reason, outdated)
    return Plan(config, tracking_uri, source, tuple(planned.values()))


def _sections(config: RunConfig, spec: StageSpec) -> dict[str, Any]:
    values = config.model_dump(mode="json")  # as a manifest has them
    for path in spec.apart_from:
        *outer, last = path.split(".")
        section = _at(values, outer)
        if isinstance(section, dict):
            section.pop(last, None)
    return {path: _at(values, path.split(".")) for path in spec.sections}


def _at(values: Any, path: list[str]) -> Any:
    for name in path:
        values = values[name]
    return values


def _why_inputs_changed(names: list[str]) -> str:
    return f"its input will be made anew: {', '.join(names)}"


def _why_missing(
    config: RunConfig,
    spec: StageSpec,
    sections: dict[str, Any],
    inputs: dict[str, str],
    folder: str,
) -> str:
    """Compare with the newest output of the stage that there is."""
    started = [name for name in storage.list_names(folder) if not name.startswith(".")]
    steps = [name for name in started if name.startswith("step-")]
    if steps:
        return f"was interrupted, goes on from {steps[-1]}"
    if started:
        return "was interrupted, goes on from what is finished"
    parent = storage.join(config.storage, spec.name)
    others = [
        manifest
        for name in storage.list_names(parent)
        if (manifest := storage.read_manifest(storage.join(parent, name))) is not None
    ]
    if not others:
        return "has no output yet"
    newest = max(others, key=lambda manifest: manifest.created_at)
    changes = _differences("", newest.config, sections)
    changes += [
        f"its input {name} changed"
        for name, value in inputs.items()
        if newest.inputs.get(name) not in (None, value)
    ]
    return "; ".join(changes[:4]) or f"its format is now {spec.format}"


def _differences(path: str, old: Any, new: Any) -> list[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        return [
            difference
            for name in sorted(set(old) | set(new))
            for difference in _differences(
                f"{path}.{name}" if path else name, old.get(name), new.get(name)
            )
        ]
    return [] if old == new else [f"{path}: {old} → {new}"]


@dataclass(frozen=True)
class StageResult:
    """How a stage ended, for the table at the end."""

    name: str
    outcome: str
    seconds: float


def run(plan: Plan, board: Board) -> list[StageResult]:
    """Run what must run, independent stages at the same time; Ray must be connected.

    Raises:
        the first error of a stage; the others are left to end with the process.
    """
    tracked_run = _LazyRun(plan)
    finished: queue.Queue[tuple[PlannedStage, StageResult | BaseException]] = queue.Queue()
    results = {
        stage.spec.name: StageResult(stage.spec.name, "cached", 0.0)
        for stage in plan.stages
        if stage.done
    }
    waiting = [stage for stage in plan.stages if not stage.done]
    running = 0
    try:
        while waiting or running:
            for stage in [s for s in waiting if all(name in results for name in s.spec.inputs)]:
                waiting.remove(stage)
                running += 1
                # a daemon, so that an interrupted command need not wait for it
                threading.Thread(
                    target=_run_in_thread,
                    args=(plan, stage, board, tracked_run, finished),
                    name=stage.spec.name,
                    daemon=True,
                ).start()
            stage, result = _get(finished)
            running -= 1
            if isinstance(result, BaseException):
                raise result
            results[stage.spec.name] = result
    except BaseException as error:
        with contextlib.suppress(StorageError):  # a store that is away must not hide the error
            tracked_run.finish("KILLED" if isinstance(error, KeyboardInterrupt) else "FAILED")
        raise
    tracked_run.finish("FINISHED")
    return [results[stage.spec.name] for stage in plan.stages]


def _get(finished: "queue.Queue[Any]") -> Any:
    while True:  # in slices, so that the main thread hears Ctrl-C
        try:
            return finished.get(timeout=0.2)
        except queue.Empty:
            continue


class _LazyRun:
    """The pipeline's MLflow run, opened once, by whichever stage first writes to it."""

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._lock = threading.Lock()
        self._run: TrackedRun | None = None

    def __call__(self) -> TrackedRun:
        with self._lock:
            if self._run is None:
                config = self._plan.config
                train = next(stage for stage in self._plan.stages if stage.spec.name == "train")
                params = _flat(config.model_dump())
                self._run = TrackedRun(self._plan.tracking_uri, config.name, train.id, params)
            return self._run

    def finish(self, status: str) -> None:
        if self._run is not None:
            self._run.finish(status)


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= (
            _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return flat


def _run_in_thread(
    plan: Plan,
    stage: PlannedStage,
    board: Board,
    tracked_run: Callable[[], TrackedRun],
    finished: "queue.Queue[tuple[PlannedStage, StageResult | BaseException]]",
) -> None:
    try:
        finished.put((stage, _run_stage(plan, stage, board, tracked_run)))
    except BaseException as error:  # raised again on the main thread
        finished.put((stage, error))


def _run_stage(
    plan: Plan, stage: PlannedStage, board: Board, tracked_run: Callable[[], TrackedRun]
) -> StageResult:
    name, begin = stage.spec.name, time.monotonic()
    bar = board.add(name)
    outcome, note = "failed", ""
    try:
        lock = storage.join(stage.folder, ".lock")
        with storage.exclusive(lock, lambda holder: _say_who(bar, holder)):
            there = storage.read_manifest(stage.folder)
            if there is not None and not stage.outdated:
                outcome = "made by another run"
            else:
                context = StageContext(
                    config=plan.config,
                    id=stage.id,
                    folder=stage.folder,
                    inputs={input_: plan.folder(input_) for input_ in stage.spec.inputs},
                    beside={
                        other.spec.name: other.folder
                        for other in plan.stages
                        if other.spec.name in stage.spec.beside
                    },
                    tracking_uri=plan.tracking_uri,
                    progress=bar,
                    tracked_run=tracked_run,
                )
                made = _stage_function(plan, name)(context)
                storage.commit(stage.folder, _manifest(plan, stage, made))
                outcome, note = "done", made.note
    finally:
        seconds = time.monotonic() - begin
        bar.close(f"{outcome} in {duration(seconds)}" + (f", {note}" if note else ""))
    return StageResult(name, outcome, seconds)


def _say_who(bar: Any, holder: str) -> None:
    bar.update(0, f"waits for {holder}, which is making the same output")


def _stage_function(plan: Plan, name: str) -> Callable[[StageContext], Outcome]:
    from tasks import evaluate, preprocess, reference, register, sample, train

    if name == "preprocess":
        return functools.partial(preprocess.run, source=plan.source)
    if name == "sample":
        model = register.read_reference(plan.folder("register"))
        return functools.partial(sample.run, model=model)
    functions = {
        "reference": reference.run,
        "train": train.run,
        "evaluate": evaluate.run,
        "register": register.run,
    }
    return functions[name]


def _manifest(plan: Plan, stage: PlannedStage, outcome: Outcome) -> Manifest:
    inputs = {
        other.spec.name: other.id for other in plan.stages if other.spec.name in stage.spec.inputs
    }
    if stage.spec.name == "preprocess":
        inputs = {"source": plan.source.fingerprint}
    return Manifest(
        format=stage.spec.format,
        stage=stage.spec.name,
        id=stage.id,
        inputs=inputs,
        config=_sections(plan.config, stage.spec),
        files=outcome.files,
        stats=outcome.stats,
        versions={name: version(name) for name in ("torch", "ray", "mlflow", "pyarrow", "numpy")},
    )
