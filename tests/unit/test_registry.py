"""MLflow: one run a training, one version a content, and sentences when something is not there."""

import contextlib
import json
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import yaml
from safetensors.torch import save as save_tensors

from pipeline.errors import CorruptArtifact, ModelNotFound, RequestError, StorageError
from pipeline.loading import load_model
from pipeline.registry.aliases import history, promote
from pipeline.registry.folder import model_digest, model_files
from pipeline.registry.registration import register
from pipeline.registry.runs import TrackedRun
from pipeline.registry.store import make_client
from pipeline.registry.versions import (
    DIGEST_TAG,
    ModelReference,
    check_name,
    find_version,
    look,
    parse_reference,
    read_tag,
    resolve,
)
from pipeline.serving.engine import ImageRequest
from tests.unit.test_engine import SETTINGS, alone, make_model


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


def files_of(reference: ModelReference) -> Path:
    """Where the files of a version lie."""
    client = make_client(reference.tracking_uri)
    return Path(client.get_model_version(reference.name, reference.version).source)


@pytest.fixture(scope="module")
def champion(uri: str) -> ModelReference:
    reference = register(TrackedRun(uri, "shapes", "t1", {"lr": 1}), "shapes", files(), {"x": "y"})
    promote(reference, "champion")
    return reference


def test_artifacts_lie_beside_a_sqlite_store(uri: str, champion: ModelReference) -> None:
    folder = Path(uri.removeprefix("sqlite:///")).parent
    assert list((folder / "mlruns").rglob("weights.safetensors"))
    assert list(Path.cwd().iterdir()) == []


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


UNTHINKABLE = [
    *("..@1", ".@1", "..a@1", " @1", "\ud800@1", "a\nb@1", "a\x00@1", "a@\u0661", "a@1\n"),
    *("../../etc/passwd@1", "file:///etc/passwd@1", "s3://bucket@1", "models:/../x@1"),
    *("a" * 257 + "@1", "a" * 60_000, "a@" + "1" * 257),
]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("nothing@champion", "there is no model 'nothing' in the registry at sqlite"),
        ("shapes@99", "model 'shapes' has no version or alias '99': versions 1"),
        ("shapes@best", "no version or alias 'best': versions .*; aliases champion"),
        ("shapes", "does not name a model: write NAME@ALIAS"),
        ("a@b@c", "does not name a model"),
        ("", "does not name a model"),
        *((name, "does not name a model") for name in UNTHINKABLE),
    ],
)
def test_a_model_that_is_not_there_is_named(
    uri: str, champion: ModelReference, text: str, sentence: str
) -> None:
    with pytest.raises(ModelNotFound, match=sentence) as caught:
        resolve(text, uri)
    assert len(str(caught.value)) < 300


def test_a_look_into_a_sqlite_store_sees_what_mlflow_says(
    uri: str, champion: ModelReference
) -> None:
    client = make_client(uri)
    client.create_registered_model("looked")
    assert history("looked", "best", uri) == []
    tags = {DIGEST_TAG: "d"}
    made = [client.create_model_version("looked", f"s3://x/{i}", tags=tags) for i in range(3)]
    for version in made[:2]:
        promote(ModelReference("looked", str(version.version), "d", uri), "best")
    assert [(move.before, move.after) for move in history("looked", "best", uri)] == [
        (None, "1"),
        ("1", "2"),
    ]
    client.delete_model_version("looked", "3")
    assert find_version("looked", "d", uri) == ModelReference("looked", "2", "d", uri)
    (newest, _) = client.search_model_versions(f"name = 'looked' and tags.`{DIGEST_TAG}` = 'd'")
    assert str(newest.version) == "2"
    assert find_version("looked", "other", uri) is None
    assert find_version("shapes", champion.digest, uri) == champion


def test_what_is_no_sqlite_store_is_left_to_mlflow(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("this is no database, whatever its name says")
    for uri in ("http://127.0.0.1:9", f"sqlite:///{tmp_path}/text", f"sqlite:///{tmp_path}/none"):
        assert look(uri, "SELECT name FROM registered_models") is None
    assert not (tmp_path / "none").exists(), "looking makes nothing"


def test_parse_reference() -> None:
    assert parse_reference("digits@champion") == ("digits", "champion")
    assert parse_reference("models:/digits/7") == ("digits", "7")


@pytest.mark.parametrize("name", ["a@b", "models:/a", "", "-a", "a b", "a" * 101])
def test_a_name_that_no_model_may_have_is_refused(name: str) -> None:
    with pytest.raises(RequestError, match="is not the name of a model alone"):
        check_name(name)
    assert check_name("a-1_b.c") == "a-1_b.c"


def test_a_registered_model_is_the_model_that_was_registered(
    uri: str, champion: ModelReference
) -> None:
    model = load_model(champion.uri, uri)
    original = make_model(["a", "b", "c"])
    assert model.digest == champion.digest
    assert model.spec == original.spec
    request = ImageRequest(0, 0, 1, SETTINGS[1])
    assert np.array_equal(alone(model, request), alone(original, request))


def test_a_damaged_model_is_refused(tmp_path: Path) -> None:
    for name, data in files().items():
        damaged = data[:-1] + bytes([data[-1] ^ 1]) if name.endswith(".safetensors") else data
        (tmp_path / name).write_bytes(damaged)
    with pytest.raises(CorruptArtifact, match="weights.safetensors does not match"):
        load_model(str(tmp_path))
    (tmp_path / "weights.safetensors").write_bytes(files()["weights.safetensors"])
    load_model(str(tmp_path))
    whole = json.loads(files()["model.json"])
    for key, value, sentence in (
        ("spec", whole["spec"] | {"class_names": ["b", "a", "c"]}, "does not match its recorded"),
        ("spec", whole["spec"] | {"image_size": "wide"}, "has a spec that is none"),
        ("digest", whole["digest"][::-1], "does not match its recorded digest"),
    ):
        (tmp_path / "model.json").write_text(json.dumps(whole | {key: value}))
        with pytest.raises(CorruptArtifact, match=f"model.json {sentence}"):
            load_model(str(tmp_path))
    for text in ("[]", "{", "{}"):
        (tmp_path / "model.json").write_text(text)
        with pytest.raises(CorruptArtifact, match="is not the description of a model"):
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
    assert np.array_equal(loaded.predict([request | {"n": 1}, request])[1:], images)
    rows = pd.DataFrame([{"n": 2, "seed": 5, "label": 1, "steps": 5}, {"seed": 6, "steps": 5}])
    table = loaded.predict(rows)
    assert table.shape == (3, 8, 8, 1)
    assert np.array_equal(table[:2], images[:2])
    for wrong, sentence in (
        ({"step": 5}, "'step' is not one of"),
        ({"n": 0}, "n=0: should be greater than or equal to 1"),
        ({"n": "3"}, "n='3': should be a valid integer"),
        ({"n": 2.5}, "n=2.5: should be a valid integer"),
        ({"seed": -1}, "seed=-1: should be greater"),
        ({"steps": 5000}, "steps=5000 must be from 1 to the model's 1000"),
        ([1, 2], "takes a dict, a list of dicts or a DataFrame"),
        ([], "at least one request"),
        ({"label": 9}, "label=9 is not a class"),
        ({"sampler": "magic"}, "sampler='magic': should be"),
    ):
        with pytest.raises(RequestError, match=sentence):
            loaded.predict(wrong)


def test_the_signature_names_every_setting_and_the_pixels(champion: ModelReference) -> None:
    from mlflow.models import Model

    from pipeline.registry.flavor import PredictRequest

    signature = Model.from_dict(yaml.safe_load(files()["MLmodel"])).signature
    (request,) = signature.inputs.inputs
    fields = {field.name: field for field in request.type.properties}
    assert set(fields) == set(PredictRequest.model_fields)
    assert not any(field.required for field in fields.values())
    for name, kind in (("n", "long"), ("guidance", "double"), ("label", "long")):
        assert fields[name].dtype.name == kind
    (images,) = signature.outputs.inputs
    assert (images.type, images.shape) == (np.dtype(np.uint8), (-1, 8, 8, 1))


def test_mlflows_scoring_server_serves_it(
    uri: str, champion: ModelReference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What `mlflow models serve --env-manager local` runs, without its process and its port."""
    import mlflow
    from mlflow.pyfunc import scoring_server

    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    loaded = mlflow.pyfunc.load_model("models:/shapes@champion")

    def post(body: object) -> Any:
        schema = loaded.metadata.get_input_schema()
        return scoring_server.invocations(json.dumps(body), "application/json", loaded, schema)

    request = {"n": 2, "seed": 5, "label": 1, "steps": 5, "guidance": 2}
    reply = post({"inputs": [request]})
    assert reply.status == 200
    assert np.array_equal(json.loads(reply.response)["predictions"], loaded.predict(request))
    with pytest.raises(mlflow.MlflowException) as refused:
        post({"inputs": [{"step": 5}]})
    assert "'step' is not one of" in refused.value.serialize_as_json()


def test_the_card_states_data_figures_lineage_and_what_is_missing() -> None:
    model = make_model(["a", "b", "c"])
    weights = save_tensors(model.network.state_dict())
    scores = {
        "protocol": {"n": 20, "weights": "ema"},
        "figures": {
            "class_accuracy": {
                "value": 0.9,
                "interval": [0.7, 0.97],
                "n": 20,
                "better": "higher",
            },
            "fd_x": {"value": 5.0, "interval": None, "n": 20, "better": "lower"},
        },
        "skipped": {"kd_x": "too few"},
    }
    lineage = {
        "source": "builtin:digits",
        "source_sha256": "abc",
        "train_id": "t17",
        "config": {"name": "shapes", "training": {"steps": 5}},
    }
    made = model_files(model.spec, weights, lineage, scores, b"a picture")
    assert made["grid.png"] == b"a picture"
    card = made["README.md"].decode()
    for part in (
        "# shapes\n",
        "draws grey images of 8x8 pixels of 3 classes",
        f"Model `{model_digest(model.spec, weights)}`",
        "![Samples](grid.png)",
        "- source: `builtin:digits`",
        "- classes: a, b, c",
        "| `class_accuracy` | 0.9 [0.7, 0.97] | 20 | higher |",
        "| `fd_x` | 5 | 20 | lower |",
        "- no `kd_x`: too few",
        "| train_id | t17 |",
        "  steps: 5",
        "## Limits",
    ):
        assert part in card, part
    plain = model_files(model.spec, weights, {})
    assert "grid.png" not in plain
    assert "None were measured." in plain["README.md"].decode()
    assert plain["weights.safetensors"] == weights
    assert json.loads(plain["model.json"])["digest"] == json.loads(made["model.json"])["digest"]


def test_a_card_is_written_anew_with_what_was_learned_since(
    uri: str, champion: ModelReference
) -> None:
    card = {"README.md": b"another evaluation", "grid.png": b"another picture"}
    again = register(TrackedRun(uri, "shapes", "t9", {}), "shapes", files() | card, {})
    assert again == champion
    folder = files_of(champion)
    assert (folder / "README.md").read_bytes() == b"another evaluation"
    assert (folder / "grid.png").read_bytes() == b"another picture"
    load_model(champion.uri, uri)


def test_the_same_content_from_two_at_once_is_one_version(uri: str) -> None:
    runs = [TrackedRun(uri, "shapes", f"twin-{i}", {}) for i in range(2)]
    content, made = files("twin"), list[ModelReference]()
    together = threading.Barrier(2)

    def finish(run: TrackedRun) -> None:
        together.wait()
        made.append(register(run, "twins", content, {}))

    threads = [threading.Thread(target=finish, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [reference.version for reference in made] == ["1", "1"]
    assert len(runs[0].client.search_model_versions("name = 'twins'")) == 1


def test_a_version_that_was_replaced_deleted_or_lost_is_named(uri: str) -> None:
    run = TrackedRun(uri, "shapes", "doomed", {})
    doomed = register(run, "doomed", files("doomed"), {})
    other = register(run, "doomed", files("other"), {})
    folder = files_of(doomed)
    for path in files_of(other).iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    with pytest.raises(CorruptArtifact, match=f"holds the model {other.digest}, the registry says"):
        load_model(doomed.uri, uri)
    shutil.rmtree(folder)
    with pytest.raises(StorageError, match="the files of doomed@1 cannot be read from /"):
        load_model(doomed.uri, uri)
    run.client.delete_model_version("doomed", "1")
    for call in (lambda: load_model(doomed.uri, uri), lambda: read_tag(doomed, "x")):
        with pytest.raises(ModelNotFound, match="no version 1 of the model 'doomed'.*versions 2"):
            call()


def test_an_alias_that_points_nowhere_is_named(
    uri: str, champion: ModelReference, monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's own stores drop the aliases of a version with it; others need not."""
    from mlflow.entities.model_registry import RegisteredModel

    monkeypatch.setattr(RegisteredModel, "aliases", {"best": "77"})
    with pytest.raises(ModelNotFound, match="shapes@best is version 77, which was deleted: point"):
        resolve("shapes@best", uri)


def test_a_server_that_is_away_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(
        StorageError,
        match="MLflow at http://127.0.0.1:9 cannot be used: nothing answers there; start",
    ):
        resolve("digits@champion", "http://127.0.0.1:9")


def test_a_store_that_cannot_be_used_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot be used|cannot write"):
        TrackedRun(f"sqlite:///{tmp_path}/file/mlflow.db", "e", "t", {})
    (tmp_path / "no.db").write_bytes(b"this is not a database, but long enough to look at" * 9)
    with pytest.raises(StorageError, match="MLflow at sqlite.* cannot be used"):
        TrackedRun(f"sqlite:///{tmp_path}/no.db", "e", "t", {})
