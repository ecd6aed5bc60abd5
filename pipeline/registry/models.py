"""Registered models: registered once a content, found by name, opened by hash.

Loading executes nothing that lies in a model's folder (see folder.py).
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from pipeline.errors import CorruptArtifact, ModelNotFound, StorageError
from pipeline.registry.folder import (
    CARD,
    GRID,
    MODEL_JSON,
    model_digest,
    read_description,
    read_folder,
)
from pipeline.registry.runs import TrackedRun, explained, first_line, log_artifact
from pipeline.registry.turns import model_turn
from pipeline.registry.versions import (
    DIGEST_TAG,
    ModelReference,
    version_at,
    with_digest,
)
from pipeline.samplers.model import Model, ModelSpec, build_model
from pipeline.training import checkpoint

if TYPE_CHECKING:  # importing mlflow takes seconds
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient

ARTIFACT_FOLDER = "model"


def load_model(uri: str, tracking_uri: str | None = None) -> Model:
    """A model ready to sample from, from a registered version or from a checkpoint.

    Args:
        uri: `models:/NAME/VERSION`, a model's folder, or a checkpoint's folder (its EMA weights).
        tracking_uri: of the registry, for `models:/`.

    Raises:
        CorruptArtifact: what is there does not match its recorded hashes.
        ModelNotFound: there is no model at that place.
        StorageError: the registry cannot be used, or the files are not where it says.
    """
    wanted = None
    if uri.startswith("models:/"):
        assert tracking_uri is not None
        version = version_at(uri, tracking_uri)
        wanted = version.tags.get(DIGEST_TAG)
        uri = _download(version, "", tracking_uri)
    try:
        spec, weights = read_folder(uri)
    except FileNotFoundError:
        try:
            spec, weights = read_checkpoint(uri)
        except FileNotFoundError as error:
            raise ModelNotFound(
                f"{uri} holds neither a registered model nor a checkpoint"
            ) from error
    digest = model_digest(spec, weights)
    if wanted not in (None, digest):
        raise CorruptArtifact(
            f"{uri} holds the model {digest}, the registry says {wanted}: it was replaced since it "
            "was registered"
        )
    return build_model(spec, load_tensors(weights), digest)


def read_lineage(reference: ModelReference) -> tuple[dict[str, Any], dict[str, str]]:
    """What model.json says of how a version was made, and the version's tags.

    Raises:
        CorruptArtifact: model.json cannot be read.
        ModelNotFound: the version was deleted.
        StorageError: the registry cannot be used, or the file is not where it says.
    """
    version = version_at(reference.uri, reference.tracking_uri)
    path = _download(version, f"/{MODEL_JSON}", reference.tracking_uri)
    return read_description(path)["lineage"], dict(version.tags)


def read_checkpoint(uri: str) -> tuple[ModelSpec, bytes]:
    """The spec and the EMA weights of a checkpoint, in one safetensors file even if it was cut.

    Raises:
        CorruptArtifact: they do not match their recorded sha256.
        FileNotFoundError: there is no complete checkpoint.
    """
    info = checkpoint.at(uri)
    weights = save_tensors(checkpoint.read_tensors(info, "ema.safetensors"))
    return ModelSpec.model_validate(info.state["spec"]), weights


def _download(version: ModelVersion, inner: str, tracking_uri: str) -> str:
    """A local path of a version's folder, or of a file in it."""
    import mlflow.artifacts
    from mlflow.exceptions import MlflowException

    # by hand: for models:/ MLflow asks the process's own registry, whatever URI it is given
    source = f"{version.source}{inner}"
    try:
        path = mlflow.artifacts.download_artifacts(artifact_uri=source, tracking_uri=tracking_uri)
    except (MlflowException, OSError) as error:
        raise StorageError(
            f"the files of {version.name}@{version.version} cannot be read from {source}, where "
            f"the registry says they are: {first_line(error)}"
        ) from error
    return str(Path(path))


def register(
    run: TrackedRun, name: str, files: Mapping[str, bytes], tags: Mapping[str, str]
) -> ModelReference:
    """Make a version of `name` from a model's files; the same content twice gives one version.

    Of a version that is there, what was learned of it since is written: the tags and the card.

    Raises:
        StorageError: the registry cannot be used.
    """
    digest = str(json.loads(files[MODEL_JSON])["digest"])
    folder = f"{ARTIFACT_FOLDER}/{digest}"  # of its own: a run may register more than one content
    client = run.client
    with explained(run.uri):
        found = with_digest(client, name, digest)
        if found is None:
            for file_name, data in files.items():
                run.log_artifact(folder, file_name, data)
            _create_model(client, name)
            with model_turn(client, run.uri, name):
                found = with_digest(client, name, digest)
                if found is None:
                    created = client.create_model_version(
                        name,
                        source=f"runs:/{run.run_id}/{folder}",
                        run_id=run.run_id,
                        tags={DIGEST_TAG: digest, **tags},
                    )
                    return ModelReference(name, str(created.version), digest, run.uri)
        for key, value in tags.items():
            client.set_model_version_tag(name, found.version, key, value)
        for file_name in {CARD, GRID} & set(files):
            log_artifact(client, found.run_id, folder, file_name, files[file_name])
    return ModelReference(name, str(found.version), digest, run.uri)


def _create_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    try:
        client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
