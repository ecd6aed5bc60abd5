"""A stage of the pipeline: what it declares, what it is given and what it gives back.

`declarations.py` has the pipeline's own, `plan.py` says which of them must run, `workflow.py` runs
them.
"""

import pkgutil
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipeline.config import RunConfig
from pipeline.data.items import LookInto, look_on_threads
from pipeline.registry.runs import TrackedRun
from pipeline.storage import FileEntry


@dataclass(frozen=True)
class Look:
    """How to look at what no stage made, such as the source of images."""

    remember: bool = False
    """Whether what is found may be written to the storage, for the next look."""
    progress: Callable[[int, int], None] = lambda done, total: None
    """Called with the number of files that were looked into, and of all."""
    into: LookInto = look_on_threads
    """How to look into many files."""


@dataclass(frozen=True)
class External:
    """What a stage reads that no stage made."""

    fingerprints: dict[str, str] = field(default_factory=dict)
    """By name, as the ids of other stages' outputs are: they are part of the output's id."""
    content: Any = None
    """For the stage, as `StageContext.external`."""


class Progress(Protocol):
    """Where a stage says how far it is."""

    def start(self, total: int, unit: str, done: int = 0) -> None:
        """There are `total` units of work, of which `done` were done by an earlier run."""

    def update(self, done: int, note: str = "") -> None:
        """`done` units are done; `note` is a short figure, such as the loss."""

    def say(self, sentence: str) -> None:
        """Something that a person should know while it runs."""


@dataclass(frozen=True)
class StageContext:
    """The surroundings of one run of a stage."""

    config: RunConfig
    id: str
    folder: str
    """URI of the output."""
    inputs: dict[str, str]
    """URIs of the outputs it reads, by stage."""
    tracking_uri: str
    progress: Progress
    tracked_run: Callable[[], TrackedRun]
    """The pipeline's MLflow run, opened when a stage first asks for it."""
    beside: dict[str, str] = field(default_factory=dict)
    """The same as `inputs` of outputs that may not be finished yet."""
    external: Any = None
    """What the stage's `inputs_of` found."""


@dataclass(frozen=True)
class Outcome:
    """What a stage has written below its folder, and what is worth knowing about it."""

    files: list[FileEntry]
    stats: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    """What a person should hear of it when the stage is over."""


@dataclass(frozen=True)
class Stage:
    """A node of the DAG. Its output is a function of `reads`, of its inputs and of its code."""

    name: str
    run: Callable[[StageContext], Outcome]
    """Writes the output below ctx.folder, but for its manifest. What an interrupted run left there
    is the stage's to use."""
    reads: tuple[str, ...] = ()
    """The parts of the config that the output depends on: sections, or keys as `data.holdout`."""
    apart_from: tuple[str, ...] = ()
    """Keys that make no difference among `reads`."""
    inputs: tuple[str, ...] = ()
    """The stages whose outputs it reads."""
    beside: tuple[str, ...] = ()
    """The stages whose outputs it uses if they are there in time; what it makes is the same."""
    format: int = 1
    """Raised when the output changes its form, which makes older outputs strangers."""
    rows: Callable[[RunConfig], float] = lambda config: 0.0
    """Of network calls that it makes, about, which tells how long it takes: see estimate.py."""
    paced: bool = False
    """Its progress goes evenly with its rows, so that it tells the machine's speed."""
    inputs_of: Callable[[RunConfig, Look], External] = lambda config, look: External()
    """Looks at what it reads that no stage made."""
    why_invalid: Callable[[str, str], str] = lambda folder, tracking_uri: ""
    """Of a finished output: why it must be made anew all the same; empty if it stands."""


def at(place: str) -> Callable[..., Any]:
    """The function at `module:name`, imported when it is called.

    A stage's module brings torch and Ray along, which a look at the stages can do without.
    """

    def call(*arguments: Any) -> Any:
        return pkgutil.resolve_name(place)(*arguments)

    return call
