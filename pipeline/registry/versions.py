"""Registered versions of models: what they are called, which there are, and what their tags say."""

from __future__ import annotations

import contextlib
import re
import sqlite3
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline import storage
from pipeline.errors import ModelNotFound, RequestError, StorageError, shown
from pipeline.registry.lock import SQLITE
from pipeline.registry.store import explained, first_line, make_client
from pipeline.storage import FileEntry

if TYPE_CHECKING:  # importing mlflow takes seconds
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel
    from mlflow.tracking import MlflowClient

DIGEST_TAG = "ddpm.model_digest"
SERVING_TAG = "ddpm.serving"
"""The `serving` section of the config that made a version, as JSON: how to serve it by default."""
FIGURES_TAG = "ddpm.figures"
"""The figures of a version as JSON: what the gate compares another version with."""
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
    rows = look(
        tracking_uri,
        "SELECT max(version) FROM model_versions JOIN model_version_tags USING (name, version) "
        "WHERE name = ? AND key = ? AND value = ? AND current_stage != 'Deleted_Internal'",
        name,
        DIGEST_TAG,
        digest,
    )
    if rows is not None:
        version = rows[0][0]
    else:
        client = make_client(tracking_uri)
        with explained(tracking_uri):
            found = with_digest(client, name, digest)
        version = found.version if found else None
    return None if version is None else ModelReference(name, str(version), digest, tracking_uri)


def look(tracking_uri: str, query: str, *values: str) -> list[Any] | None:
    """Rows of a registry in a sqlite file, read without MLflow, whose import takes seconds.

    None of any other registry, and where the file cannot be read in this way: MLflow is to be
    asked, which says what is wrong. The tables are those that MLflow has had since its version 1.
    """
    if not tracking_uri.startswith(SQLITE):
        return None
    path = Path(tracking_uri.removeprefix(SQLITE)).absolute().as_uri()
    try:
        with contextlib.closing(sqlite3.connect(f"{path}?mode=ro", uri=True)) as database:
            return database.execute(query, values).fetchall()
    except sqlite3.Error:
        return None


def with_digest(client: MlflowClient, name: str, digest: str) -> ModelVersion | None:
    found = client.search_model_versions(f"name = '{name}' and tags.`{DIGEST_TAG}` = '{digest}'")
    return max(found, key=lambda version: int(version.version), default=None)


def version_at(uri: str, tracking_uri: str) -> ModelVersion:
    client = make_client(tracking_uri)
    with explained(tracking_uri):
        return get_version(client, *parse_reference(uri))


def download(version: ModelVersion, inner: str, tracking_uri: str) -> str:
    """Download a version's folder, or `inner`, a file in it; returns the local path.

    Raises:
        StorageError: the files are not where the registry says.
    """
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


def read_tag(reference: ModelReference, tag: str) -> str | None:
    """A tag of a version.

    Raises:
        ModelNotFound: the version was deleted.
        StorageError: the registry cannot be used.
    """
    value: str | None = version_at(reference.uri, reference.tracking_uri).tags.get(tag)
    return value
