"""From an input shard to its parts, and what is said of them."""

import io
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline import storage
from pipeline.config import load_config
from pipeline.data.input_shards import cut
from pipeline.data.preprocess import preprocess_shard, record_uri
from pipeline.data.shards import images_of
from pipeline.data.sources import DataConfig, scan
from pipeline.data.summary import contact_sheet, left_out, summary
from pipeline.errors import ConfigError
from pipeline.storage import FileEntry
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


def test_every_image_of_a_source_is_in_a_part_or_accounted_for(tmp_path: Path) -> None:
    config, source, records, _folder = made(tmp_path)
    stats = summary(config, source, records)
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
    stats = summary(config, source, records)
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
    files = [FileEntry(**entry) for record in records for entry in record["files"]]
    sheet = np.asarray(Image.open(io.BytesIO(contact_sheet(folder, files, 2))))
    assert sheet.shape == (10 * 72 + 8, 2 * 72 + 8, 3)
    assert sheet[40, 40].tolist() == [0, 255, 0], "a/0.png"
    assert sheet[112, 40].tolist() == [100, 255, 100], "a/1.png"
    assert sheet[40, 112].tolist() == [200, 255, 200], "b/2.png"
    assert sheet[112, 112].tolist() == [128, 128, 128], "there is no more of b"
    spread = np.asarray(Image.open(io.BytesIO(contact_sheet(folder, files, 0))))
    assert spread.shape == (72 + 8, 16 * 72 + 8, 3)
    assert [spread[40, 40 + 72 * i, 0] for i in range(5)] == [0, 100, 200, 40, 128]


def test_shards_too_large_for_the_memory_of_a_task_are_refused() -> None:
    sets = ["data.image_size=512", "data.channels=3", "network.attention_at=[]"]
    digits = str(ROOT / "configs" / "digits.yaml")
    with pytest.raises(
        ConfigError, match=r"images_per_shard=1024 images of 512 .*: use at most 682"
    ):
        load_config(digits, [*sets, "data.images_per_shard=1024"])
    load_config(digits, [*sets, "data.images_per_shard=682"])


PEAK = """
import sys
from pathlib import Path
from pipeline.data.input_shards import cut
from pipeline.data.preprocess import preprocess_shard
from pipeline.data.sources import DataConfig, scan

def peak():  # resource's is never below that of the process that started this one
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])

first, rest = (
    DataConfig(source=source, image_size=256, channels=3, drop_duplicates=False, holdout=0.0,
               images_per_shard=600, encoding=sys.argv[2])
    for source in (sys.argv[1] + "/first", sys.argv[1] + "/rest")
)
(small,), (large,) = (cut(scan(config), config.images_per_shard) for config in (first, rest))
preprocess_shard(small, first, [], sys.argv[1] + "/out")
Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
before = peak()
preprocess_shard(large, rest, [], sys.argv[1] + "/out")
print(large.items.num_rows, peak() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="measures as Linux does")
@pytest.mark.parametrize(("encoding", "times"), [("raw", 2), ("png", 3)])
def test_a_task_takes_the_memory_that_is_stated(tmp_path: Path, encoding: str, times: int) -> None:
    """By MAX_SHARD_BYTES; in a process of its own, for its peak. Noise is as large as PNG."""
    rng = np.random.default_rng(0)
    buffer = io.BytesIO()
    Image.fromarray(rng.integers(0, 256, (256, 256, 3), np.uint8)).save(buffer, "PNG")
    for i in range(304):
        path = tmp_path / ("first" if i < 4 else "rest") / f"{i:03d}.png"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(buffer.getvalue())
    command = [sys.executable, "-c", PEAK, str(tmp_path), encoding]
    output = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    rows, grown = map(int, output.split())
    decoded = rows * 256 * 256 * 3
    assert decoded < grown < times * decoded + 2**24
