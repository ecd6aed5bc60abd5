"""The MLflow run of a training: found again, told to people, with figures in groups."""

from typing import Any

import numpy as np
import pytest
from mlflow.entities import Metric
from mlflow.tracking import MlflowClient

from pipeline.data.images import png
from pipeline.errors import StorageError
from pipeline.registry.names import grouped
from pipeline.registry.origin import NOTE, Origin
from pipeline.registry.runs import TRAIN_ID, TrackedRun
from pipeline.registry.store import make_client


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


class Killed(BaseException):
    """What ends a process in the middle of a call."""


def kill(*_: object, **__: object) -> None:
    raise Killed


def kill_after(calls: int, method: str, patch: pytest.MonkeyPatch) -> None:
    """End the process in a method of MLflow's client, once it has done so many calls of it."""
    real, done = getattr(MlflowClient, method), []

    def call(*args: Any, **values: Any) -> Any:
        if len(done) == calls:
            raise Killed
        done.append(method)
        return real(*args, **values)

    patch.setattr(MlflowClient, method, call)


def points(run: TrackedRun, name: str) -> list[tuple[int, float]]:
    found = run.client.get_metric_history(run.run_id, name)
    return [(point.step, point.value) for point in found]


def test_a_run_is_found_again_and_points_are_not_doubled(uri: str) -> None:
    first = TrackedRun(uri, "exp", "train-1", {"training.lr": 0.1})
    first.log_history([{"step": s, "loss": 1 / s} for s in (5, 10, 15)])
    first.log_image("samples", 10, png(np.zeros((8, 8, 1), np.uint8)))
    # another process, which resumed from step 10 and logs 15 again
    again = TrackedRun(uri, "exp", "train-1", {"training.lr": 0.2})
    assert again.run_id == first.run_id
    again.log_history([{"step": s, "loss": 1 / s} for s in (15, 20)])
    assert again.image_steps("samples") == {10}
    again.log_image("samples", 10, png(np.zeros((8, 8, 1), np.uint8)))
    again.log_image("samples", 20, png(np.zeros((8, 8, 1), np.uint8)))
    history = again.client.get_metric_history(again.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(s, 1 / s) for s in (5, 10, 15, 20)]
    images = [e.path for e in again.client.list_artifacts(again.run_id, "images")]
    assert sum(path.endswith(".png") for path in images) == 2
    assert again.client.get_run(again.run_id).data.params == {"training.lr": "0.1"}
    assert TrackedRun(uri, "exp", "train-2", {}).run_id != first.run_id
    again.finish()
    assert again.client.get_run(again.run_id).info.status == "FINISHED"


def test_what_a_store_that_was_away_did_not_take_is_logged_later(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.exceptions import MlflowException

    run = TrackedRun(uri, "exp", "train-5", {})
    run.log_history([{"step": 1, "loss": 1.0}])

    def away(*_: object, **__: object) -> None:
        raise MlflowException("connection refused")

    for method in ("log_batch", "get_metric_history"):
        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, method, away)
            with pytest.raises(StorageError, match="cannot be used: connection refused"):
                run.log_history([{"step": s, "loss": 0.5, method: 2.0} for s in (1, 2, 3)])
    # what is logged then holds some of it twice, since a worker that starts again sends it again
    run.log_history([{"step": s, "loss": 0.5} for s in (2, 3, 2, 3, 4)])
    history = run.client.get_metric_history(run.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [
        (1, 1.0),
        (2, 0.5),
        (3, 0.5),
        (4, 0.5),
    ]


def test_what_arrived_without_an_answer_is_not_logged_twice(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.exceptions import MlflowException

    run = TrackedRun(uri, "exp", "train-6", {})
    run.log_history([{"step": 1, "loss": 1.0}])
    run.log_image("samples", 1, png(np.zeros((8, 8, 1), np.uint8)))
    for name in ("log_batch", "log_image"):
        call = getattr(MlflowClient, name)

        def unanswered(*args: object, call: Any = call, **values: object) -> None:
            call(*args, **values)
            raise MlflowException("the connection was cut")

        with monkeypatch.context() as cut:
            cut.setattr(MlflowClient, name, unanswered)
            with pytest.raises(StorageError, match="the connection was cut"):
                if name == "log_batch":
                    run.log_history([{"step": 2, "loss": 0.5}])
                else:
                    run.log_image("samples", 2, png(np.zeros((8, 8, 1), np.uint8)))
    run.log_history([{"step": 2, "loss": 0.5}])
    run.log_image("samples", 2, png(np.zeros((8, 8, 1), np.uint8)))
    history = run.client.get_metric_history(run.run_id, "train/loss")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 0.5)]
    images = [entry.path for entry in run.client.list_artifacts(run.run_id, "images")]
    assert sum(path.endswith(".png") for path in images) == 2


def test_figures_follow_the_newest_evaluation(uri: str) -> None:
    run = TrackedRun(uri, "exp", "train-3", {})
    for value in (0.5, 0.5, 0.9):
        run.log_figures(60, {"class_accuracy": value})
    history = run.client.get_metric_history(run.run_id, "eval/class_accuracy")
    assert [point.value for point in history] == [0.5, 0.9]
    assert run.client.get_run(run.run_id).data.metrics["eval/class_accuracy"] == 0.9


def test_parameters_are_written_by_whoever_comes_after_a_killed_maker(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", kill)
        with pytest.raises(Killed):
            TrackedRun(uri, "exp", "train-4", {"a": 1})
    again = TrackedRun(uri, "exp", "train-4", {"a": 1})
    assert again.client.get_run(again.run_id).data.params == {"a": "1"}


# --- what MLflow's pages show -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("loss", "train"),
        ("loss_quartile_4", "train"),
        ("lr", "train"),
        ("grad_norm", "train"),
        ("images_per_second", "speed"),
        ("images_per_second_per_worker", "speed"),
        ("utilisation", "speed"),
        ("data_wait", "speed"),
        ("holdout_loss", "eval"),
        ("bits_per_dim_elbo", "eval"),
        ("fd_cnn_digits", "eval"),
        ("inception_score", "eval"),
    ],
)
def test_a_figure_has_its_group_before_it(name: str, group: str) -> None:
    assert grouped(name) == f"{group}/{name}"
    assert grouped(grouped(name)) == grouped(name)


def test_a_small_evaluation_is_a_group_of_its_own() -> None:
    assert grouped("fd_cnn_digits_n200") == "eval_n200/fd_cnn_digits"
    assert grouped("system/cpu_utilization_percentage") == "system/cpu_utilization_percentage"


def test_the_watched_figures_of_a_training_are_no_evaluation() -> None:
    """Every name that a training logs has its group, also one that comes to it later."""
    import torch

    from pipeline.training.loop import StepRecord
    from pipeline.training.watch import Watch

    watch = Watch(2, 1.0, 1.0, may_overflow=False)
    one = torch.ones(())
    watch.add(StepRecord(1, one, one, torch.ones(4, 2), lr=0.1, waited=0.0))
    figures, _ = watch.take()
    groups = {grouped(name).split("/")[0] for name in figures}
    assert groups == {"train", "speed", "system"}


def test_the_experiment_is_one_of_model_training(uri: str) -> None:
    first = TrackedRun(uri, "kinds", "t", {})
    client = first.client
    tags = client.get_experiment(first.experiment_id).tags
    assert tags["mlflow.experimentKind"] == "custom_model_development"
    assert "`kinds`" in tags[NOTE]
    client.set_experiment_tag(first.experiment_id, "mlflow.experimentKind", "genai_development")
    client.set_experiment_tag(first.experiment_id, NOTE, "mine")
    TrackedRun(uri, "kinds", "u", {})
    tags = client.get_experiment(first.experiment_id).tags
    assert tags["mlflow.experimentKind"] == "genai_development", "as a person has set it"
    assert tags[NOTE] == "mine"


def test_an_experiment_of_before_learns_its_kind(uri: str) -> None:
    client = make_client(uri)
    made = client.create_experiment("old")
    run = TrackedRun(uri, "old", "t", {})
    assert run.experiment_id == made
    assert client.get_experiment(made).tags["mlflow.experimentKind"] == "custom_model_development"


def test_a_run_says_who_made_it_from_what(uri: str) -> None:
    ann = Origin("configs/shapes.yaml", "JOB", "ann", "c0ffee")
    run = TrackedRun(uri, "origins", "t", {}, ann, "Training of shapes")
    wanted = {
        "mlflow.user": "ann",
        "mlflow.source.name": "configs/shapes.yaml",
        "mlflow.source.type": "JOB",
        "mlflow.source.git.commit": "c0ffee",
        NOTE: "Training of shapes",
    }
    tags = run.client.get_run(run.run_id).data.tags
    assert wanted.items() <= tags.items()
    run.set_tags({NOTE: "worth a look"})
    again = TrackedRun(uri, "origins", "t", {}, Origin("other.yaml", user="bob"), "anything")
    tags = run.client.get_run(again.run_id).data.tags
    assert (tags["mlflow.user"], tags[NOTE]) == ("ann", "worth a look")


def test_the_user_is_by_default_who_runs_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOGNAME", "carol")
    assert Origin().tags() == {
        "mlflow.user": "carol",
        "mlflow.source.name": "ddpm",
        "mlflow.source.type": "LOCAL",
    }


def test_parameters_are_added_and_never_changed(uri: str) -> None:
    run = TrackedRun(uri, "exp", "train-7", {"lr": 0.1})
    for precision in ("bfloat16", "float32"):
        run.log_params({"precision": precision, "lr": 0.2})
    params = run.client.get_run(run.run_id).data.params
    assert params == {"lr": "0.1", "precision": "bfloat16"}


def test_a_run_of_before_goes_on_with_whole_curves(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its figures had no groups, and it had no tags of MLflow's; they are added once."""
    client = make_client(uri)
    experiment = client.create_experiment("before")
    old = client.create_run(experiment, tags={TRAIN_ID: "t"}).info.run_id
    wanted = {
        "loss": ("train/loss", [(5, 0.5), (10, 0.25)]),
        "holdout_loss": ("eval/holdout_loss", [(10, 0.75)]),
        "fd_x_n200": ("eval_n200/fd_x", [(10, 9.0)]),
    }
    for name, (_, values) in wanted.items():
        client.log_batch(old, [Metric(name, value, 1000 + step, step) for step, value in values])
    for name in ("log_batch", "get_metric_history"):  # it is killed on the way
        with monkeypatch.context() as patch, pytest.raises(Killed):
            kill_after(1, name, patch)
            TrackedRun(uri, "before", "t", {})
    for _ in range(2):
        run = TrackedRun(uri, "before", "t", {}, Origin(user="ann"))
        assert run.run_id == old
        for name, (new, values) in wanted.items():
            assert points(run, name) == points(run, new) == values
    run.log_history([{"step": step, "loss": 1 / step} for step in (10, 15)])
    assert points(run, "train/loss") == [(5, 0.5), (10, 0.25), (15, 1 / 15)]
    assert client.get_run(old).data.tags["mlflow.user"] == "ann"
