"""MLflow: one run a training, one version a content, and sentences when something is not there."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from safetensors.torch import save as save_tensors

from pipeline.errors import CorruptArtifact, ModelNotFound, RequestError, StorageError
from pipeline.registry.models import (
    ModelReference,
    find_version,
    load_model,
    model_files,
    parse_reference,
    read_tag,
    register,
    resolve,
    set_alias,
)
from pipeline.registry.runs import TrackedRun
from pipeline.serving.engine import ImageRequest
from tests.test_engine import SETTINGS, alone, make_model


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture(scope="module", autouse=True)
def _artifacts_elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """MLflow puts artifacts into ./mlruns of the working folder, which is not that of the store."""
    with contextlib.chdir(tmp_path_factory.mktemp("elsewhere")):
        yield


def files(name: str = "a") -> dict[str, bytes]:
    model = make_model([name, "b", "c"])
    return model_files(model.spec, save_tensors(model.network.state_dict()), {"train_id": "t"})


@pytest.fixture(scope="module")
def champion(uri: str) -> ModelReference:
    reference = register(TrackedRun(uri, "shapes", "t1", {"lr": 1}), "shapes", files(), {"x": "y"})
    set_alias(reference, "champion")
    return reference


def test_a_run_is_found_again_and_points_are_not_doubled(uri: str) -> None:
    first = TrackedRun(uri, "exp", "train-1", {"training.lr": 0.1})
    first.log_history([{"step": s, "loss": 1 / s} for s in (5, 10, 15)])
    first.log_image("samples", 10, _png())
    # another process, which resumed from step 10 and logs 15 again
    again = TrackedRun(uri, "exp", "train-1", {"training.lr": 0.2})
    assert again.run_id == first.run_id
    again.log_history([{"step": s, "loss": 1 / s} for s in (15, 20)])
    assert again.image_steps("samples") == {10}
    again.log_image("samples", 10, _png())
    again.log_image("samples", 20, _png())
    history = again.client.get_metric_history(again.run_id, "loss")
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
    from mlflow.tracking import MlflowClient

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
    history = run.client.get_metric_history(run.run_id, "loss")
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
    from mlflow.tracking import MlflowClient

    run = TrackedRun(uri, "exp", "train-6", {})
    run.log_history([{"step": 1, "loss": 1.0}])
    run.log_image("samples", 1, _png())
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
                    run.log_image("samples", 2, _png())
    run.log_history([{"step": 2, "loss": 0.5}])
    run.log_image("samples", 2, _png())
    history = run.client.get_metric_history(run.run_id, "loss")
    assert [(point.step, point.value) for point in history] == [(1, 1.0), (2, 0.5)]
    images = [entry.path for entry in run.client.list_artifacts(run.run_id, "images")]
    assert sum(path.endswith(".png") for path in images) == 2


def test_figures_follow_the_newest_evaluation(uri: str) -> None:
    run = TrackedRun(uri, "exp", "train-3", {})
    for value in (0.5, 0.5, 0.9):
        run.log_figures(60, {"class_accuracy": value})
    history = run.client.get_metric_history(run.run_id, "class_accuracy")
    assert [point.value for point in history] == [0.5, 0.9]
    assert run.client.get_run(run.run_id).data.metrics["class_accuracy"] == 0.9


def test_parameters_are_written_by_whoever_comes_after_a_killed_maker(
    uri: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from mlflow.tracking import MlflowClient

    class Killed(BaseException):
        pass

    def kill(*_: object, **__: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "log_batch", kill)
        with pytest.raises(Killed):
            TrackedRun(uri, "exp", "train-4", {"a": 1})
    again = TrackedRun(uri, "exp", "train-4", {"a": 1})
    assert again.client.get_run(again.run_id).data.params == {"a": "1"}


def test_artifacts_lie_beside_a_sqlite_store(uri: str, champion: ModelReference) -> None:
    folder = Path(uri.removeprefix("sqlite:///")).parent
    assert list((folder / "mlruns").rglob("weights.safetensors"))
    assert list(Path.cwd().iterdir()) == []


def _png() -> bytes:
    from pipeline.data.images import png

    return png(np.zeros((8, 8, 1), np.uint8))


def test_the_same_content_twice_is_one_version(uri: str, champion: ModelReference) -> None:
    run = TrackedRun(uri, "shapes", "t1", {})
    assert register(run, "shapes", files(), {"ddpm.new": "1"}) == champion
    assert read_tag(champion, "ddpm.new") == "1", "what was learned since is written to it"
    other = register(run, "shapes", files("z"), {})
    assert int(other.version) == int(champion.version) + 1
    assert find_version("shapes", champion.digest, uri) == champion
    assert find_version("shapes", "no such digest", uri) is None


@pytest.mark.parametrize(
    "text", ["shapes@champion", "shapes@1", "models:/shapes@champion", "models:/shapes/1"]
)
def test_a_model_is_found_by_alias_and_version(
    uri: str, champion: ModelReference, text: str
) -> None:
    assert resolve(text, uri) == champion


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("nothing@champion", "there is no model 'nothing' in the registry at sqlite"),
        ("shapes@99", "model 'shapes' has no version or alias '99': versions 1"),
        ("shapes@best", "no version or alias 'best': versions .*; aliases champion"),
        ("shapes", "does not name a model: write NAME@ALIAS"),
        ("a@b@c", "does not name a model"),
        ("", "does not name a model"),
    ],
)
def test_a_model_that_is_not_there_is_named(
    uri: str, champion: ModelReference, text: str, sentence: str
) -> None:
    with pytest.raises(ModelNotFound, match=sentence):
        resolve(text, uri)


def test_parse_reference() -> None:
    assert parse_reference("digits@champion") == ("digits", "champion")
    assert parse_reference("models:/digits/7") == ("digits", "7")


def test_a_registered_model_is_the_model_that_was_registered(
    uri: str, champion: ModelReference
) -> None:
    model = load_model(champion.uri, uri)
    original = make_model(["a", "b", "c"])
    assert model.digest == champion.digest
    assert model.spec == original.spec
    request = ImageRequest(0, 0, 1, SETTINGS[1])
    assert np.array_equal(alone(model, request), alone(original, request))


def test_damaged_weights_are_refused(tmp_path: Path) -> None:
    for name, data in files().items():
        damaged = data[:-1] + bytes([data[-1] ^ 1]) if name.endswith(".safetensors") else data
        (tmp_path / name).write_bytes(damaged)
    with pytest.raises(CorruptArtifact, match="weights.safetensors does not match"):
        load_model(str(tmp_path))
    with pytest.raises(ModelNotFound, match="holds neither"):
        load_model(str(tmp_path / "nowhere"))


def test_mlflow_loads_and_predicts(
    uri: str, champion: ModelReference, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    monkeypatch.setenv(
        "MLFLOW_TRACKING_URI", uri
    )  # what mlflow.set_tracking_uri does, undone after
    loaded = mlflow.pyfunc.load_model("models:/shapes@champion")
    request = {"n": 3, "seed": 5, "label": 1, "sampler": "ddim", "steps": 5}
    images = loaded.predict(request)
    assert (images.shape, images.dtype) == ((3, 8, 8, 1), np.uint8)
    wanted = [
        alone(make_model(["a", "b", "c"]), ImageRequest(5, i, 1, SETTINGS[0])) for i in range(3)
    ]
    assert np.array_equal(images, np.stack(wanted))
    rows = pd.DataFrame([{"n": 2, "seed": 5, "label": 1, "steps": 5}, {"seed": 6, "steps": 5}])
    table = loaded.predict(rows)
    assert table.shape == (3, 8, 8, 1)
    assert np.array_equal(table[:2], images[:2])
    for wrong, sentence in (
        ({"step": 5}, "'step' is not one of"),
        ({"n": 0}, "n: Input should be greater than or equal to 1"),
        ({"n": "3"}, "n: Input should be a valid integer"),
        ({"n": 2.5}, "n: Input should be a valid integer"),
        ({"seed": -1}, "seed: Input should be greater"),
        ({"steps": 5000}, "steps=5000 must be from 1 to the model's 1000"),
        ([1, 2], "takes a dict or a DataFrame"),
        ({"label": 9}, "label=9 is not a class"),
        ({"sampler": "magic"}, "sampler: Input should be"),
    ):
        with pytest.raises(RequestError, match=sentence):
            loaded.predict(wrong)


def test_a_store_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be used|cannot write"):
        TrackedRun(f"sqlite:///{tmp_path}/file/mlflow.db", "e", "t", {})
    (tmp_path / "no.db").write_bytes(b"this is not a database, but long enough to look at" * 9)
    with pytest.raises(StorageError, match="MLflow at sqlite.* cannot be used"):
        TrackedRun(f"sqlite:///{tmp_path}/no.db", "e", "t", {})
