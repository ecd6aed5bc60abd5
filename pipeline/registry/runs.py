"""The MLflow run of a pipeline: one a training, whatever is killed and started again.

Only the driver writes to it. A run is found again by the id of the training it records, and a
metric is written only beyond the last step that is there, so a resumed training doubles no points.
What callers name as checkpoints do, `loss`, has its group in MLflow, `train/loss`: see names.py.
"""

from __future__ import annotations

import io
import json
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from pipeline import storage
from pipeline.errors import StorageError
from pipeline.registry.lock import lock_store
from pipeline.registry.names import grouped
from pipeline.registry.origin import NOTE, Origin
from pipeline.registry.store import artifact_location, explained, make_client

if TYPE_CHECKING:  # importing mlflow takes seconds, which `ddpm config` need not wait for
    from mlflow.entities import Metric, Run

TRAIN_ID = "ddpm.train_id"
EXPERIMENT_KIND = {"mlflow.experimentKind": "custom_model_development"}
"""Of an experiment: MLflow's pages open for the training of models, not for language models."""
MOST_METRICS = 1000
"""Of one call, MLflow's limit."""


class TrackedRun:
    """The MLflow run that records one training, its evaluation and its registration."""

    def __init__(
        self,
        uri: str,
        experiment: str,
        train_id: str,
        params: dict[str, Any],
        origin: Origin | None = None,
        note: str = "",
    ) -> None:
        """Find the run of `train_id`, or create it.

        Args:
            params: flat names, any values.
            origin: who makes it, if it is new.
            note: Markdown, what it is, for people.
        """
        self.uri, self.experiment = uri, experiment
        self.origin = origin or Origin()
        self._last_step: dict[str, int] = {}
        self._image_steps: dict[str, set[int]] = {}
        self.client = make_client(uri)
        with lock_store(uri), explained(uri):
            self.experiment_id = self._experiment()
            runs = self.client.search_runs(
                [self.experiment_id], f"tags.`{TRAIN_ID}` = '{train_id}'", max_results=1
            )
            run = (
                runs[0]
                if runs
                else self.client.create_run(
                    self.experiment_id,
                    run_name=f"{experiment}-{train_id[:8]}",
                    tags={TRAIN_ID: train_id},
                )
            )
            self.run_id = str(run.info.run_id)
            self.client.update_run(self.run_id, status="RUNNING")
            if NOTE not in run.data.tags:  # it is written last
                self._describe(run, params, note)

    def _experiment(self) -> str:
        """The id of the experiment, which another process may be creating, too."""
        from mlflow.exceptions import MlflowException

        name, client = self.experiment, self.client
        tags = {**EXPERIMENT_KIND, NOTE: f"Trainings of the diffusion model `{name}`, a run each."}
        found = client.get_experiment_by_name(name)
        if found is None:
            try:
                return str(client.create_experiment(name, artifact_location(self.uri), tags))
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            found = client.get_experiment_by_name(name)
        for key in tags.keys() - found.tags.keys():  # of before; a person may have changed it
            client.set_experiment_tag(found.experiment_id, key, tags[key])
        return str(found.experiment_id)

    def _describe(self, run: Run, params: dict[str, Any], note: str) -> None:
        """Write what the run lacks: its maker may have been killed before it came to it, or be of
        a version that knew no groups of figures and no tags of MLflow."""
        self.log_params(params)
        for name in run.data.metrics:
            if grouped(name) != name:
                points = self._points(name)
                self._log([_metric(grouped(name), p.value, p.timestamp, p.step) for p in points])
        tags = self.origin.tags() | {NOTE: note}
        self.set_tags({key: value for key, value in tags.items() if key not in run.data.tags})

    def log_history(self, records: list[dict[str, float]]) -> None:
        """Add records {step, name: value, ...}; what is there already is left as it is."""
        now = int(time.time() * 1000)
        new: dict[tuple[str, int], float] = {}  # a record may come twice, from before a restart
        for record in records:
            for plain, value in record.items():
                name = grouped(plain)
                if plain != "step" and record["step"] > self._last(name):
                    new.setdefault((name, int(record["step"])), value)
        self._log([_metric(name, value, now, step) for (name, step), value in new.items()])

    def log_figures(
        self,
        step: int,
        figures: Mapping[str, float],
        model_id: str | None = None,
        dataset: tuple[str, str] | None = None,
    ) -> None:
        """Add figures of a step, which a later evaluation may change; equal ones are kept.

        Args:
            model_id: of the logged model that they are figures of: it has them, too.
            dataset: name and digest of what they were measured on, see `log_dataset`.
        """
        now = int(time.time() * 1000)
        metrics = []
        for plain, value in figures.items():
            there = {p.timestamp: p.value for p in self._points(grouped(plain)) if p.step == step}
            last = max(there, default=0)
            # a point that is there is written again as it is, which adds none to the run: its
            # writer may have been killed before the logged model had it
            time_of = last if there.get(last) == value else max(now, last + 1)
            metrics.append(_metric(grouped(plain), value, time_of, step, model_id, dataset))
        self._log(metrics)

    def _log(self, metrics: list[Metric]) -> None:
        for start in range(0, len(metrics), MOST_METRICS):
            batch = metrics[start : start + MOST_METRICS]
            try:
                with explained(self.uri):
                    self.client.log_batch(self.run_id, metrics=batch)
            except StorageError:
                self._last_step.clear()  # it may have arrived, though no answer came: ask again
                raise
            for metric in batch:
                self._last_step[metric.key] = max(metric.step, self._last(metric.key))

    def _last(self, name: str) -> int:
        if name not in self._last_step:
            self._last_step[name] = max((point.step for point in self._points(name)), default=-1)
        return self._last_step[name]

    def _points(self, name: str) -> list[Metric]:
        from mlflow.exceptions import MlflowException

        with explained(self.uri):
            try:
                return list(self.client.get_metric_history(self.run_id, name))
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # as some stores say
                    raise
                return []

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
        with explained(self.uri), tempfile.TemporaryDirectory() as temporary:
            path = Path(temporary) / name
            path.write_bytes(data)
            self.client.log_artifact(self.run_id, str(path), folder or None)

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

    def set_tags(self, tags: Mapping[str, str]) -> None:
        from mlflow.entities import RunTag

        with explained(self.uri):
            entries = [RunTag(name, value) for name, value in tags.items()]
            self.client.log_batch(self.run_id, tags=entries)

    def log_params(self, params: Mapping[str, Any]) -> None:
        """Add parameters; of those that are there the first value stays, as MLflow has it."""
        from mlflow.entities import Param

        with explained(self.uri):
            known = self.client.get_run(self.run_id).data.params
            new = [Param(name, str(value)) for name, value in params.items() if name not in known]
            self.client.log_batch(self.run_id, params=new)

    def finish(self, status: str = "FINISHED") -> None:
        """Close the run: FINISHED, FAILED or KILLED. It opens again when its training resumes."""
        with explained(self.uri):
            self.client.set_terminated(self.run_id, status)


def _metric(
    name: str,
    value: float,
    timestamp: int,
    step: int,
    model_id: str | None = None,
    dataset: tuple[str, str] | None = None,
) -> Metric:
    from mlflow.entities import Metric

    set_name, set_digest = dataset or (None, None)
    return Metric(name, value, timestamp, step, model_id, set_name, set_digest)
