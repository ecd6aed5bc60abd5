"""The command line's contract: exit codes, and one sentence for each mistake."""

import contextlib
import json
import shutil
import sqlite3
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from pipeline.config import load_config
from pipeline.errors import ModelNotFound
from pipeline.loading import load_model
from pipeline.registry.aliases import (
    DECISION_TAG,
)
from pipeline.registry.versions import FIGURES_TAG, read_tag, resolve
from tasks.stages.declarations import STAGES
from tasks.stages.plan import make_plan
from tasks.stages.progress import Board
from tasks.stages.stage import Outcome, StageContext
from tasks.stages.tracking import tracked_run
from tasks.stages.workflow import run
from tests.conftest import ROOT, TINY, Workplace, tiny_command
from tests.unit.test_gate import Silent


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    return Workplace(tmp_path)


def error_of(output: str) -> str:
    """The only line of an error; the output holds nothing else."""
    (line,) = output.strip().splitlines()
    assert line.startswith("error: ")
    return line


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["training.lrr=1"], "did you mean training.lr?"),
        (["data.source=nowhere"], "does not exist"),
        (["storage=/proc/nowhere"], "cannot write to /proc/nowhere"),
        (["storage=nosuch://x"], "cannot be opened"),
        (["storage=s3://bucket/runs"], "cannot write to s3://bucket/runs"),
        (["tracking.uri=nosuch://x"], "MLflow at nosuch://x cannot be used"),
    ],
)
def test_a_users_mistake_is_one_sentence_and_code_2(
    place: Workplace, overrides: list[str], sentence: str
) -> None:
    output = place.run_tiny(*overrides, verb="register", code=2)
    assert sentence in error_of(output.splitlines()[-1] if "will run" in output else output)
    assert "Traceback" not in output


def test_nothing_is_left_behind_by_a_mistake(place: Workplace) -> None:
    place.run_tiny("data.source=nowhere", code=2)
    left = [path for path in place.folder.rglob("*") if path.is_file() and "logs" not in path.parts]
    assert left == []


@pytest.mark.parametrize(
    "arguments",
    [["nonsense"], ["run"], ["run", "x.yaml", "--nonsense"], ["sample", "m@1", "-n", "x"]],
)
def test_usage_errors_have_code_2(place: Workplace, arguments: list[str]) -> None:
    place.quick(*arguments, code=2)


def test_help_names_every_verb(place: Workplace) -> None:
    output = place.quick("--help")
    verbs = "new run preprocess train evaluate register status explain config "
    verbs += "schedule sample reproduce compare serve promote rollback history lineage "
    verbs += "export import submit jobs logs cancel"
    for verb in verbs.split():
        assert f" {verb} " in output


def test_config_prints_what_it_would_load_again(place: Workplace) -> None:
    first = place.quick(*tiny_command("config"))
    (place.folder / "again.yaml").write_text(first)
    assert place.quick("config", "again.yaml") == first


def test_explain_starts_nothing(place: Workplace) -> None:
    output = place.quick(*tiny_command("explain"))
    assert output.count("will run") == 6
    assert "preprocess will run  has no output yet" in output
    assert not (place.folder / "runs").exists()


def test_explain_writes_nothing_for_a_folder_either(place: Workplace) -> None:
    (place.folder / "photos").mkdir()
    (place.folder / "photos" / "a.png").write_bytes(b"x")
    place.quick(*tiny_command("explain", "data.source=photos"))
    assert [path.name for path in place.folder.iterdir()] == ["photos"]


def test_models_that_are_not_there(place: Workplace) -> None:
    for arguments in (
        ["sample", "digits@champion"],
        ["serve", "digits@7"],
        ["promote", "digits@7"],
        ["rollback", "digits"],
        ["history", "digits"],
        ["lineage", "digits@champion"],
    ):
        output = place.quick(*arguments, code=2)
        assert "there is no model 'digits': the registry at" in error_of(output)
    assert list(place.folder.iterdir()) == [], "looking creates nothing"
    assert "does not name a model" in error_of(place.quick("sample", "digits", code=2))
    for verb in ("rollback", "history"):
        output = place.quick(verb, "digits@champion", code=2)
        assert "'digits@champion' is not the name of a model alone" in error_of(output)


def test_a_cluster_that_is_not_there(place: Workplace) -> None:
    output = place.quick("submit", "configs/digits.yaml", "--address", "http://127.0.0.1:9", code=2)
    assert "is not a config file" in error_of(output)
    (place.folder / "digits.yaml").write_bytes((ROOT / "configs" / "digits.yaml").read_bytes())
    output = place.quick("submit", "digits.yaml", "--address", "http://127.0.0.1:9", code=2)
    assert "the cluster at http://127.0.0.1:9 cannot be used: nothing answers there" in error_of(
        output
    )
    output = place.run_tiny("cluster.address=127.0.0.1:9", verb="preprocess", code=2)
    assert "cannot join the Ray cluster at 127.0.0.1:9" in output.splitlines()[-1]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["-n", "0"], "-n 0 must be from 1"),
        (["--steps", "5000"], "steps=5000 must be from 1 to the model's 1000"),
        (["--guidance", "nan", "--label", "1"], "--guidance nan"),
        (["--sampler", "magic"], "--sampler magic: should be 'ancestral', 'ddim'"),
        (["--set", "churm=1"], "churm 1: extra inputs are not permitted"),
        (["--mode", "magic"], "--mode magic must be exact or fast"),
        (["--out", "/proc/nowhere"], "cannot write to /proc/nowhere"),
    ],
)
def test_sampling_options_out_of_range(tiny: Workplace, options: list[str], sentence: str) -> None:
    assert sentence in error_of(tiny.quick("sample", "digits@champion", *options, code=2))


def test_reproduce_refuses_what_is_not_ours(tiny: Workplace, tmp_path: Path) -> None:
    from pipeline.data.images import png

    plain = tmp_path / "plain.png"
    plain.write_bytes(png(np.zeros((8, 8, 1), np.uint8)))
    assert "carries no recipe" in error_of(tiny.quick("reproduce", str(plain), code=2))
    assert "cannot be read" in error_of(tiny.quick("reproduce", str(tmp_path / "no.png"), code=2))


def test_promote_moves_an_alias_and_history_tells_it(tiny: Workplace) -> None:
    promote = ["promote", "digits@1", "--alias", "candidate"]
    assert tiny.quick(*promote) == "digits@candidate is now version 1\n"
    assert tiny.quick(*promote) == "digits@candidate is version 1 already\n"
    heading, move = tiny.quick("history", "digits", "--alias", "candidate").splitlines()
    assert heading.split() == ["when", "from", "to", "by"]
    assert move.split()[1:] == ["1", "promote"]
    output = tiny.quick("rollback", "digits", "--alias", "candidate", code=2)
    assert "digits@candidate was at no other version before: it stays version 1" in output
    assert "digits@other was not moved yet" in tiny.quick("history", "digits", "--alias", "other")
    assert "reads as a version" in error_of(
        tiny.quick("promote", "digits@1", "--alias", "v2", code=2)
    )


def test_rollback_points_the_alias_at_the_version_before(tiny: Workplace) -> None:
    from mlflow.tracking import MlflowClient

    uri = f"sqlite:///{tiny.folder / 'mlflow.db'}"
    client = MlflowClient(uri, uri)
    second = client.create_model_version("digits", source="s3://nowhere/x").version
    try:
        for version in ("1", second):
            tiny.quick("promote", f"digits@{version}", "--alias", "back")
        output = tiny.quick("rollback", "digits", "--alias", "back")
        assert output == f"digits@back is now version 1, was version {second}\n"
    finally:
        client.delete_model_version("digits", second)


def test_lineage_leads_from_an_image_to_the_hash_of_the_source(
    tiny: Workplace, tmp_path: Path
) -> None:
    image = next((tiny.folder / "runs" / "sample").glob("*/0013.png"))
    lines = tiny.quick("lineage", str(image)).splitlines()
    chain = {line[:10].strip(): line[10:] for line in lines[: lines.index("config") + 1]}
    assert chain["image"].startswith(f"{image}, image 13 of seed ")
    assert "steps 4" in chain["drawn"] and "sampler ddim" in chain["drawn"]
    assert chain["model"].startswith("digits@1, digest ")
    assert chain["gate"] == "champion is now version 1"
    for what, stage in (("train", "train"), ("shards", "preprocess"), ("evaluate", "evaluate")):
        assert tiny.manifest(stage)["id"] in chain[what]
    shards = tiny.manifest("preprocess")["stats"]
    assert chain["source"] == shards["source"]
    assert shards["source_sha256"] in chain["sha256"]
    assert "torch 2." in chain["versions"]
    assert "  steps: 60" in lines, "the config follows"
    of_model = tiny.quick("lineage", "digits@champion").splitlines()
    assert of_model == lines[lines.index(of_model[0]) :]

    elsewhere = Workplace(tmp_path)
    gone = error_of(elsewhere.quick("lineage", str(image), code=2))
    assert f"the model that made {image} is gone: there is no model 'digits'" in gone
    assert "is gone" in error_of(elsewhere.quick("reproduce", str(image), code=2))


# --- out, in, side by side ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def store(tiny: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    """A registry of its own with the tiny model in it."""
    folder = tmp_path_factory.mktemp("store")
    shutil.copy(tiny.folder / "mlflow.db", folder)
    return Workplace(folder)


def test_a_model_goes_out_for_diffusers_and_comes_back_as_it_was(store: Workplace) -> None:
    output = store.quick("export", "digits@champion", "folder")
    assert "digits@1 is in folder: model_index.json, scheduler/scheduler_config.json" in output
    assert "--label makes a folder that draws one class" in output.replace("\n", " ")
    output = store.quick("import", "folder", "--name", "copy")
    assert "copy@1 is the model in folder, of 8x8x1 images" in output
    assert "copy@1 is the model" in store.quick("import", "folder", "--name", "copy")
    uri = f"sqlite:///{store.folder}/mlflow.db"
    first, again = (load_model(resolve(name, uri).uri, uri) for name in ("digits@1", "copy@1"))
    assert again.spec.class_names == first.spec.class_names
    theirs = again.network.state_dict()
    assert all(
        torch.equal(value, theirs[name]) for name, value in first.network.state_dict().items()
    )
    lines = store.quick("lineage", "copy@1").splitlines()
    assert lines[-1] == f"imported  {store.folder}/folder"
    one = store.quick("export", "digits@champion", "sevens", "--label", "7")
    assert "--label makes" not in one


def test_models_are_compared_by_figures_and_by_images_of_the_same_seeds(store: Workplace) -> None:
    output = store.quick("compare", "digits@1", "digits@champion")
    assert "class_accuracy" in output
    assert "no difference" in output
    with Image.open(store.folder / "compare.png") as picture:
        rows = np.asarray(picture)
    assert np.array_equal(rows[8:72], rows[80:144]), "it is the same model"
    output = store.quick("compare", "digits@1", code=2)
    assert "digits@1 alone cannot be compared" in error_of(output)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["export", "digits@1", "."], ". is there and not empty: name a new folder"),
        (["export", "digits@1", "x", "--label", "99"], "label=99 is not a label of the model"),
        (["export", "digits@1", "x", "--label", "1", "--format", "onnx"], "is for --format diff"),
        (["import", "nowhere", "--name", "copy"], "nowhere has neither unet/config.json nor"),
        (["import", "nowhere", "--name", "a/b"], "'a/b' is not the name of a model alone"),
    ],
)
def test_what_cannot_go_out_or_in_is_one_sentence(
    store: Workplace, arguments: list[str], sentence: str
) -> None:
    assert sentence in error_of(store.quick(*arguments, code=2))
    assert not (store.folder / "x").exists()


def test_the_network_alone_goes_out_as_a_graph(store: Workplace) -> None:
    store.quick("export", "digits@1", "graph", "--format", "torch")
    program = torch.export.load(store.folder / "graph" / "network.pt2")
    inputs = {"x_t": torch.zeros(3, 1, 8, 8), "t": torch.ones(3), "label": torch.arange(3)}
    assert program.module()(**inputs).shape == (3, 1, 8, 8)


def test_other_rules_decide_again_on_the_version_that_is_there(
    tiny: Workplace, tmp_path: Path
) -> None:
    from pipeline.registry.runs import TrackedRun
    from tasks.stages import register

    uri = f"sqlite:///{tmp_path}/mlflow.db"
    tracked = TrackedRun(uri, "digits", "t", {})
    stages = ("preprocess", "train", "evaluate")
    inputs = {stage: str(next((tiny.folder / "runs" / stage).iterdir())) for stage in stages}

    def outcome(*rules: str) -> Outcome:
        config = load_config(str(ROOT / "configs" / "digits.yaml"), [*TINY, *rules])
        folder = str(tmp_path / "register")
        context = StageContext(config, "id", folder, inputs, uri, Silent(), lambda: tracked)
        return register.run(context)

    refused = outcome("registry.promote_if.class_accuracy={at_least: 1.5}")
    assert refused.note.startswith("not promoted: class_accuracy 0")
    assert refused.note.endswith("is not at least 1.5; there is no champion yet")
    assert not refused.stats["promotion"]["promoted"]
    with pytest.raises(ModelNotFound, match="no version or alias 'champion': versions 1; aliases "):
        resolve("digits@champion", uri)

    taken = outcome("registry.promote_if.class_accuracy.at_least=0.0")
    assert taken.note.startswith("champion is now version 1: class_accuracy 0")
    champion = resolve("digits@champion", uri)
    assert champion.version == taken.stats["version"] == "1"
    assert json.loads(str(read_tag(champion, DECISION_TAG)))["promoted"]
    figures = json.loads(str(read_tag(champion, FIGURES_TAG)))
    assert set(figures) == set(tiny.manifest("evaluate")["stats"]["figures"])
    assert len(tracked.client.search_model_versions("name = 'digits'")) == 1

    (card,) = (tmp_path / "mlruns").rglob("models/*/artifacts/README.md")
    assert "| `class_accuracy` |" in card.read_text()
    assert (card.parent / "grid.png").read_bytes().startswith(b"\x89PNG")


def test_a_registry_that_was_lost_is_filled_again(tiny: Workplace, tmp_path: Path) -> None:
    shutil.copytree(tiny.folder / "runs", tmp_path / "runs")
    place = Workplace(tmp_path)
    said = place.quick(*tiny_command("explain"))
    assert "register   will run  the version it made is not in the registry at" in said
    assert "sample     will run  its input will be made anew: register" in said
    assert said.count("cached") == 4

    uri, runs = f"sqlite:///{tmp_path}/mlflow.db", f"storage={tmp_path}/runs"
    config = load_config(str(ROOT / "configs" / "digits.yaml"), [*TINY, runs])
    results = run(make_plan(STAGES, config, uri, "register"), Board(), tracked_run)
    assert [result.outcome for result in results] == ["cached"] * 4 + ["done"]
    assert place.quick(*tiny_command("explain")).count("cached") == 6
    assert losses_in(place) == losses_in(tiny) != []
    image = next((place.folder / "runs" / "sample").glob("*/0000.png"))
    assert "bit for bit" in place.quick("reproduce", str(image))


def losses_in(place: Workplace) -> list[tuple[int, float]]:
    with contextlib.closing(sqlite3.connect(place.folder / "mlflow.db")) as database:
        return database.execute(
            "SELECT step, value FROM metrics WHERE key = 'train/loss' ORDER BY step"
        ).fetchall()
