"""From an input shard to its parts, and what is said of them."""

import io
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import storage
from pipeline.config import load_config
from pipeline.data import parts as parts_module
from pipeline.data import shard_list
from pipeline.data import summary as summary_module
from pipeline.data.config import DataConfig
from pipeline.data.input_shards import cut
from pipeline.data.parts import Parts
from pipeline.data.preprocess import preprocess_shard, record_uri
from pipeline.data.shard_list import SHARDS
from pipeline.data.shards import encode_part, images_of, part_path
from pipeline.data.source import scan
from pipeline.data.summary import Tally, contact_sheet, left_out, summary
from pipeline.errors import ConfigError, DataError
from pipeline.storage import Manifest
from tasks.stages import preprocess
from tasks.stages.stage import Outcome, StageContext
from tests.conftest import ROOT


def image(width: int, height: int, value: int = 0) -> bytes:
    buffer = io.BytesIO()
    pixels = np.full((height, width, 3), value, np.uint8)
    pixels[:, :, 1] = 255
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


FILES = {
    "a/0.png": image(8, 8, 0),
    "a/1.png": image(16, 24, 100),
    "b/2.png": image(8, 8, 200),
    "b/3.png": image(7, 40, 1),  # too small
    "b/4.png": image(8, 81, 2),  # too narrow
    "b/5.png": b"rubbish",
    "b/6.png": image(8, 8, 0),  # a double of a/0.png
    "c.png": image(9, 9, 40),
}


def made(tmp_path: Path, **more: Any) -> tuple[DataConfig, Any, list[dict[str, Any]], str]:
    """The config, the source, the records and the folder of FILES, all on the training side."""
    for name, data in FILES.items():
        (tmp_path / "set" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "set" / name).write_bytes(data)
    config = DataConfig(
        source=str(tmp_path / "set"),
        image_size=8,
        channels=3,
        holdout=0.0,
        min_size=8,
        max_aspect=10.0,
        images_per_shard=3,
        **more,
    )
    source, folder = scan(config), str(tmp_path / "out")
    records = [
        preprocess_shard(shard, config, source.class_names, folder)
        for shard in cut(source, config.images_per_shard)
    ]
    return config, source, records, folder


def tally_of(records: list[dict[str, Any]]) -> Tally:
    tally = Tally()
    for index, record in enumerate(records):
        tally.add(index, record)
    return tally


def parts(folder: Path | str, records: list[dict[str, Any]]) -> Parts:
    """Those to train on."""
    rows = map(shard_list.row_of, records)
    return Parts(str(folder), "train", shard_list.table_of(rows))


def test_every_image_of_a_source_is_in_a_part_or_accounted_for(tmp_path: Path) -> None:
    config, source, records, _folder = made(tmp_path)
    stats = summary(config, source, tally_of(records))
    assert stats["num_images"] == {"train": 4, "holdout": 0}
    assert stats["class_names"] == ["a", "b"]
    assert stats["class_counts"] == [2, 1]
    assert stats["num_unlabelled"] == 1
    assert (stats["num_bad"], [bad["key"] for bad in stats["bad"]]) == (1, ["b/5.png"])
    assert (stats["num_too_small"], stats["num_too_narrow"]) == (1, 1)
    assert stats["duplicates"] == [["b/6.png", "a/0.png"]]
    assert stats["source_sizes"] == {"width": [8, 8, 16], "height": [8, 8, 24]}
    assert left_out(stats) == "1 unusable, 1 duplicated, 1 too small, 1 too narrow"


def test_mean_and_deviation_are_of_the_stored_pixels(tmp_path: Path) -> None:
    config, source, records, folder = made(tmp_path)
    stats = summary(config, source, tally_of(records))
    firsts = [  # the measured ones: of each part the first, since none has nine
        images_of(pq.read_table(f"{folder}/{record['files'][0]['path']}"))[0]
        for record in records
        if record["files"]
    ]
    pixels = np.stack(firsts).reshape(-1, 3).astype(float)
    assert stats["pixel_mean"] == pytest.approx(pixels.mean(0), abs=1e-3)
    assert stats["pixel_std"] == pytest.approx(pixels.std(0), abs=1e-3)


def test_a_shard_can_be_made_again_byte_for_byte(tmp_path: Path) -> None:
    config, source, records, folder = made(tmp_path)
    shard = cut(source, config.images_per_shard)[0]
    again = preprocess_shard(shard, config, source.class_names, str(tmp_path / "again"))
    assert again == records[0] == storage.read_json(record_uri(folder, 0))


@pytest.mark.parametrize("encoding", ["raw", "png"])
def test_a_contact_sheet_has_a_column_a_class(tmp_path: Path, encoding: str) -> None:
    _, _, records, folder = made(tmp_path, encoding=encoding)
    of = parts(folder, records)
    sheet = np.asarray(Image.open(io.BytesIO(contact_sheet(of, 2))))
    assert sheet.shape == (10 * 72 + 8, 2 * 72 + 8, 3)
    assert sheet[40, 40].tolist() == [0, 255, 0], "a/0.png"
    assert sheet[112, 40].tolist() == [100, 255, 100], "a/1.png"
    assert sheet[40, 112].tolist() == [200, 255, 200], "b/2.png"
    assert sheet[112, 112].tolist() == [128, 128, 128], "there is no more of b"
    spread = np.asarray(Image.open(io.BytesIO(contact_sheet(of, 0))))
    assert spread.shape == (72 + 8, 16 * 72 + 8, 3)
    assert [spread[40, 40 + 72 * i, 0] for i in range(5)] == [0, 100, 200, 40, 128]


def write_parts(folder: Path, images: list[np.ndarray], labels: list[int | None]) -> Parts:
    """A part of each of the arrays, with the same labels."""
    records = []
    for index, some in enumerate(images):
        data = encode_part(some, labels, [str(i) for i in range(len(some))], ["a"])
        entry = storage.write_bytes(str(folder / part_path("train", index)), data)
        file = {**entry.model_dump(), "path": part_path("train", index)}
        records.append({"digest": "00" * 8, "files": [file], "num_images": {"train": len(some)}})
    return parts(folder, records)


def large_parts(folder: Path, labels: list[int | None]) -> Parts:
    """Three parts of noise, each of the 300 labels; 11 MB together, as they are and decoded."""
    noise = np.random.default_rng(0).integers(0, 256, (300, 64, 64, 3), dtype=np.uint8)
    return write_parts(folder, [noise + np.uint8(index) for index in range(3)], labels)


def test_a_contact_sheet_reads_no_more_than_it_shows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    few = large_parts(tmp_path, [*[0] * 30, *[None] * 270])
    asked = [0]

    class Watched(io.FileIO):
        def read(self, size: int | None = -1) -> bytes:  # type: ignore[override]
            data = super().read(size)
            asked[0] += len(data or b"")
            return data  # type: ignore[return-value]

    monkeypatch.setattr(parts_module, "_open", lambda uri: Watched(uri))
    monkeypatch.setattr(parts_module, "PIECE_BYTES", 2**18)
    contact_sheet(few, 1)
    total = sum(part.entry.bytes for part in few)
    assert asked[0] < total / 4, "the labels, and the beginning of the first part"


@pytest.mark.parametrize("num_classes", [0, 1])
def test_a_contact_sheet_holds_little_of_the_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_classes: int
) -> None:
    monkeypatch.setattr(parts_module, "PIECE_BYTES", 2**18)
    large = large_parts(tmp_path, [*[None] * 290, *[0] * 10])
    before, held = pa.total_allocated_bytes(), []

    def thumbnail(pixels: np.ndarray, side: int) -> np.ndarray:
        held.append(pa.total_allocated_bytes() - before)
        return pixels

    monkeypatch.setattr(summary_module, "thumbnail", thumbnail)
    contact_sheet(large, num_classes)
    assert len(held) > 10
    assert max(held) < 3 * 2**20, "of 11 MB"


def test_large_images_are_small_on_a_contact_sheet(tmp_path: Path) -> None:
    large = write_parts(tmp_path, [np.full((3, 300, 300, 1), 7, np.uint8)], [None] * 3)
    sheet = np.asarray(Image.open(io.BytesIO(contact_sheet(large, 0))))
    assert sheet.shape == (128 + 4, 16 * 130 + 2)
    assert (sheet[2:130, 2:130] == 7).all()


# --- the stage, with its tasks called in this process -------------------------------------------


class Quiet:
    """Progress that nobody sees."""

    def start(self, total: int, unit: str, done: int = 0) -> None: ...

    def update(self, done: int, note: str = "") -> None: ...

    def say(self, sentence: str) -> None: ...


class Stage:
    """Runs the stage on the images of a folder, and says which shards it made itself."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.root = root
        self.made: list[int] = []
        self.dies_after = sys.maxsize
        monkeypatch.setattr(preprocess.in_flight, "results", self._results)

    def _results(self, _: Any, calls: list[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
        for i, call in enumerate(calls):
            if len(self.made) == self.dies_after:
                raise KeyboardInterrupt
            self.made.append(call[0].index)
            yield i, preprocess_shard(*call)

    def write(self, name: str, data: bytes) -> None:
        path = self.root / "set" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)

    def folder(self, id: str) -> Path:
        return self.root / "runs" / "preprocess" / id

    def run(self, id: str, *sets: str) -> Outcome:
        """Into the ShardSet of that name, which is finished then."""
        places = [f"data.source={self.root / 'set'}", f"storage={self.root / 'runs'}"]
        form = ["data.channels=3", "data.images_per_shard=4"]
        config = load_config(str(ROOT / "configs" / "digits.yaml"), [*places, *form, *sets])
        folder, self.made = str(self.folder(id)), []
        no_run, source = (lambda: pytest.fail("MLflow")), scan(config.data)
        context = StageContext(config, id, folder, {}, "", Quiet(), no_run, external=source)
        outcome = preprocess.run(context)
        made = {"stage": "preprocess", "id": id, "inputs": {}, "config": {}, "stats": outcome.stats}
        storage.commit(folder, Manifest(format=1, files=outcome.files, **made))
        return outcome


@pytest.fixture
def stage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Stage:
    """With forty images."""
    stage = Stage(tmp_path, monkeypatch)
    for i in range(40):
        stage.write(f"{i:02d}.png", image(8, 8, i))
    return stage


def parts_of(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*.parquet")}


HTML = b"<html>404 Not Found</html>"


def test_doubles_of_a_bad_image_are_bad_images(stage: Stage) -> None:
    for i in range(60):
        stage.write(f"x{i:02d}.jpg", HTML)
    stage.write("39-again.png", image(8, 8, 39))
    with pytest.raises(DataError, match="60 of 100 images cannot be used, more than") as refused:
        stage.run("a")
    assert "x00.jpg: it is not a PNG" in str(refused.value)
    stats = stage.run("b", "data.max_bad_fraction=0.6").stats
    assert stats["num_bad"] == 60
    assert len({bad["reason"] for bad in stats["bad"]}) == 1
    assert sorted(bad["key"] for bad in stats["bad"]) == [f"x{i:02d}.jpg" for i in range(60)]
    assert stats["duplicates"] == [["39.png", "39-again.png"]]
    assert stats["num_duplicates"] == 1
    assert sum(stats["num_images"].values()) == 40


def test_a_name_that_an_archive_holds_twice_makes_no_double_bad(stage: Stage) -> None:
    import tarfile

    with tarfile.open(stage.root / "set" / "x.tar", "w") as archive:
        for name, data in (("e.png", b"1"), ("e.png", b"2"), ("f.png", b"1")):
            info = tarfile.TarInfo(name)
            pixels = image(8, 8, 200 + int(data))
            info.size = len(pixels)
            archive.addfile(info, io.BytesIO(pixels))
    stats = stage.run("a", "data.max_bad_fraction=0.1").stats
    assert [bad["reason"] for bad in stats["bad"]] == ["the archive holds this name twice"]
    assert stats["duplicates"] == [["x.tar/f.png", "x.tar/e.png"]]


def test_what_a_refused_run_has_made_is_taken_over(stage: Stage) -> None:
    stage.write("40.png", b"rubbish")
    with pytest.raises(DataError, match="cannot be used, more than"):
        stage.run("refused")
    made = stage.made
    assert len(made) > 5
    stage.run("lenient", "data.max_bad_fraction=0.1")
    assert stage.made == []
    assert parts_of(stage.folder("lenient")) == parts_of(stage.folder("refused"))


def test_what_a_killed_run_has_made_is_taken_over_when_an_image_came(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage.dies_after = 6
    with pytest.raises(KeyboardInterrupt):
        stage.run("killed")
    killed, stage.dies_after = stage.made, sys.maxsize
    read_bytes = storage.read_bytes

    def watch(uri: str, *how: Any) -> bytes:
        assert not uri.endswith(".parquet"), "parts are hashed piece by piece"
        return read_bytes(uri, *how)

    monkeypatch.setattr(storage, "read_bytes", watch)
    stage.write("99.png", image(8, 8, 99))
    stage.run("more")
    num_shards = len(shard_list.read(str(stage.folder("more"))))
    assert num_shards - len(killed) <= len(stage.made) <= num_shards - len(killed) + 1


def test_what_vanishes_from_a_run_in_progress_is_made_anew(stage: Stage) -> None:
    stage.run("first")
    shutil.copytree(stage.folder("first"), stage.folder("going"))
    shutil.rmtree(stage.folder("first"))
    (stage.folder("going") / "manifest.json").unlink()
    records = sorted((stage.folder("going") / "parts").iterdir())
    records[0].unlink()
    records[0].symlink_to("vanished")  # it is listed, and gone when it is read
    records[1].write_text("{")
    records[2].write_text("[]")
    path = json.loads(records[3].read_text())["files"][0]["path"]
    (stage.folder("going") / path).unlink()
    stage.run("second")
    assert sorted(stage.made) == [0, 1, 2, 3]


@pytest.mark.parametrize("damage", ["gone", "cut", "changed"])
def test_a_damaged_shard_set_does_not_stand_in_the_way_of_others(stage: Stage, damage: str) -> None:
    stage.run("old")
    kept, num_shards = stage.folder("old") / SHARDS, len(stage.made)
    data = kept.read_bytes()
    if damage == "gone":
        kept.unlink()
    else:
        kept.write_bytes(data[:-9] if damage == "cut" else data.replace(b"sha256", b"sha265"))
    stage.run("new", "data.max_bad_fraction=0.1")
    assert len(stage.made) == num_shards
    stage.run("newer", "data.max_bad_fraction=0.2")
    assert stage.made == []


def test_the_stage_sweeps_its_folder(stage: Stage) -> None:
    stage.run("a")
    left = [stage.folder(id) / "train" / ".part-00000.parquet.0123abcd.tmp" for id in "ab"]
    left[1].parent.mkdir(parents=True)
    for path in left:
        path.write_bytes(b"half")
    stage.run("b", "data.max_bad_fraction=0.1")
    assert [path.exists() for path in left] == [True, False]


def test_shards_too_large_for_the_memory_of_a_task_are_refused() -> None:
    sets = ["data.image_size=512", "data.channels=3", "network.attention_at=[]"]
    digits = str(ROOT / "configs" / "digits.yaml")
    with pytest.raises(
        ConfigError, match=r"images_per_shard=1024 images of 512 .*: use at most 682"
    ):
        load_config(digits, [*sets, "data.images_per_shard=1024"])
    load_config(digits, [*sets, "data.images_per_shard=682"])
