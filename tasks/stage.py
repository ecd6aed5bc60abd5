"""What a stage is given and what it gives back. `workflow.py` calls, each stage file implements."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Protocol

from pipeline.config import RunConfig
from pipeline.registry.runs import TrackedRun
from pipeline.storage import FileEntry


class Progress(Protocol):
    """Where a stage says how far it is."""

    def start(self, total: int, unit: str, done: int = 0) -> None:
        """There are `total` units of work, of which `done` were done by an earlier run."""

    def update(self, done: int, note: str = "") -> None:
        """`done` units are done; `note` is a short figure, such as the loss."""


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


@dataclass(frozen=True)
class Outcome:
    """What a stage has written below its folder, and what is worth knowing about it."""

    files: list[FileEntry]
    stats: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    """What a person should hear of it when the stage is over."""
