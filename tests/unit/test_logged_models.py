"""Logged models: a content is one, with its figures, linked to its run, data and version."""

import contextlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow.entities import LoggedModel

from pipeline.loading import load_model
from pipeline.registry.folder import CARD
from pipeline.registry.logged_models import EXTERNAL_TAG, VERSIONS_TAG, log_model
from pipeline.registry.origin import Origin
from pipeline.registry.registration import register
from pipeline.registry.runs import TrackedRun
from pipeline.registry.versions import DIGEST_TAG, FIGURES_TAG
from tests.unit.test_registry import files
from tests.unit.test_runs import Killed, kill_after, points


@pytest.fixture(scope="module")
def uri(tmp_path_factory: pytest.TempPathFactory) -> str:
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture(scope="module", autouse=True)
def _elsewhere(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing may depend on the working folder, nor on the process's own tracking URI."""
    with contextlib.chdir(tmp_path_factory.mktemp("elsewhere")):
        yield
        assert list(Path.cwd().iterdir()) == []


@pytest.fixture
def start(uri: str, request: pytest.FixtureRequest) -> Callable[[], TrackedRun]:
    """Start the process of a training again: an experiment of the test's own, one run."""
    return lambda: TrackedRun(uri, request.node.name, "t", {"lr": 1}, Origin(user="ann"))


def models_of(run: TrackedRun) -> list[LoggedModel]:
    """Those that the pages of its run list, by step."""
    found = run.client.search_logged_models([run.experiment_id])
    outputs = run.client.get_run(run.run_id).outputs.model_outputs
    steps = {output.model_id: output.step for output in outputs}
    assert len(steps) == len(outputs) == len(found)
    return sorted(found, key=lambda model: steps[model.model_id])


def digest_of(content: dict[str, bytes]) -> str:
    return str(json.loads(content["model.json"])["digest"])


def test_a_checkpoint_is_a_logged_model_with_its_figures(start: Callable[[], TrackedRun]) -> None:
    run = start()
    for step in (20, 40):
        model_id = log_model(run, f"shapes-step-{step}", f"d{step}", step, {"step": step})
        run.log_figures(step, {"eval/fd": 100 / step}, model_id, ("shapes", "data-1"))
    first, second = models_of(run)
    assert (first.name, first.params) == ("shapes-step-20", {"lr": "1", "step": "20"})
    assert first.source_run_id == run.run_id
    assert str(first.status) == "READY"
    for model, step in ((first, 20), (second, 40)):
        ((figure),) = model.metrics
        assert (figure.key, figure.value, figure.step) == ("eval/fd", 100 / step, step)
        assert (figure.dataset_name, figure.dataset_digest) == ("shapes", "data-1")
        assert figure.run_id == run.run_id
    assert points(run, "eval/fd") == [(20, 5.0), (40, 2.5)]
    ranked = run.client.search_logged_models([run.experiment_id], "metrics.`eval/fd` < 3")
    assert [model.name for model in ranked] == ["shapes-step-40"]
    assert run.client.list_logged_model_artifacts(first.model_id) == [], "its weights lie elsewhere"


@pytest.mark.parametrize(
    "method", ["create_logged_model", "finalize_logged_model", "log_outputs", "log_batch"]
)
@pytest.mark.parametrize("after", [0, 1])
def test_a_checkpoint_that_is_logged_again_after_a_kill_is_one(
    start: Callable[[], TrackedRun], monkeypatch: pytest.MonkeyPatch, method: str, after: int
) -> None:
    def log(run: TrackedRun) -> None:
        for step in (20, 40):
            model_id = log_model(run, f"step-{step}", f"d{step}", step)
            run.log_figures(step, {"eval/fd": 100 / step}, model_id, ("shapes", "data-1"))

    run = start()
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(after, method, patch)
        log(run)
    for _ in range(2):
        log(start())
    assert [model.name for model in models_of(run)] == ["step-20", "step-40"]
    assert [len(model.metrics) for model in models_of(run)] == [1, 1]
    assert points(run, "eval/fd") == [(20, 5.0), (40, 2.5)]


def test_a_figure_that_only_the_run_had_is_given_to_the_model(
    start: Callable[[], TrackedRun],
) -> None:
    """MLflow writes a point to the run before it does to the model, so a kill may come between."""
    run = start()
    run.log_figures(20, {"eval/fd": 5.0})
    model_id = log_model(run, "step-20", "d20", 20)
    run.log_figures(20, {"eval/fd": 5.0}, model_id)
    assert points(run, "eval/fd") == [(20, 5.0)]
    assert [figure.value for figure in models_of(run)[0].metrics] == [5.0]
    run.log_figures(20, {"eval/fd": 4.0}, model_id)  # evaluated otherwise
    assert points(run, "eval/fd") == [(20, 5.0), (20, 4.0)]
    assert run.client.get_run(run.run_id).data.metrics["eval/fd"] == 4.0


def test_a_version_is_made_from_the_logged_model_of_its_content(
    start: Callable[[], TrackedRun], uri: str
) -> None:
    run, content = start(), files()
    model_id = log_model(run, "shapes-step-40", digest_of(content), 40)
    figures = {"fd": {"value": 5.0, "interval": [4.0, 6.0], "n": 100, "better": "lower"}}
    tags = {FIGURES_TAG: json.dumps(figures)}
    reference = register(run, "from_logged", content, tags)
    (model,) = models_of(run)
    assert model.model_id == model_id
    assert model.tags[EXTERNAL_TAG] == "false"
    assert json.loads(model.tags[VERSIONS_TAG]) == [{"name": "from_logged", "version": "1"}]

    version = run.client.get_model_version("from_logged", "1")
    assert version.source == model.artifact_location
    assert version.run_id == run.run_id
    assert version.tags["mlflow.user"] == "ann"
    assert version.tags[DIGEST_TAG] == reference.digest
    assert "grey images of 8x8 pixels of 3 classes" in version.description
    assert "| `fd` | 5 [4, 6] | 100 | lower |" in version.description
    assert load_model(reference.uri, uri).digest == reference.digest

    folder = Path(model.artifact_location)
    assert {
        path.name: path.read_bytes() for path in folder.iterdir() if path.name != "MLmodel"
    } == {name: data for name, data in content.items() if name != "MLmodel"}
    described = yaml.safe_load((folder / "MLmodel").read_text())
    assert (described["model_id"], described["run_id"]) == (model_id, run.run_id)
    store = Path(uri.removeprefix("sqlite:///")).parent
    copies = [
        path for path in store.rglob("*.safetensors") if path.read_bytes() == content[path.name]
    ]
    assert copies == [folder / "weights.safetensors"]


@pytest.mark.parametrize(
    ("method", "after"),
    [
        ("create_logged_model", 0),
        ("log_outputs", 0),
        ("log_model_artifacts", 0),
        ("set_logged_model_tags", 0),
        ("create_registered_model", 0),
        ("create_model_version", 0),
        ("set_logged_model_tags", 1),
    ],
)
def test_a_registration_killed_anywhere_ends_as_one_model_and_one_version(
    start: Callable[[], TrackedRun],
    uri: str,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    method: str,
    after: int,
) -> None:
    name = f"killed-{method}-{after}"
    content = files(name)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        kill_after(after, method, patch)
        register(start(), name, content, {})
    references = {register(start(), name, content, {}) for _ in range(2)}
    assert [reference.version for reference in references] == ["1"]
    run = start()
    (model,) = models_of(run)
    assert model.tags[EXTERNAL_TAG] == "false"
    assert json.loads(model.tags[VERSIONS_TAG]) == [{"name": name, "version": "1"}]
    assert load_model(f"models:/{name}/1", uri).digest == digest_of(content)


def test_what_a_person_wrote_of_a_version_stays(start: Callable[[], TrackedRun]) -> None:
    run, content = start(), files("described")

    def describe(value: float) -> Any:
        figures = {"fd": {"value": value, "interval": None, "n": 9, "better": "lower"}}
        register(run, "described", content, {FIGURES_TAG: json.dumps(figures)})
        return run.client.get_model_version("described", "1").description

    assert "| `fd` | 5 |" in describe(5.0)
    assert "| `fd` | 4 |" in describe(4.0)
    run.client.update_model_version("described", "1", "my favourite")
    assert describe(3.0) == "my favourite"


def test_a_version_of_before_keeps_its_files_where_they_are(
    start: Callable[[], TrackedRun], uri: str
) -> None:
    """It was made from a folder of the run; what is learned of it since goes there."""
    run, content = start(), files("before")
    digest = digest_of(content)
    for name, data in content.items():
        run.log_artifact(f"model/{digest}", name, data)
    run.client.create_registered_model("before")
    source = f"runs:/{run.run_id}/model/{digest}"
    run.client.create_model_version("before", source, run.run_id, {DIGEST_TAG: digest})
    reference = register(run, "before", content | {CARD: b"another evaluation"}, {"ddpm.new": "1"})
    assert (reference.version, load_model(reference.uri, uri).digest) == ("1", digest)
    (card,) = Path(uri.removeprefix("sqlite:///")).parent.rglob(f"{digest}/{CARD}")
    assert card.read_bytes() == b"another evaluation"
    (model,) = models_of(run)
    assert model.tags[EXTERNAL_TAG] == "true", "it has the figures, and no second copy of weights"
    assert json.loads(model.tags[VERSIONS_TAG]) == [{"name": "before", "version": "1"}]


def test_two_runs_of_one_content_have_one_logged_model(uri: str) -> None:
    runs = [TrackedRun(uri, "shared", train_id, {}) for train_id in ("a", "b")]
    ids = {log_model(run, "shapes", "d", 40) for run in runs}
    assert len(ids) == 1
    for run in runs:
        outputs = run.client.get_run(run.run_id).outputs.model_outputs
        assert {output.model_id for output in outputs} == ids
