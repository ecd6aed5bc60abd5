"""Registering a model: one version a content, however often it is asked for.

The version is made from the content's logged model, which has the files: see logged_models.py.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from pipeline.registry.card import summary
from pipeline.registry.folder import CARD, GRID, MODEL_JSON
from pipeline.registry.lock import lock_model
from pipeline.registry.logged_models import fill_model, link_version, log_model
from pipeline.registry.runs import TrackedRun
from pipeline.registry.store import explained
from pipeline.registry.versions import DIGEST_TAG, FIGURES_TAG, ModelReference, with_digest
from pipeline.samplers.model import ModelSpec

if TYPE_CHECKING:  # importing mlflow takes seconds
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.tracking import MlflowClient


def register(
    run: TrackedRun, name: str, files: Mapping[str, bytes], tags: Mapping[str, str]
) -> ModelReference:
    """Make a version of `name` from a model's files; the same content twice gives one version.

    Of a version that exists, the tags, the card and the description, unless a person has changed
    it, are written anew: what was learned since.

    Raises:
        StorageError: the registry cannot be used.
    """
    described = json.loads(files[MODEL_JSON])
    digest, spec = str(described["digest"]), ModelSpec.model_validate(described["spec"])
    model_id = log_model(run, name, digest, 0)
    client = run.client
    with explained(run.uri):
        model = client.get_logged_model(model_id)
        version, is_new = with_digest(client, name, digest), False
        if version is None:
            fill_model(run, model, files)
            _create_model(client, name)
            with lock_model(client, run.uri, name):
                version = with_digest(client, name, digest)
                if is_new := version is None:
                    version = client.create_model_version(
                        name,
                        # its place: of models:/ID MLflow asks the process's own tracking URI
                        source=model.artifact_location,
                        run_id=run.run_id,
                        tags={DIGEST_TAG: digest, **run.origin.tags(), **tags},
                        description=_summary(spec, tags, model),
                        model_id=model_id,
                    )
        if not is_new:
            _renew(run, version, spec, model, files, tags)
        link_version(run, model, version)
    return ModelReference(name, str(version.version), digest, run.uri)


def _renew(
    run: TrackedRun,
    version: ModelVersion,
    spec: ModelSpec,
    model: LoggedModel,
    files: Mapping[str, bytes],
    tags: Mapping[str, str],
) -> None:
    """Write to a version that is there what was learned of its content since."""
    from mlflow.store.artifact.artifact_repository_registry import get_artifact_repository

    # before the tags, which tell whether it is still as it was written
    if version.description in (None, "", _summary(spec, version.tags, model)):
        new = _summary(spec, tags, model)
        run.client.update_model_version(version.name, version.version, new)
    missing = {k: value for k, value in run.origin.tags().items() if k not in version.tags}
    for key, value in {**missing, **tags}.items():
        run.client.set_model_version_tag(version.name, version.version, key, value)
    place = get_artifact_repository(version.source, tracking_uri=run.uri)
    with tempfile.TemporaryDirectory() as folder:
        for name in {CARD, GRID} & set(files):
            path = Path(folder) / name
            path.write_bytes(files[name])
            place.log_artifact(str(path))


def _summary(spec: ModelSpec, tags: Mapping[str, str], model: LoggedModel) -> str:
    page = f"#/experiments/{model.experiment_id}/models/{model.model_id}"
    figures = json.loads(tags.get(FIGURES_TAG, "{}"))
    return summary(spec, figures, f"[{model.name}]({page})")


def _create_model(client: MlflowClient, name: str) -> None:
    from mlflow.exceptions import MlflowException

    what = (
        f"Diffusion models. `ddpm serve {name}@ALIAS` serves the version that an alias points at."
    )
    try:
        client.create_registered_model(name, description=what)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
