"""The folder of a registered model: what is written into it, and read back without running any.

    weights.safetensors   the EMA weights
    model.json            spec, hashes and lineage
    MLmodel               how mlflow.pyfunc opens it: a loader module of this project, no pickle
    requirements.txt      what loading needs, pinned
    README.md, grid.png   the model card

The model's digest is that of the spec and the weights; the rest may be written anew.
"""

import json
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

from pydantic import ValidationError

from pipeline import storage
from pipeline.errors import CorruptArtifact
from pipeline.registry.card import write_card
from pipeline.registry.signature import describe_for_mlflow
from pipeline.samplers.model import ModelSpec

WEIGHTS = "weights.safetensors"
MODEL_JSON = "model.json"
CARD = "README.md"
GRID = "grid.png"

NEEDED = (
    "mlflow",
    "torch",
    "safetensors",
    "pydantic",
    "numpy",
    "pillow",
    "fsspec",
    "pyarrow",
    "PyYAML",
)
"""The packages that loading imports."""


def model_digest(spec: ModelSpec, weights: bytes) -> str:
    """The identity of a model: of its spec and of the bytes of its weights.

    What has its default does not count, so a setting that a later version brings changes none.
    """
    return storage.digest([spec.model_dump(exclude_defaults=True), storage.sha256(weights)])


def model_files(
    spec: ModelSpec,
    weights: bytes,
    lineage: Mapping[str, Any],
    scores: Mapping[str, Any] | None = None,
    grid: bytes | None = None,
) -> dict[str, bytes]:
    """The folder of a registered model, as names and contents.

    Args:
        lineage: JSON-able, what it was made from; see tasks/stages/register.py.
        scores: protocol, figures and skipped of its evaluation, for the card.
        grid: a PNG of samples, for the card.
    """
    digest = model_digest(spec, weights)
    description = {
        "format": 1,
        "digest": digest,
        "weights_sha256": storage.sha256(weights),
        "spec": spec.model_dump(),
        "lineage": lineage,
    }
    picture = GRID if grid else None
    files = {
        WEIGHTS: weights,
        MODEL_JSON: json.dumps(description, indent=1, sort_keys=True).encode(),
        "MLmodel": describe_for_mlflow(spec).encode(),
        "requirements.txt": _requirements().encode(),
        CARD: write_card(spec, digest, lineage, scores or {}, picture).encode(),
    }
    return files | ({GRID: grid} if grid else {})


def _requirements() -> str:
    # without +cpu and the like, which name builds of other indexes than the usual one
    pins = [f"{name}=={version(name).partition('+')[0]}" for name in NEEDED]
    # no requirement: whoever took its name in a package index would be trusted
    return "\n".join(["# and ray-ddpm itself, installed from its repository", *pins, ""])


def read_description(uri: str) -> dict[str, Any]:
    """What model.json says.

    Raises:
        FileNotFoundError: there is none.
        CorruptArtifact: it is not what was written.
    """
    try:
        description = storage.read_json(uri)
        if not {"digest", "weights_sha256", "spec", "lineage"} <= set(description):
            raise ValueError
    except (ValueError, TypeError) as error:
        raise _damaged(uri, "is not the description of a model") from error
    return dict(description)


def read_folder(uri: str) -> tuple[ModelSpec, bytes]:
    """The spec and the weights of a model's folder.

    Raises:
        FileNotFoundError: it holds no model.
        CorruptArtifact: they do not match their recorded hashes.
    """
    description = read_description(storage.join(uri, MODEL_JSON))
    weights = storage.read_bytes(storage.join(uri, WEIGHTS))
    if storage.sha256(weights) != description["weights_sha256"]:
        raise _damaged(storage.join(uri, WEIGHTS), "does not match its recorded sha256")
    try:
        spec = ModelSpec.model_validate(description["spec"])
    except ValidationError as error:
        raise _damaged(storage.join(uri, MODEL_JSON), "has a spec that is none") from error
    if model_digest(spec, weights) != description["digest"]:
        raise _damaged(storage.join(uri, MODEL_JSON), "does not match its recorded digest")
    return spec, weights


def _damaged(uri: str, why: str) -> CorruptArtifact:
    return CorruptArtifact(f"{uri} {why}: it was damaged or replaced since it was written")
