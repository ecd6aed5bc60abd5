"""The MLflow run of a pipeline: one a training, whatever is killed and started again.

Only the driver writes to it. A run is found again by the id of the training it records, and a
metric is written only beyond the last step that is there, so a resumed training doubles no points.
"""

from __future__ import annotations

import contextlib
import io
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from PIL import Image

from pipeline import storage
from pipeline.errors import StorageError
from pipeline.registry.lock import SQLITE, lock_store

if TYPE_CHECKING:  # importing mlflow takes seconds, which `ddpm config` need not wait for
    from mlflow.tracking import MlflowClient

TRAIN_ID = "ddpm.train_id"


@contextlib.contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turn MLflow's errors into one sentence about the tracking URI."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise StorageError(f"MLflow at {uri} cannot be used: {_reason(uri, error)}") from error


def _reason(uri: str, error: Exception) -> str:
    """Why, and what helps where that is known."""
    text = str(error)
    if "Invalid Host header" in text:
        host = urlsplit(uri).netloc
        return f"it refuses the name {host}; start it with --allowed-hosts {host}"
    if "NewConnectionError" in text or "NameResolutionError" in text:
        return (
            "nothing answers there; start it (mlflow server), or set MLFLOW_TRACKING_URI to the "
            "server that is meant"
        )
    return first_line(error)


def first_line(error: Exception) -> str:
    """Of an error's message; MLflow's own may go on for a page."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def make_client(uri: str) -> MlflowClient:
    """A client of the tracking and registry store, its database made if it is new.

    The first use of a new sqlite file by two processes at once would fail, so each locks it.
    """
    with lock_store(uri), explained(uri):
        if uri.startswith(SQLITE):
            _make_database(Path(uri.removeprefix(SQLITE)))
        return _open(uri)


def _open(uri: str) -> MlflowClient:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    client.search_experiments(max_results=1)
    return client


def _make_database(path: Path) -> None:
    """A sqlite store that is there is whole: a process killed while MLflow makes its tables leaves
    a file that MLflow can neither use nor mend."""
    if path.exists():
        return
    new = path.with_name(f"{path.name}.new")
    for left in (new, new.with_name(f"{new.name}-journal")):
        left.unlink(missing_ok=True)
    _open(f"{SQLITE}{new}")
    new.rename(path)


def artifact_location(uri: str) -> str | None:
    """Where a new experiment's files go: beside a sqlite store, not in the working folder.

    A server has a place of its own for them: None.
    """
    return str(Path(uri.removeprefix(SQLITE)).parent / "mlruns") if uri.startswith(SQLITE) else None


def log_artifact(client: MlflowClient, run_id: str, folder: str, name: str, data: bytes) -> None:
    """Store a file with a run; for use within `explained`."""
    with tempfile.TemporaryDirectory() as temporary:
        path = Path(temporary) / name
        path.write_bytes(data)
        client.log_artifact(run_id, str(path), folder or None)


class TrackedRun:
    """The MLflow run that records one training, its evaluation and its registration."""

    def __init__(self, uri: str, experiment: str, train_id: str, params: dict[str, Any]) -> None:
        """Find the run of `train_id`, or create it with `params` (flat names, any values)."""
        from mlflow.entities import Param

        self.uri = uri
        self.client = make_client(uri)
        with lock_store(uri), explained(uri):
            experiment_id = self._experiment(experiment)
            runs = self.client.search_runs(
                [experiment_id], f"tags.`{TRAIN_ID}` = '{train_id}'", max_results=1
            )
            run = (
                runs[0]
                if runs
                else self.client.create_run(
                    experiment_id,
                    run_name=f"{experiment}-{train_id[:8]}",
                    tags={TRAIN_ID: train_id},
                )
            )
            self.run_id = str(run.info.run_id)
            self.client.update_run(self.run_id, status="RUNNING")
            if not run.data.params:  # its maker may have been killed before it came to them
                entries = [Param(name, str(value)) for name, value in params.items()]
                self.client.log_batch(self.run_id, params=entries)
        self._last_step: dict[str, int] = {}
        self._image_steps: dict[str, set[int]] = {}

    def _experiment(self, name: str) -> str:
        """The id of an experiment, which another process may be creating, too."""
        from mlflow.exceptions import MlflowException

        found = self.client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(self.client.create_experiment(name, artifact_location(self.uri)))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            found = self.client.get_experiment_by_name(name)
        return str(found.experiment_id)

    def log_history(self, records: list[dict[str, float]]) -> None:
        """Add records {step, name: value, ...}; what is there already is left as it is."""
        from mlflow.entities import Metric

        now = int(time.time() * 1000)
        new: dict[tuple[str, int], float] = {}  # a record may come twice, from before a restart
        for record in records:
            for name, value in record.items():
                if name != "step" and record["step"] > self._last(name):
                    new.setdefault((name, int(record["step"])), value)
        metrics = [Metric(name, value, now, step) for (name, step), value in new.items()]
        for start in range(0, len(metrics), 1000):  # MLflow's limit of one call
            batch = metrics[start : start + 1000]
            try:
                with explained(self.uri):
                    self.client.log_batch(self.run_id, metrics=batch)
            except StorageError:
                self._last_step.clear()  # it may have arrived, though no answer came: ask again
                raise
            for metric in batch:
                self._last_step[metric.key] = max(metric.step, self._last(metric.key))

    def log_figures(self, step: int, figures: dict[str, float]) -> None:
        """Add figures that a later evaluation of the same step may change; equal ones are kept."""
        with explained(self.uri):
            latest = self.client.get_run(self.run_id).data.metrics
            for name, value in figures.items():
                if latest.get(name) != value:
                    self.client.log_metric(self.run_id, name, value, step=step)

    def _last(self, name: str) -> int:
        from mlflow.exceptions import MlflowException

        if name not in self._last_step:
            with explained(self.uri):
                try:
                    history = self.client.get_metric_history(self.run_id, name)
                except MlflowException as error:
                    if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # as some stores say
                        raise
                    history = []
            self._last_step[name] = max((point.step for point in history), default=-1)
        return self._last_step[name]

    def image_steps(self, name: str) -> set[int]:
        """The steps of which the series `name` has an image."""
        if name not in self._image_steps:
            with explained(self.uri):
                entries = self.client.list_artifacts(self.run_id, "images")
            # MLflow names them images/NAME+step+STEP+timestamp+...
            marks = [entry.path.split("/")[-1].split("+") for entry in entries]
            self._image_steps[name] = {
                int(mark[2]) for mark in marks if len(mark) > 2 and mark[0] == name
            }
        return self._image_steps[name]

    def log_image(self, name: str, step: int, png: bytes) -> None:
        """Add an image to the series `name`, once a step."""
        if step not in self.image_steps(name):
            try:
                with explained(self.uri):
                    image = Image.open(io.BytesIO(png))
                    self.client.log_image(self.run_id, image, key=name, step=step)
            except StorageError:
                del self._image_steps[name]  # likewise
                raise
            self._image_steps[name].add(step)

    def log_artifact(self, folder: str, name: str, data: bytes) -> None:
        """Store a file with the run; the same name again replaces it."""
        with explained(self.uri):
            log_artifact(self.client, self.run_id, folder, name, data)

    def log_dataset(self, name: str, digest: str, source: str, facts: dict[str, Any]) -> None:
        """Record the ShardSet as the run's input."""
        from mlflow.entities import Dataset, DatasetInput, InputTag

        entry = Dataset(
            name=name,
            digest=digest[:36],
            source_type="local" if storage.local_path(source) else "uri",
            source=json.dumps({"uri": source}),
            profile=json.dumps(facts),
        )
        tags = [InputTag("mlflow.data.context", "training")]
        with explained(self.uri):
            self.client.log_inputs(self.run_id, datasets=[DatasetInput(entry, tags)])

    def set_tags(self, tags: dict[str, str]) -> None:
        from mlflow.entities import RunTag

        with explained(self.uri):
            entries = [RunTag(name, value) for name, value in tags.items()]
            self.client.log_batch(self.run_id, tags=entries)

    def finish(self, status: str = "FINISHED") -> None:
        """Close the run: FINISHED, FAILED or KILLED. It opens again when its training resumes."""
        with explained(self.uri):
            self.client.set_terminated(self.run_id, status)
