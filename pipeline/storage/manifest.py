"""Manifests: what a stage made, from what. An output without one does not count."""

from datetime import UTC, datetime
from typing import Any

from pydantic import BaseModel

from pipeline.errors import StorageError
from pipeline.storage.files import FileEntry, join, read_json, write_json

MANIFEST = "manifest.json"


class Manifest(BaseModel):
    """What a stage made, from what; `manifest.json` of its output."""

    format: int
    stage: str
    id: str
    inputs: dict[str, str]
    """The ids of the outputs of other stages that went in, by stage."""
    config: dict[str, Any]
    """The sections of the configuration that the stage reads."""
    files: list[FileEntry]
    stats: dict[str, Any] = {}
    versions: dict[str, str] = {}
    created_at: str = ""


def read_manifest(folder: str) -> Manifest | None:
    """The manifest of a stage's output, None if the output is not complete."""
    try:
        return Manifest.model_validate(read_json(join(folder, MANIFEST)))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise StorageError(
            f"{join(folder, MANIFEST)} is not a manifest ({str(error).splitlines()[0]}): "
            "delete that folder and run the same command again"
        ) from error


def commit(folder: str, manifest: Manifest) -> Manifest:
    """Make a stage's output visible: write its manifest, last."""
    manifest = manifest.model_copy(
        update={"created_at": datetime.now(UTC).isoformat(timespec="seconds")}
    )
    write_json(join(folder, MANIFEST), manifest.model_dump())
    return manifest
