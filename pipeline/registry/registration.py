"""Registering a model: one version a content, however often it is asked for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING

from pipeline.registry.folder import CARD, GRID, MODEL_JSON
from pipeline.registry.lock import lock_model
from pipeline.registry.runs import TrackedRun, explained, log_artifact
from pipeline.registry.versions import DIGEST_TAG, ModelReference, with_digest

if TYPE_CHECKING:  # importing mlflow takes seconds
    from mlflow.tracking import MlflowClient

ARTIFACT_FOLDER = "model"


def register(
    run: TrackedRun, name: str, files: Mapping[str, bytes], tags: Mapping[str, str]
) -> ModelReference:
    """Make a version of `name` from a model's files; the same content twice gives one version.

    Of a version that exists, the tags and the card are written anew: what was learned since.

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
            with lock_model(client, run.uri, name):
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
