"""`ddpm new`: the config that it prints runs as it stands."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageDraw

from pipeline.config import load_config
from tests.conftest import ENVIRONMENT, Workplace
from tests.s3 import S3

RNG = np.random.default_rng(0)


def photo(kind: str) -> Image.Image:
    """A disc or a square before a sky of some colour, larger than wide."""
    width, height = (int(side) for side in RNG.integers((40, 30), (90, 60)))
    image = Image.new("RGB", (width, height), tuple(RNG.integers(120, 255, 3).tolist()))
    x, y, r = width * RNG.uniform(0.3, 0.7), height * RNG.uniform(0.3, 0.7), height / 5
    draw = getattr(ImageDraw.Draw(image), kind)
    draw((x - r, y - r, x + r, y + r), fill=tuple(RNG.integers(0, 100, 3).tolist()))
    return image


@pytest.fixture
def place(tmp_path: Path) -> Workplace:
    for kind in ("ellipse", "rectangle"):
        (tmp_path / "photos" / kind).mkdir(parents=True)
        for i in range(30):
            photo(kind).save(tmp_path / "photos" / kind / f"{i}.jpg")
    (tmp_path / "photos" / "ellipse" / "30.jpg").write_bytes(b"no photo")
    return Workplace(tmp_path)


def test_what_new_prints_runs_as_it_stands(place: Workplace) -> None:
    command = [sys.executable, "-m", "tasks", "new", "photos", "--minutes", "1", "--size", "16"]
    printed = subprocess.run(
        command, cwd=place.folder, env=ENVIRONMENT, capture_output=True, text=True, check=True
    )
    text = printed.stdout
    (place.folder / "my.yaml").write_text(text)
    assert "looking at photos" in printed.stderr
    assert text.startswith("# 61 images, 2 classes, ")
    config = load_config(str(place.folder / "my.yaml"))
    assert (config.name, config.data.channels, config.data.holdout) == ("photos", 3, 0.0)
    few = ["training.steps=20", "training.warmup_steps=2", "training.log_every=5"]
    few += ["training.checkpoint_every=10", "evaluation.samples=20"]
    few += ["evaluation.classifier_epochs=2", "sampling.steps=4"]
    sets = [word for value in few for word in ("--set", value)]
    output = place.ddpm("run", "my.yaml", *sets)
    assert "serve    " in output
    assert place.manifest("preprocess")["stats"]["num_images"] == {"train": 60, "holdout": 0}
    assert len(list((place.folder / "runs" / "sample").glob("*/grid.png"))) == 1


def test_a_bucket_is_looked_at_like_a_folder(
    place: Workplace, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = S3()
    try:
        for path in (place.folder / "photos").rglob("*.jpg"):
            server.put(f"snapshots/{path.parent.name}/{path.name}", path.read_bytes())
        output = place.ddpm("new", "s3://bucket/snapshots", "--size", "8", **server.environment())
    finally:
        server.close()
    assert "# 61 images, 2 classes, " in output
    assert 'source: "s3://bucket/snapshots"' in output
    assert "image_size: 8  # as asked for" in output


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "data.source='nowhere' does not exist"),
        (["photo\udcff"], "'photo\\udcff' has letters that no config can hold"),
        (["photos", "--size", "31"], "--size 31: the network halves images to 16 pixels"),
        (["photos", "--name", "a b"], "'a b' is not the name of a model"),
        (["photos", "--minutes", "0"], "--minutes"),
    ],
)
def test_a_mistake_is_one_sentence(place: Workplace, arguments: list[str], sentence: str) -> None:
    assert sentence in place.quick("new", *arguments, code=2)
