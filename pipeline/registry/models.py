"""Registered models: registered once a content, found by name, opened by hash.

Loading executes nothing that lies in a model's folder (see folder.py).
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from pipeline import storage
from pipeline.errors import CorruptArtifact, ModelNotFound, RequestError, StorageError, shown
from pipeline.registry.folder import (
    CARD,
    GRID,
    MODEL_JSON,
    model_digest,
    read_description,
    read_folder,
)
from pipeline.registry.runs import TrackedRun, explained, first_line, log_artifact, make_client
from pipeline.registry.turns import SQLITE, model_turn
from pipeline.samplers.model import Model, ModelSpec, build_model
from pipeline.storage import FileEntry
from pipeline.training import checkpoint

if TYPE_CHECKING:  # importing mlflow takes seconds
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel
    from mlflow.tracking import MlflowClient

DIGEST_TAG = "ddpm.model_digest"
SERVING_TAG = "ddpm.serving"
"""The `serving` section of the config that made a version, as JSON: how to serve it by default."""
FIGURES_TAG = "ddpm.figures"
"""The figures of a version as JSON: what the gate compares another version with."""
ARTIFACT_FOLDER = "model"
REFERENCE_JSON = "registered.json"
"""Of the stage `register`: name, version, digest and registry of the model."""


@dataclass(frozen=True)
class ModelReference:
    """A version in a registry."""

    name: str
    version: str
    digest: str
    tracking_uri: str

    def __str__(self) -> str:
        return f"{self.name}@{self.version}"

    @property
    def uri(self) -> str:
        return f"models:/{self.name}/{self.version}"


def write_reference(folder: str, reference: ModelReference) -> FileEntry:
    return storage.write_json(storage.join(folder, REFERENCE_JSON), vars(reference))


def read_reference(folder: str) -> ModelReference:
    """The version that a finished registration made."""
    return ModelReference(**storage.read_json(storage.join(folder, REFERENCE_JSON)))


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
        version = _version_at(uri, tracking_uri)
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
    version = _version_at(reference.uri, reference.tracking_uri)
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


def _version_at(uri: str, tracking_uri: str) -> ModelVersion:
    client = make_client(tracking_uri)
    with explained(tracking_uri):
        return get_version(client, *parse_reference(uri))


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


def check_name(name: str) -> str:
    """The name itself, if a model may have it.

    Raises:
        RequestError: it may not; the message says what a name is.
    """
    if len(name) > 100 or not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_.-]*", name):
        raise RequestError(
            f"{name!r} is not the name of a model alone: that is up to 100 letters, digits, '_', "
            "'.' and '-', a letter or a digit first, as in digits",
            "name",
        )
    return name


def parse_reference(text: str) -> tuple[str, str]:
    """(name, version or alias) of `NAME@ALIAS`, `NAME@7`, `models:/NAME@ALIAS` or `models:/NAME/7`.

    Raises:
        ModelNotFound: it is none of these.
    """
    match = re.fullmatch(r"(?:models:/)?([^@/:]{1,256})[@/]([A-Za-z0-9_-]{1,256})", text)
    # names that the registry cannot look for: it would look like a fault of the registry
    if match is None or not match[1].isprintable() or re.match(r"\s*$|\.\.|\.$", match[1]):
        raise ModelNotFound(
            f"{shown(text)} does not name a model: write NAME@ALIAS or NAME@VERSION, as in "
            "digits@champion or digits@1"
        )
    return match[1], match[2]


def resolve(text: str, tracking_uri: str) -> ModelReference:
    """The version that a reference means now.

    Raises:
        ModelNotFound: there is no such model, version or alias; the message says what there is.
        StorageError: the registry cannot be used.
    """
    name, which = parse_reference(text)
    require_store(name, tracking_uri)
    client = make_client(tracking_uri)
    with explained(tracking_uri):
        model = require_model(client, name, tracking_uri)
        version = str(model.aliases.get(which, which))
        there = versions_of(client, name)
        if version not in there:
            numbers, aliases = ", ".join(there) or "none", ", ".join(sorted(model.aliases))
            if which in model.aliases:
                raise ModelNotFound(
                    f"{name}@{which} is version {version}, which was deleted: point it at another "
                    f"with `ddpm promote {name}@VERSION --alias {which}`, of {numbers}"
                )
            raise ModelNotFound(
                f"model {name!r} has no version or alias {which!r}: versions {numbers}; aliases "
                f"{aliases or 'none'}"
            )
        found = get_version(client, name, version)
    return ModelReference(name, version, found.tags.get(DIGEST_TAG, ""), tracking_uri)


def _store_exists(tracking_uri: str) -> bool:
    """False for a sqlite file that is not there: looking into it would create it."""
    database = tracking_uri.removeprefix(SQLITE)
    return database == tracking_uri or storage.exists(database)


def require_store(name: str, tracking_uri: str) -> None:
    """Look before the store is opened, which would make it.

    Raises:
        ModelNotFound: it is not there, and so neither is the model `name`.
    """
    if not _store_exists(tracking_uri):
        raise ModelNotFound(
            f"there is no model {name!r}: the registry at {tracking_uri} does not exist yet; "
            "`ddpm run CONFIG` makes it, and tracking.uri or MLFLOW_TRACKING_URI names another"
        )


def get_version(client: MlflowClient, name: str, version: str) -> ModelVersion:
    """A version; for use within `explained`.

    Raises:
        ModelNotFound: there is none; the message says which there are.
    """
    from mlflow.exceptions import MlflowException

    try:
        return client.get_model_version(name, version)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        there = ", ".join(versions_of(client, name)) or "none"
        raise ModelNotFound(
            f"there is no version {version} of the model {name!r}, or no more: versions {there}"
        ) from error


def versions_of(client: MlflowClient, name: str) -> list[str]:
    """The versions of a model, the oldest first; for use within `explained`."""
    found = client.search_model_versions(f"name = '{name}'")
    return [str(number) for number in sorted(int(each.version) for each in found)]


def require_model(client: MlflowClient, name: str, tracking_uri: str) -> RegisteredModel:
    """A registered model; for use within `explained`.

    Raises:
        ModelNotFound: there is none; the message says which there are.
    """
    from mlflow.exceptions import MlflowException

    try:
        return client.get_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        models = sorted(model.name for model in client.search_registered_models())
        known = f"it has {', '.join(models)}" if models else "it has none yet"
        raise ModelNotFound(
            f"there is no model {name!r} in the registry at {tracking_uri}, {known}; `ddpm run "
            "CONFIG` makes one"
        ) from error


def find_version(name: str, digest: str, tracking_uri: str) -> ModelReference | None:
    """The newest version of a model with the content `digest`, if there is one."""
    if not _store_exists(tracking_uri):
        return None
    client = make_client(tracking_uri)
    with explained(tracking_uri):
        found = _with_digest(client, name, digest)
    return ModelReference(name, str(found.version), digest, tracking_uri) if found else None


def _with_digest(client: MlflowClient, name: str, digest: str) -> ModelVersion | None:
    found = client.search_model_versions(f"name = '{name}' and tags.`{DIGEST_TAG}` = '{digest}'")
    return max(found, key=lambda version: int(version.version), default=None)


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
        found = _with_digest(client, name, digest)
        if found is None:
            for file_name, data in files.items():
                run.log_artifact(folder, file_name, data)
            _create_model(client, name)
            with model_turn(client, run.uri, name):
                found = _with_digest(client, name, digest)
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


def read_tag(reference: ModelReference, tag: str) -> str | None:
    """A tag of a version.

    Raises:
        ModelNotFound: the version was deleted.
        StorageError: the registry cannot be used.
    """
    value: str | None = _version_at(reference.uri, reference.tracking_uri).tags.get(tag)
    return value
