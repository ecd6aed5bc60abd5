"""What a command has to do: which outputs stand, which stages must run and why.

The id of an output is a hash of its stage, the stage's format, the parts of the config it reads and
the ids of its inputs. So all ids are known before anything runs, a stage whose manifest stands is
not run again, and a changed value reaches exactly the stages downstream of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pipeline import storage
from pipeline.config import RunConfig
from tasks.stages.stage import Look, Stage


@dataclass(frozen=True)
class PlannedStage:
    """A stage of a given config: where its output lies, and whether and why it must run."""

    stage: Stage
    id: str
    folder: str
    reads: dict[str, Any]
    """The values of the parts of the config that it reads, as its manifest has them."""
    inputs: dict[str, str]
    """The ids of its inputs, and the fingerprints of what no stage made."""
    external: Any
    done: bool
    reason: str
    outdated: bool
    """There is an output, but it must be made anew."""

    @property
    def name(self) -> str:
        return self.stage.name


@dataclass(frozen=True)
class Plan:
    """What a command has to do."""

    config: RunConfig
    tracking_uri: str
    stages: tuple[PlannedStage, ...]
    """In an order in which they can run."""

    def __getitem__(self, name: str) -> PlannedStage:
        return next(planned for planned in self.stages if planned.name == name)


def needed_for(target: str, stages: Sequence[Stage]) -> list[Stage]:
    """The stages that `target` needs, itself last; each of `stages` comes after its inputs."""
    wanted = {target}
    for stage in reversed(stages):
        if stage.name in wanted:
            wanted |= set(stage.inputs)
    return [stage for stage in stages if stage.name in wanted]


def make_plan(
    stages: Sequence[Stage],
    config: RunConfig,
    tracking_uri: str,
    target: str,
    look: Look = Look(),  # noqa: B008 - it is frozen
) -> Plan:
    """Look at the storage, and at what the stages read beside it.

    Starts nothing and writes nothing, but for what `look` allows.
    """
    planned: dict[str, PlannedStage] = {}
    for stage in needed_for(target, stages):
        external = stage.inputs_of(config, look)
        inputs = {name: planned[name].id for name in stage.inputs} | external.fingerprints
        reads = _read_of(config, stage)
        stage_id = storage.digest([stage.name, stage.format, reads, inputs])
        folder = storage.join(config.storage, stage.name, stage_id)
        manifest = storage.read_manifest(folder)
        if waits_for := [name for name in stage.inputs if not planned[name].done]:
            why = f"its input will be made anew: {', '.join(waits_for)}"
        elif manifest is None:
            why = _why_missing(config, stage, reads, inputs, folder)
        else:
            why = stage.why_invalid(folder, tracking_uri)
        planned[stage.name] = PlannedStage(
            stage,
            stage_id,
            folder,
            reads,
            inputs,
            external.content,
            done=not why,
            reason=why or f"stands since {manifest.created_at if manifest else ''}",
            outdated=bool(why) and manifest is not None,
        )
    return Plan(config, tracking_uri, tuple(planned.values()))


def _read_of(config: RunConfig, stage: Stage) -> dict[str, Any]:
    values = config.model_dump(mode="json")  # as a manifest has them
    for path in stage.apart_from:
        *outer, last = path.split(".")
        section = _at(values, outer)
        if isinstance(section, dict):
            section.pop(last, None)
    return {path: _at(values, path.split(".")) for path in stage.reads}


def _at(values: Any, path: list[str]) -> Any:
    for name in path:
        values = values[name]
    return values


def _why_missing(
    config: RunConfig, stage: Stage, reads: dict[str, Any], inputs: dict[str, str], folder: str
) -> str:
    """Compare with the newest output of the stage that there is."""
    started = [name for name in storage.list_names(folder) if not name.startswith(".")]
    steps = [name for name in started if name.startswith("step-")]
    if started:
        return f"was interrupted, goes on from {steps[-1] if steps else 'what is finished'}"
    parent = storage.join(config.storage, stage.name)
    others = [
        manifest
        for name in storage.list_names(parent)
        if (manifest := storage.read_manifest(storage.join(parent, name))) is not None
    ]
    if not others:
        return "has no output yet"
    newest = max(others, key=lambda manifest: manifest.created_at)
    changes = _differences("", newest.config, reads)
    changes += [
        f"its input {name} changed"
        for name, value in inputs.items()
        if newest.inputs.get(name) not in (None, value)
    ]
    return "; ".join(changes[:4]) or f"its format is now {stage.format}"


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
