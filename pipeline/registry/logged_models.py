"""Logged models: MLflow's record of a model and its figures, before and after it is registered.

One content (see folder.model_digest) is one logged model of an experiment, whoever logs it and
however often. That of a checkpoint is external, as MLflow calls it: it has its figures there, and
its weights stay in the storage. Registering puts the model's folder into it.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.registry.lock import lock_store
from pipeline.registry.origin import NOTE
from pipeline.registry.runs import TrackedRun
from pipeline.registry.signature import with_identity
from pipeline.registry.store import explained
from pipeline.registry.versions import DIGEST_TAG

if TYPE_CHECKING:  # importing mlflow takes seconds
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

MODEL_TYPE = "diffusion"
EXTERNAL_TAG = "mlflow.model.isExternal"
VERSIONS_TAG = "mlflow.modelVersions"
"""Of a logged model, the versions made from it: MLflow's pages show them, and only its server
writes it by itself."""


def log_model(
    run: TrackedRun,
    name: str,
    digest: str,
    step: int,
    params: Mapping[str, Any] | None = None,
    note: str = "",
) -> str:
    """Find the logged model of a content, or make it; returns its id. It is an output of the run.

    Args:
        name: for people, if it is new.
        step: of the training that gave it.
        params: beside those of the run.
        note: Markdown, what it is, for people.

    Raises:
        StorageError: MLflow cannot be used.
    """
    from mlflow.entities import LoggedModelOutput

    client = run.client
    with lock_store(run.uri), explained(run.uri):
        recorded = client.get_run(run.run_id)
        model = find_model(run, digest)
        if model is None:
            tags = {DIGEST_TAG: digest, EXTERNAL_TAG: "true", NOTE: note}
            own = {name: str(value) for name, value in (params or {}).items()}
            model = client.create_logged_model(
                run.experiment_id,
                name.replace(".", "_"),  # MLflow takes no dot in it
                run.run_id,
                run.origin.tags() | tags,
                recorded.data.params | own,
                MODEL_TYPE,
            )
        if str(model.status) != "READY":
            client.finalize_logged_model(model.model_id, "READY")
        outputs = recorded.outputs.model_outputs if recorded.outputs else []
        if model.model_id not in {output.model_id for output in outputs}:
            client.log_outputs(run.run_id, [LoggedModelOutput(model.model_id, step)])
    return str(model.model_id)


def find_model(run: TrackedRun, digest: str) -> LoggedModel | None:
    """The logged model of a content in the run's experiment; for use within `explained`.

    Of several, which two runs that met on a server may have made, the oldest.
    """
    found = run.client.search_logged_models(
        [run.experiment_id], f"tags.`{DIGEST_TAG}` = '{digest}'"
    )
    return min(found, key=lambda model: (model.creation_timestamp, model.model_id), default=None)


def fill_model(run: TrackedRun, model: LoggedModel, files: Mapping[str, bytes]) -> None:
    """Put a model's files into its logged model, once; for use within `explained`."""
    if model.tags.get(EXTERNAL_TAG) != "true":
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, data in files.items():
            if name == "MLmodel":
                data = with_identity(data, model.model_id, run.run_id)
            (Path(folder) / name).write_bytes(data)
        run.client.log_model_artifacts(model.model_id, folder)
    run.client.set_logged_model_tags(model.model_id, {EXTERNAL_TAG: "false"})  # last: all is there


def link_version(run: TrackedRun, model: LoggedModel, version: ModelVersion) -> None:
    """Let a logged model know of a version of its content; for use within `explained`."""
    known = json.loads(model.tags.get(VERSIONS_TAG, "[]"))
    entry = {"name": version.name, "version": str(version.version)}
    if entry not in [{**each, "version": str(each["version"])} for each in known]:
        run.client.set_logged_model_tags(
            model.model_id, {VERSIONS_TAG: json.dumps([*known, entry])}
        )
