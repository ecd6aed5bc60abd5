"""Registered models: what is stored, how a reference is resolved, how weights become a Model again.

A model's folder holds `weights.safetensors` (the EMA weights), `model.json` (spec, digest, lineage)
and `MLmodel`, so that `mlflow.pyfunc.load_model` opens it too. Loading executes nothing in it.
"""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, field_validator
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from pipeline import storage
from pipeline.errors import CorruptArtifact, ModelNotFound
from pipeline.registry.runs import SQLITE, TrackedRun, explained, in_turn, make_client
from pipeline.samplers.model import Model, ModelSpec, build_model
from pipeline.training import checkpoint

WEIGHTS = "weights.safetensors"
MODEL_JSON = "model.json"
DIGEST_TAG = "ddpm.model_digest"
SERVING_TAG = "ddpm.serving"
"""The `serving` section of the config that made a version, as JSON: how to serve it by default."""
ARTIFACT_FOLDER = "model"


class RegistryConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """How a trained model is registered."""

    alias: str = Field(default="champion", pattern=r"^[A-Za-z0-9_-]+$")
    """The alias that the new version takes over."""

    @field_validator("alias")
    @classmethod
    def _mlflow_keeps_some_names(cls, alias: str) -> str:
        if re.fullmatch(r"latest|v?\d+", alias, re.IGNORECASE):
            raise ValueError(f"{alias!r} reads as a version: choose a word such as champion")
        return alias


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


def model_digest(spec: ModelSpec, weights: bytes) -> str:
    """The identity of a model: of its spec and of the bytes of its weights.

    What has its default does not count, so a setting that a later version brings changes none.
    """
    return storage.digest([spec.model_dump(exclude_defaults=True), storage.sha256(weights)])


def model_files(spec: ModelSpec, weights: bytes, lineage: dict[str, Any]) -> dict[str, bytes]:
    """The folder of a registered model, as names and contents."""
    import mlflow.pyfunc
    from mlflow.models import Model as MlflowModel

    description = {
        "format": 1,
        "digest": model_digest(spec, weights),
        "weights_sha256": storage.sha256(weights),
        "spec": spec.model_dump(),
        "lineage": lineage,
    }
    mlmodel = MlflowModel()
    mlflow.pyfunc.add_to_model(mlmodel, loader_module="pipeline.registry.flavor", data=".")
    return {
        WEIGHTS: weights,
        MODEL_JSON: json.dumps(description, indent=1, sort_keys=True).encode(),
        "MLmodel": mlmodel.to_yaml().encode(),
        "requirements.txt": b"ray-ddpm\n",
    }


def load_model(uri: str, tracking_uri: str | None = None) -> Model:
    """A model ready to sample from, from a registered version or from a checkpoint.

    Args:
        uri: `models:/NAME/VERSION`, a model's folder, or a checkpoint's folder (its EMA weights).
        tracking_uri: of the registry, for `models:/`.

    Raises:
        CorruptArtifact: the weights do not match their recorded sha256.
        ModelNotFound: there is no model at that place.
    """
    if uri.startswith("models:/"):
        assert tracking_uri is not None
        uri = _download(uri, tracking_uri)
    try:
        spec, weights = _read_model(uri)
    except FileNotFoundError:
        try:
            spec, weights = read_checkpoint(uri)
        except FileNotFoundError as error:
            raise ModelNotFound(
                f"{uri} holds neither a registered model nor a checkpoint"
            ) from error
    return build_model(spec, load_tensors(weights), model_digest(spec, weights))


def _read_model(uri: str) -> tuple[ModelSpec, bytes]:
    description = storage.read_json(storage.join(uri, MODEL_JSON))
    weights = storage.read_bytes(storage.join(uri, WEIGHTS))
    if storage.sha256(weights) != description["weights_sha256"]:
        raise CorruptArtifact(
            f"{storage.join(uri, WEIGHTS)} does not match its recorded sha256: it was damaged or "
            "replaced since it was written"
        )
    return ModelSpec.model_validate(description["spec"]), weights


def read_checkpoint(uri: str) -> tuple[ModelSpec, bytes]:
    """The spec and the EMA weights of a checkpoint, in one safetensors file even if it was cut.

    Raises:
        CorruptArtifact: they do not match their recorded sha256.
        FileNotFoundError: there is no complete checkpoint.
    """
    info = checkpoint.at(uri)
    weights = save_tensors(checkpoint.read_tensors(info, "ema.safetensors"))
    return ModelSpec.model_validate(info.state["spec"]), weights


def _download(uri: str, tracking_uri: str) -> str:
    """A local folder with the files of `models:/NAME/VERSION`."""
    import mlflow.artifacts

    name, version = parse_reference(uri)
    with explained(tracking_uri):
        # by hand: for models:/ MLflow asks the process's own registry, whatever URI it is given
        source = make_client(tracking_uri).get_model_version(name, version).source
        path = mlflow.artifacts.download_artifacts(artifact_uri=source, tracking_uri=tracking_uri)
    return str(Path(path))


def parse_reference(text: str) -> tuple[str, str]:
    """(name, version or alias) of `NAME@ALIAS`, `NAME@7`, `models:/NAME@ALIAS` or `models:/NAME/7`.

    Raises:
        ModelNotFound: it is none of these.
    """
    match = re.fullmatch(r"(?:models:/)?([^@/:]+)[@/]([A-Za-z0-9_-]+)", text)
    if match is None:
        raise ModelNotFound(
            f"{text!r} does not name a model: write NAME@ALIAS or NAME@VERSION, as in "
            "digits@champion or digits@1"
        )
    return match[1], match[2]


def resolve(text: str, tracking_uri: str) -> ModelReference:
    """The version that a reference means now.

    Raises:
        ModelNotFound: there is no such model, version or alias; the message says what there is.
    """
    from mlflow.exceptions import MlflowException

    name, which = parse_reference(text)
    if not _store_exists(tracking_uri):
        raise ModelNotFound(
            f"there is no model {name!r}: the registry at {tracking_uri} does not exist yet; "
            "`ddpm run CONFIG` makes it, and tracking.uri or MLFLOW_TRACKING_URI names another"
        )
    client = make_client(tracking_uri)
    try:
        if which.isdigit():
            found = client.get_model_version(name, which)
        else:
            found = client.get_model_version_by_alias(name, which)
    except MlflowException as error:
        raise ModelNotFound(_what_there_is(client, name, which, tracking_uri)) from error
    return ModelReference(name, str(found.version), found.tags.get(DIGEST_TAG, ""), tracking_uri)


def _store_exists(tracking_uri: str) -> bool:
    """False for a sqlite file that is not there: looking into it would create it."""
    database = tracking_uri.removeprefix(SQLITE)
    return database == tracking_uri or storage.exists(database)


def _what_there_is(client: Any, name: str, which: str, tracking_uri: str) -> str:
    with explained(tracking_uri):
        models = {model.name: model for model in client.search_registered_models()}
        versions = client.search_model_versions(f"name = '{name}'") if name in models else []
    if name not in models:
        known = f"it has {', '.join(sorted(models))}" if models else "it has none yet"
        return (
            f"there is no model {name!r} in the registry at {tracking_uri}, {known}; `ddpm run "
            "CONFIG` makes one"
        )
    numbers = ", ".join(sorted((str(v.version) for v in versions), key=int)) or "none"
    aliases = ", ".join(sorted(models[name].aliases)) or "none"
    return (
        f"model {name!r} has no version or alias {which!r}: versions {numbers}; aliases {aliases}"
    )


def find_version(name: str, digest: str, tracking_uri: str) -> ModelReference | None:
    """The newest version of a model with the content `digest`, if there is one."""
    if not _store_exists(tracking_uri):
        return None
    client = make_client(tracking_uri)
    with explained(tracking_uri):
        found = client.search_model_versions(
            f"name = '{name}' and tags.`{DIGEST_TAG}` = '{digest}'"
        )
    if not found:
        return None
    newest = max(found, key=lambda version: int(version.version))
    return ModelReference(name, str(newest.version), digest, tracking_uri)


def register(
    run: TrackedRun, name: str, files: dict[str, bytes], tags: dict[str, str]
) -> ModelReference:
    """Make a version of `name` from a model's files; the same content twice gives one version."""
    digest = json.loads(files[MODEL_JSON])["digest"]
    if there := find_version(name, digest, run.uri):
        with explained(run.uri):  # what was learned of it since
            for key, value in tags.items():
                run.client.set_model_version_tag(name, there.version, key, value)
        return there
    folder = f"{ARTIFACT_FOLDER}/{digest}"  # of its own: a run may register more than one content
    for file_name, data in files.items():
        run.log_artifact(folder, file_name, data)
    with in_turn(run.uri), explained(run.uri):
        if not run.client.search_registered_models(f"name = '{name}'"):
            run.client.create_registered_model(name)
        version = run.client.create_model_version(
            name,
            source=f"runs:/{run.run_id}/{folder}",
            run_id=run.run_id,
            tags={DIGEST_TAG: digest, **tags},
        )
    return ModelReference(name, str(version.version), digest, run.uri)


def read_tag(reference: ModelReference, tag: str) -> str | None:
    """A tag of a version."""
    client = make_client(reference.tracking_uri)
    with explained(reference.tracking_uri):
        value: str | None = client.get_model_version(reference.name, reference.version).tags.get(
            tag
        )
    return value


def set_alias(reference: ModelReference, alias: str) -> None:
    """Point an alias at a version; readers see the old one or the new one."""
    client = make_client(reference.tracking_uri)
    with explained(reference.tracking_uri):
        client.set_registered_model_alias(reference.name, alias, reference.version)
