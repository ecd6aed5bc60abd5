"""The whole path on real Ray: images in, a registered model and samples out; killed and resumed."""

import contextlib
import json
import os
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tarfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch
import yaml
from PIL import Image

from pipeline.data import shard_list
from pipeline.data.config import DataConfig
from pipeline.data.images import png
from pipeline.errors import DataError
from pipeline.evaluation.real_images import extractor_of, write_tensors
from tasks.stages.preprocess import check_bad_share
from tasks.stages.previews import Wanted, preview
from tests.conftest import (
    FAULTS,
    HANG,
    ROOT,
    Workplace,
    end,
    end_all,
    ray_workers,
    tiny_command,
    wait_for,
)
from tests.head import Head


def weights_of(place: Workplace) -> str:
    """The sha256 of the final EMA weights."""
    (entry,) = [
        f for f in place.manifest("train")["files"] if f["path"].endswith("ema.safetensors")
    ]
    return str(entry["sha256"])


def database_of(place: Workplace) -> "contextlib.closing[sqlite3.Connection]":
    return contextlib.closing(sqlite3.connect(place.folder / "mlflow.db"))


def metric_history(place: Workplace, name: str) -> list[tuple[int, float]]:
    with database_of(place) as database:
        rows = database.execute(
            "SELECT step, value FROM metrics WHERE key = ? ORDER BY step", (name,)
        )
        return [(int(step), float(value)) for step, value in rows]


def final_step(place: Workplace) -> int:
    """The newest complete checkpoint of a training that may be running."""
    states = place.folder.glob("runs/train/*/step-*/state.json")
    return max((int(path.parent.name.removeprefix("step-")) for path in states), default=0)


# --- a quiet run --------------------------------------------------------------------------------


def test_a_run_ends_with_a_table_and_says_where_to_look(tiny: Workplace) -> None:
    output = (tiny.folder / "first_run.txt").read_text()
    for stage in ("preprocess", "reference", "train", "evaluate", "register", "sample"):
        assert f"\n{stage}" in output
    assert "mlflow ui --backend-store-uri sqlite:///mlflow.db" in output
    assert "ddpm serve digits@champion" in output
    (grid_line,) = [line for line in output.splitlines() if line.startswith("samples ")]
    with Image.open(tiny.folder / grid_line.split()[1]) as grid:
        assert grid.size == (8 * 72 + 8, 10 * 72 + 8)
    for noise in ("WARNING", "INFO", "Traceback", "(pid=", "Deprecat"):
        assert noise not in output


def test_every_file_of_an_output_is_in_its_manifest_with_its_hash(tiny: Workplace) -> None:
    from pipeline.storage import sha256

    for stage in ("preprocess", "reference", "train", "evaluate", "register", "sample"):
        (path,) = (tiny.folder / "runs" / stage).glob("*/manifest.json")
        manifest = json.loads(path.read_text())
        assert manifest["id"] == path.parent.name
        assert manifest["files"]
        for entry in manifest["files"]:
            data = (path.parent / entry["path"]).read_bytes()
            assert (len(data), sha256(data)) == (entry["bytes"], entry["sha256"])


def test_no_image_is_lost_between_source_and_shards(tiny: Workplace) -> None:
    stats = tiny.manifest("preprocess")["stats"]
    assert sum(stats["num_images"].values()) == sum(stats["class_counts"]) == 1797
    assert stats["num_images"]["holdout"] == pytest.approx(0.15 * 1797, abs=50)
    assert stats["num_bad"] == 0


def test_the_mlflow_run_tells_the_training(tiny: Workplace) -> None:
    assert [step for step, _ in metric_history(tiny, "train/loss")] == list(range(5, 61, 5))
    for name in ("train/lr", "train/grad_norm", "speed/images_per_second", "speed/data_wait"):
        assert len(metric_history(tiny, name)) == 12
    assert len(metric_history(tiny, "system/cpu_utilization_percentage")) == 12
    utilisation = [share for _, share in metric_history(tiny, "speed/utilisation")]
    assert all(0 < share < 2 for share in utilisation)
    quartiles = [metric_history(tiny, f"train/loss_quartile_{i}")[-1][1] for i in (1, 2, 3, 4)]
    assert quartiles[0] > quartiles[3], "the less noise, the harder it is to see"
    (config,) = (tiny.folder / "mlruns").rglob("config.yaml")
    assert yaml.safe_load(config.read_text())["training"]["steps"] == 60
    (environment,) = (tiny.folder / "mlruns").rglob("environment.txt")
    assert f"torch=={torch.__version__}" in environment.read_text()
    assert [step for step, _ in metric_history(tiny, "eval/holdout_loss")] == [20, 40, 60]
    assert len(metric_history(tiny, "eval/class_accuracy")) == 1
    measured = [step for step, _ in metric_history(tiny, "eval_n10/kd_cnn_digits")]
    assert set(measured) <= {20, 40, 60}, "of checkpoints that found the reference finished"
    precision = tiny.manifest("train")["stats"]["precision"]
    assert precision == "float32", "of so small a network on any CPU"
    said = (tiny.folder / "first_run.txt").read_text()
    assert said.count(f"train: training.precision=auto is {precision}, ") == 1
    with database_of(tiny) as database:
        tagged = database.execute("SELECT value FROM tags WHERE key = 'ddpm.precision'").fetchall()
        assert tagged == [(precision,)]
        assert database.execute("SELECT count(*), min(status) FROM runs").fetchone() == (
            1,
            "FINISHED",
        )
        ((digest, profile),) = database.execute("SELECT digest, dataset_profile FROM datasets")
    assert digest == tiny.manifest("preprocess")["id"]
    assert json.loads(profile)["pixel_mean"] == tiny.manifest("preprocess")["stats"]["pixel_mean"]
    grids = list((tiny.folder / "mlruns").rglob("images/samples+step+*.png"))
    assert len(grids) == 3
    (sheet,) = (tiny.folder / "mlruns").rglob("images/contact_sheet+step+0+*.png")
    (made,) = (tiny.folder / "runs" / "preprocess").glob("*/contact_sheet.png")
    assert np.array_equal(np.asarray(Image.open(sheet)), np.asarray(Image.open(made)))
    waits = [share for _, share in metric_history(tiny, "speed/data_wait")]
    assert len(waits) == 12
    assert all(0 <= share < 1 for share in waits)


def test_every_figure_says_how_it_was_measured_and_every_missing_one_why(tiny: Workplace) -> None:
    stats = tiny.manifest("evaluate")["stats"]
    figures = stats["figures"]
    assert {"holdout_loss", "class_accuracy", "kd_cnn_digits", "recall_cnn_digits"} <= set(figures)
    for figure in figures.values():
        low, high = figure["interval"]
        assert low <= figure["value"] <= high
        assert figure["n"] > 0
        assert figure["better"] in ("lower", "higher")
    assert stats["protocol"]["weights"] == "ema"
    shard_set = tiny.manifest("preprocess")["id"]
    assert figures["kd_cnn_digits"]["measured"]["reference"] == shard_set
    assert figures["holdout_loss"]["measured"]["held_out"] == shard_set
    assert figures["kd_cnn_digits"]["measured"]["sampling"]["steps"] == 4
    extractor = tiny.manifest("reference")["stats"]["extractor"]
    assert figures["kd_cnn_digits"]["measured"]["extractor"] == extractor["digest"]
    floor = figures["kd_cnn_digits"]["floor"]
    assert floor["n"] == 20
    assert floor["real"] < floor["samples"], "of a network that was hardly trained"
    assert "needs at least 129 images a set, here are 20" in stats["skipped"]["fd_cnn_digits"]
    assert len(metric_history(tiny, "eval/kd_cnn_digits")) == 1


def test_a_small_evaluation_is_made_of_a_checkpoint(tiny: Workplace) -> None:
    (uri,) = (tiny.folder / "runs" / "train").glob("*/step-000000060")
    (shard_set,) = (tiny.folder / "runs" / "preprocess").iterdir()
    (reference,) = (tiny.folder / "runs" / "reference").iterdir()
    wanted = Wanted(str(shard_set), 100, str(reference), num_measured=10, guidance=0.5, seed=0)
    made = preview(str(uri), wanted)
    assert set(made.figures) == {
        f"eval_n10/{name}"
        for name in (
            "class_accuracy",
            "kd_cnn_digits",
            "score_cnn_digits",
            "precision_cnn_digits",
            "recall_cnn_digits",
            "density_cnn_digits",
            "coverage_cnn_digits",
        )
    }
    assert made == preview(str(uri), wanted), "of the same images"
    none = preview(str(uri), replace(wanted, reference=str(reference / "not finished")))
    assert none == replace(made, figures={})


def test_a_killed_evaluation_goes_on_with_the_samples_that_it_had(
    tiny: Workplace, head: Head, tmp_path: Path
) -> None:
    place = place_with_shards(tiny, tmp_path, head.joined)
    shutil.copytree(tiny.folder / "runs" / "train", place.folder / "runs" / "train")
    more = [
        "evaluation.samples=60",
        "evaluation.over_steps={samplers: [ddim, heun], steps: [2, 4], samples: 8}",
    ]
    said = place.quick(*tiny_command("status", *more))
    (stage_id,) = re.findall(r"runs/evaluate/([0-9a-f]{16})", said)
    folder = place.folder / "runs" / "evaluate" / stage_id
    (reference,) = (place.folder / "runs" / "reference").iterdir()
    extractor = extractor_of(str(reference))
    assert extractor is not None
    black = np.zeros((48, 8, 8, 1), np.uint8)  # by which they are known
    features, log_probs = extractor(black)
    assert log_probs is not None
    had = {
        "pixels": torch.from_numpy(black),
        "evaluations": torch.full((48,), 1000),
        "features": features,
        "log_probs": log_probs,
    }
    samples = folder / "samples" / "figures"
    write_tensors(str(samples / "00000.safetensors"), had)
    (samples / "00001.safetensors").write_bytes(b"torn")
    place.run_tiny(*more, verb="evaluate")
    stats = place.manifest("evaluate")["stats"]
    assert stats["protocol"]["network_evaluations"] == (48 * 1000 + 12 * 8) / 60
    assert stats["figures"]["class_accuracy"]["n"] == 60
    points = stats["protocol"]["over_steps"]
    assert [(point["sampler"], point["evaluations"]) for point in points] == [
        ("ddim", 4.0),
        ("ddim", 8.0),
        ("heun", 6.0),
        ("heun", 14.0),
    ], "guided, so two for each network evaluation; Heun's last step has one"
    assert {"kd_cnn_digits", "recall_cnn_digits"} <= set(points[0]["figures"])
    names = ["grid.png", "manifest.json", "metrics.json", "neighbours.png", "over_steps.png"]
    assert sorted(path.name for path in folder.glob("[!.]*")) == [*names, "timesteps.png"]


def test_the_second_run_finds_everything_cached(tiny: Workplace) -> None:
    manifests = {path: path.read_text() for path in tiny.folder.glob("runs/*/*/manifest.json")}
    output = tiny.run_tiny()
    assert output.count("cached") == 12
    assert "will run" not in output
    assert {
        path: path.read_text() for path in tiny.folder.glob("runs/*/*/manifest.json")
    } == manifests


def test_lineage_leads_from_the_version_to_the_source(tiny: Workplace) -> None:
    with database_of(tiny) as database:
        tags = dict(database.execute("SELECT key, value FROM model_version_tags WHERE version = 1"))
        (run,) = database.execute("SELECT run_uuid FROM runs").fetchone()
        aliases = database.execute("SELECT alias, version FROM registered_model_aliases").fetchall()
    assert ("champion", 1) in aliases
    assert tags["ddpm.train_id"] == tiny.manifest("train")["id"]
    shards = tiny.manifest("preprocess")
    assert tags["ddpm.shard_set_id"] == shards["id"]
    assert tags["ddpm.source_sha256"] == shards["stats"]["source_sha256"]
    (model,) = (tiny.folder / "mlruns").rglob("model.json")
    description = json.loads(model.read_text())
    assert description["digest"] == tags["ddpm.model_digest"]
    assert description["lineage"]["mlflow_run_id"] == run
    assert description["weights_sha256"] == weights_of(tiny)
    assert description["lineage"]["config"]["training"]["steps"] == 60


def test_samples_are_their_recipe_whoever_draws_them(
    tiny: Workplace, head: Head, tmp_path: Path
) -> None:
    """60 images dealt to tasks, then some of them alone and in this process."""
    options = ["-n", "60", "--seed", "7", "--steps", "4", "--label", "3", "--guidance", "1"]
    tiny.ddpm("sample", "digits@champion", *options, "--out", str(tmp_path), **head.joined)
    assert len(list(tmp_path.glob("*.png"))) == 61
    again = tmp_path / "again.png"
    for name in ("0000.png", "0031.png", "0059.png"):
        output = tiny.quick("reproduce", str(tmp_path / name), "--out", str(again))
        assert "bit for bit" in output
        assert again.read_bytes() == (tmp_path / name).read_bytes()
    ours = next((tiny.folder / "runs" / "sample").glob("*/0000.png"))
    assert "bit for bit" in tiny.quick("reproduce", str(ours))

    tampered = tmp_path / "tampered.png"
    with Image.open(tmp_path / "0000.png") as image:
        tampered.write_bytes(png(255 - np.asarray(image)[..., None], {"ddpm": image.info["ddpm"]}))
    assert "pixels differ" in tiny.quick("reproduce", str(tampered), code=1)


# --- disturbed runs -----------------------------------------------------------------------------


def place_with_shards(
    tiny: Workplace, folder: Path, environment: Mapping[str, str] | None = None
) -> Workplace:
    """A workplace in which training comes next."""
    for stage in ("preprocess", "reference"):
        shutil.copytree(tiny.folder / "runs" / stage, folder / "runs" / stage)
    return Workplace(folder, environment or {})


def assert_trained_like_the_quiet_run(place: Workplace, tiny: Workplace) -> None:
    """Same weights bit for bit, same history without duplicates."""
    assert weights_of(place) == weights_of(tiny)
    for name in ("train/loss", "train/lr", "eval/holdout_loss"):
        assert metric_history(place, name) == metric_history(tiny, name)
    with database_of(place) as database:
        assert database.execute("SELECT count(*) FROM runs").fetchone() == (1,)


@contextlib.contextmanager
def nodes() -> Iterator[Callable[[str], str]]:
    """A cluster without nodes at first; what is given asks it, as tests/nodes.py says."""
    command = [sys.executable, "-m", "tests.nodes"]
    environment = {**os.environ, "RAY_AUTH_MODE": "disabled"}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, cwd=ROOT, env=environment, stdin=pipe, stdout=pipe, text=True
    ) as process:
        assert process.stdin is not None and process.stdout is not None

        def ask(line: str) -> str:
            assert process.stdin is not None and process.stdout is not None
            print(line, file=process.stdin, flush=True)
            answer = process.stdout.readline()
            assert answer, "the cluster is gone"
            return answer

        try:
            yield ask
        finally:
            process.stdin.close()
            process.wait(timeout=HANG)


def wait_for_checkpoint(place: Workplace) -> None:
    """Until there is a newer one."""
    step = final_step(place)
    wait_for(lambda: final_step(place) > step, f"a checkpoint after step {step}")


def test_a_training_whose_controller_and_command_are_killed_ends_as_if_it_had_not_been(
    tiny: Workplace, head: Head, tmp_path: Path
) -> None:
    """The controller is killed, then the command, on a Ray of its own; of the workers one is
    lost in tests/system/test_nodes.py. At certain steps the training is held until the disturbance
    has come, see tests/faults.
    """
    place, hold = place_with_shards(tiny, tmp_path / "place"), tmp_path / "hold"
    hold.mkdir()
    for step in (25, 45):
        (hold / f"{step}").touch()

    def held_at(step: int) -> None:
        """Wait until both workers of this attempt are; what earlier ones said is forgotten."""
        wait_for(lambda: len(list(hold.glob(f"{step}-*"))) == 2, f"step {step}", process)
        for said in hold.glob(f"{step}-*"):
            said.unlink()

    process = place.start(*tiny_command("train"), **FAULTS, DDPM_HOLD=str(hold))
    held_at(25)
    wait_for(lambda: final_step(place) == 20, "the first checkpoint", process)
    (controller,) = ray_workers(process.pid, "TrainController")
    controller.kill()
    held_at(25)
    (hold / "25").unlink()
    held_at(45)
    wait_for(lambda: final_step(place) == 40, "the second checkpoint", process)
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    # Ray's own agents would give up after a minute without their head
    end_all(children)
    output = place.quick(*tiny_command("explain"))
    assert re.search("train +will run +was interrupted, goes on from step-000000040", output)
    assert re.search("preprocess +cached", output)
    Workplace(place.folder, head.joined).run_tiny(verb="train")
    assert_trained_like_the_quiet_run(place, tiny)


def interrupt(process: "subprocess.Popen[str]", number: signal.Signals) -> None:
    """Send a signal to a command; it ends with 130, a sentence, and nothing left running."""
    children = psutil.Process(process.pid).children(recursive=True)
    process.send_signal(number)
    output, _ = process.communicate(timeout=HANG)
    assert process.returncode == 130, output
    assert psutil.wait_procs(children, timeout=HANG)[1] == []
    assert "interrupted: the same command goes on" in output
    assert "Traceback" not in output


def test_a_loss_that_is_not_finite_stops_with_a_sentence_and_no_retry(
    tiny: Workplace, head: Head, tmp_path: Path
) -> None:
    place = place_with_shards(tiny, tmp_path, head.joined)
    sets = ("training.lr=1e30", "training.warmup_steps=0", "cluster.workers=1")
    output = place.run_tiny(*sets, verb="train", code=1)
    said = output.splitlines()[-1]
    assert said.startswith("error: the training loss or its gradient is not finite at step")
    (listed,) = place.folder.glob("runs/train/*/diverged-*.json")
    found = json.loads(listed.read_text())
    assert f"at step {found['step']}, on the images {found['images'][0]}," in said
    assert len(found["images"]) == 32
    assert "Traceback" not in output
    assert final_step(place) == 0, "nothing of it is saved"


def make_photos(folder: Path, count: int = 16, copies: int = 4) -> None:
    """Noise photographs large enough that decoding them takes seconds, in two classes."""
    rng = np.random.default_rng(0)
    for i in range(count):
        path = folder / ("light" if i % 2 else "dark") / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(128 * (i % 2), 128 + 128 * (i % 2), (1200, 1200, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(path, compress_level=1)
        for copy in range(1, copies):
            os.link(path, path.with_name(f"{i:03d}-{copy}.png"))


PHOTOS = [
    "data.drop_duplicates=false",
    "data.image_size=16",
    "network.attention_at=[8]",
    "data.channels=3",
    "data.images_per_shard=2",
    "data.max_bad_fraction=0.2",
]


def shard_sets(place: Workplace) -> list[Path]:
    """The newest first."""
    manifests = place.folder.glob("runs/preprocess/*/manifest.json")
    return [p.parent for p in sorted(manifests, key=lambda p: p.stat().st_mtime, reverse=True)]


def parts(place: Workplace) -> dict[str, bytes]:
    folder = shard_sets(place)[0]
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.parquet")}


def test_a_folder_of_images_with_bad_ones_and_killed_tasks(head: Head, tmp_path: Path) -> None:
    """A task is killed, then the command is ended; the parts are those of a quiet run.

    Then an image is added: only the shards near it are made anew.
    """
    photos = tmp_path / "photos"
    make_photos(photos)
    (photos / "dark" / "broken.png").write_bytes(b"not an image")
    (photos / "light" / "empty.png").write_bytes(b"")
    command = tiny_command("preprocess", f"data.source={photos}", *PHOTOS)
    quiet = Workplace(tmp_path / "quiet", head.joined)
    quiet.folder.mkdir()
    output = quiet.ddpm(*command)
    assert "left out 2 unusable (dark/broken.png: it is not a PNG" in output
    assert "light/empty.png: the file is empty)" in output
    stats = quiet.manifest("preprocess")["stats"]
    assert stats["class_names"] == ["dark", "light"]
    assert stats["class_counts"] == [32, 32]
    assert sum(stats["num_images"].values()) == 64
    reasons = {bad["key"]: bad["reason"] for bad in stats["bad"]}
    assert reasons["light/empty.png"] == "the file is empty"
    assert reasons["dark/broken.png"].startswith("it is not a PNG")
    assert stats["num_bad"] == 2

    killed = Workplace(tmp_path / "killed", head.joined)
    killed.folder.mkdir()
    process = killed.start(*command)
    try:
        records = lambda: len(list(killed.folder.glob("runs/preprocess/*/parts/*.json")))  # noqa: E731
        victim = wait_for(lambda: ray_workers(head.pid, "preprocess_shard"), "a task", process)[0]
        victim.kill()
        done = wait_for(records, "a finished shard", process)
        interrupt(process, signal.SIGTERM)
    finally:
        end(process)
    before = {p: p.stat().st_mtime_ns for p in killed.folder.glob("runs/preprocess/*/parts/*.json")}
    num_shards = len(shard_list.read(str(shard_sets(quiet)[0])))
    assert done <= len(before) < num_shards
    assert "goes on from what is finished" in killed.quick("explain", *command[1:])
    killed.ddpm(*command)
    assert {p: p.stat().st_mtime_ns for p in before} == before, "finished shards are not made again"
    assert parts(killed) == parts(quiet)
    assert killed.manifest("preprocess")["id"] == quiet.manifest("preprocess")["id"]
    folder = shard_sets(quiet)[0]
    sheet = np.asarray(Image.open(folder / "contact_sheet.png"))
    assert sheet.shape == (10 * 68 + 4, 2 * 68 + 4, 3)
    assert sheet[20, 20].mean() < 128 < sheet[20, 88].mean(), "dark left, light right"

    Image.fromarray(np.full((20, 20, 3), 200, np.uint8)).save(photos / "light" / "008-new.png")
    damaged = next(folder.glob("train/*.parquet"))
    damaged.chmod(0o600)  # in place: the parts of a ShardSet may have a second name in a later one
    damaged.write_bytes(b"damaged" + damaged.read_bytes()[7:])
    quiet.ddpm(*command)
    newest = shard_sets(quiet)[0]
    assert newest != folder
    inodes = [{p.stat().st_ino for p in s.rglob("*.parquet")} for s in (folder, newest)]
    assert 0 < len(inodes[1] - inodes[0]) <= 10
    assert len(inodes[1] & inodes[0]) > 20
    assert damaged.stat().st_ino not in inodes[1]
    assert sum(json.loads((newest / "manifest.json").read_text())["stats"]["class_counts"]) == 65


def test_archives_are_looked_into_by_tasks_of_which_one_is_killed_and_one_finds_damage(
    head: Head, tmp_path: Path
) -> None:
    make_photos(tmp_path / "photos", count=2, copies=3)
    archives = tmp_path / "archives"
    archives.mkdir()
    with tarfile.open(archives / "0.tar.gz", "w:gz", compresslevel=1, dereference=True) as tar:
        for photo in sorted((tmp_path / "photos").rglob("*.png")):
            tar.add(photo, photo.relative_to(tmp_path / "photos"))
    for i in range(1, 8):
        os.link(archives / "0.tar.gz", archives / f"{i}.tar.gz")
    command = tiny_command("preprocess", f"data.source={archives}", *PHOTOS)
    place = Workplace(tmp_path, head.joined)
    process = place.start(*command)
    try:
        wait_for(lambda: ray_workers(head.pid, "ray::look"), "a task", process)[0].kill()
        output, _ = process.communicate(timeout=HANG)
    finally:
        end(process)
    assert process.returncode == 0, output
    stats = place.manifest("preprocess")["stats"]
    assert stats["class_counts"] == [24, 24]
    assert len(list((tmp_path / "runs" / "index").iterdir())) == 8

    (archives / "a.tar.gz").write_bytes(b"rubbish")
    os.link(archives / "0.tar.gz", archives / "b.tar.gz")
    output = place.ddpm(*command, code=2)
    assert output.splitlines()[-1].startswith(
        f"error: data.source: {archives}/a.tar.gz is truncated"
    )
    assert "Traceback" not in output


def test_more_bad_images_than_allowed_are_refused() -> None:
    config = DataConfig(source="x", image_size=8, channels=1, max_bad_fraction=0.1)
    bad = [{"key": f"{i}.png", "reason": "the file is empty"} for i in range(11)]
    check_bad_share(bad[:10], 100, config)
    with pytest.raises(DataError, match=r"11 of 100 images .* data.max_bad_fraction=0.1 allows"):
        check_bad_share(bad, 100, config)
    lenient = config.model_copy(update={"max_bad_fraction": 1.0})
    check_bad_share(bad, 12, lenient)
    with pytest.raises(DataError, match=r"none of its 11 images can be used \(0.png: the file is"):
        check_bad_share(bad, 11, lenient)
