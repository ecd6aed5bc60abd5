"""Parts: what is written is read back, in both encodings, and damage is noticed."""

import io
import json
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.data.parts import read_parts
from pipeline.data.shards import (
    NO_LABEL,
    encode_part,
    images_of,
    labels_of,
    read_part,
    split_of,
)
from pipeline.errors import CorruptArtifact
from tests import shard_sets

COUNT = 20
LABELS = [i % 3 or None for i in range(COUNT)]
KEYS = [f"k{i}" for i in range(COUNT)]
ENCODINGS = ["raw", "png"]


def some_images(channels: int = 3, count: int = COUNT) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (count, 4, 6, channels), dtype=np.uint8)


def part(encoding: str, channels: int = 3) -> bytes:
    return encode_part(some_images(channels), LABELS, KEYS, ["a", "b", "c"], encoding)


def write_shard_set(folder: str, encoding: str) -> np.ndarray:
    images = some_images()
    sizes = [8, 8, COUNT - 16]
    shard_sets.write_shard_set(folder, images, LABELS, KEYS, ["a", "b", "c"], sizes, encoding)
    return images


def read(folder: Path) -> pa.Table:
    """All parts."""
    parts = shard_sets.parts_of(str(folder))
    return pa.concat_tables([read_part(str(folder), entry) for entry in parts])


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_parts_are_read_back_in_order(tmp_path: Path, encoding: str) -> None:
    images = write_shard_set(str(tmp_path), encoding)
    got = read(tmp_path)
    assert np.array_equal(images_of(got), images)
    assert labels_of(got).tolist() == [i % 3 or NO_LABEL for i in range(COUNT)]
    assert got["key"].to_pylist() == KEYS


def test_a_shard_set_that_is_not_complete_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="there is no complete ShardSet at"):
        read_parts(str(tmp_path), "train")


@pytest.mark.parametrize("encoding", ENCODINGS)
@pytest.mark.parametrize("channels", [1, 3])
def test_a_slice_of_a_table_gives_its_own_images(encoding: str, channels: int) -> None:
    images = some_images(channels)
    table = pq.read_table(io.BytesIO(part(encoding, channels)))
    assert np.array_equal(images_of(table), images)
    assert np.array_equal(images_of(table.slice(5, 7)), images[5:12])
    assert np.array_equal(images_of(table.slice(5).slice(2, 3)), images[7:10])
    assert np.array_equal(images_of(table.take([9, 3, 3])), images[[9, 3, 3]])
    several = pa.concat_tables([table.slice(15), table.slice(0, 2), table.slice(4, 0)])
    assert several["image"].num_chunks > 1
    assert np.array_equal(images_of(several), images[[15, 16, 17, 18, 19, 0, 1]])
    nothing = images_of(table.slice(3, 0))
    assert (nothing.shape, nothing.dtype) == ((0, 4, 6, channels), np.uint8)


def test_raw_images_are_not_copied() -> None:
    table = pq.read_table(io.BytesIO(part("raw"))).slice(3, 10)
    buffer = table["image"].chunk(0).buffers()[1]
    address = images_of(table).__array_interface__["data"][0]
    assert address == buffer.address + 3 * 4 * 6 * 3


def test_a_raw_part_is_fixed_length_binary_with_the_shape_beside_it() -> None:
    file = pq.ParquetFile(io.BytesIO(part("raw")))
    assert file.schema_arrow.names == ["image", "label", "key"]
    assert file.schema.column(0).physical_type == "FIXED_LEN_BYTE_ARRAY"
    metadata = file.schema_arrow.metadata
    assert json.loads(metadata[b"shape"]) == [4, 6, 3]
    assert json.loads(metadata[b"class_names"]) == ["a", "b", "c"]
    cell = file.read()["image"][3].as_py()
    assert np.array_equal(np.frombuffer(cell, np.uint8).reshape(4, 6, 3), some_images()[3])


def test_a_png_part_holds_files_that_any_viewer_opens() -> None:
    table = pq.read_table(io.BytesIO(part("png", channels=1)))
    cell = table["image"][3].as_py()
    assert cell["path"] is None
    image = Image.open(io.BytesIO(cell["bytes"]))
    assert (image.format, image.mode, image.size) == ("PNG", "L", (6, 4))
    assert np.array_equal(np.asarray(image), some_images(1)[3, ..., 0])


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_the_same_images_give_the_same_bytes(encoding: str) -> None:
    assert part(encoding) == part(encoding)
    transposed = np.asfortranarray(some_images())
    again = encode_part(transposed, LABELS, KEYS, ["a", "b", "c"], encoding)
    assert again == part(encoding), "whatever their order in memory"


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_part_may_be_without_classes_and_without_images(encoding: str) -> None:
    empty = encode_part(some_images(count=0), [], [], [], encoding)
    assert images_of(pq.read_table(io.BytesIO(empty))).shape == (0, 4, 6, 3)
    unlabelled = encode_part(some_images(count=2), [None, None], ["x", "y"], [], encoding)
    table = pq.read_table(io.BytesIO(unlabelled))
    assert table["label"].type == pa.int64()
    assert table["label"].null_count == 2


def test_a_part_has_room_for_the_names_of_many_classes() -> None:
    names = [f"n{i:08d}, the synset of that number" for i in range(60_000)]
    data = encode_part(some_images(), LABELS, KEYS, names)
    assert json.loads(pq.read_schema(io.BytesIO(data)).metadata[b"class_names"]) == names


def test_row_groups_hold_512_images() -> None:
    images = np.zeros((1100, 1, 1, 1), np.uint8)
    data = encode_part(images, [None] * 1100, ["k"] * 1100, [])
    footer = pq.read_metadata(io.BytesIO(data))
    assert [footer.row_group(i).num_rows for i in range(footer.num_row_groups)] == [512, 512, 76]
    assert images_of(pq.read_table(io.BytesIO(data))).shape == (1100, 1, 1, 1)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_a_damaged_part_is_noticed(tmp_path: Path, encoding: str) -> None:
    write_shard_set(str(tmp_path), encoding)
    path = tmp_path / "train" / "part-00001.parquet"
    data = bytearray(path.read_bytes())
    data[len(data) // 3] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(CorruptArtifact, match="part-00001.parquet does not match its sha256"):
        read(tmp_path)


def test_a_missing_part_is_noticed(tmp_path: Path) -> None:
    write_shard_set(str(tmp_path), "raw")
    (tmp_path / "train" / "part-00001.parquet").unlink()
    with pytest.raises(CorruptArtifact, match="part-00001.parquet is missing: delete"):
        read(tmp_path)


def test_a_reader_of_single_row_groups_notices_damage_to_the_pixels() -> None:
    data = bytearray(part("raw"))
    middle = data.index(some_images()[10].tobytes()[:16])  # noise is stored as it is
    assert pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True).read_row_group(0)
    data[middle] ^= 1
    with pytest.raises(OSError, match="CRC"):
        pq.ParquetFile(io.BytesIO(data), page_checksum_verification=True).read_row_group(0)


def test_the_held_out_share_is_about_right_and_belongs_to_the_key() -> None:
    keys = [f"cats/{i}.png" for i in range(10_000)]
    held_out = [key for key in keys if split_of(key, 0.15) == "holdout"]
    assert len(held_out) == pytest.approx(1500, abs=150)
    more = {key for key in keys if split_of(key, 0.3) == "holdout"}
    assert more.issuperset(held_out), "raising the share moves none back to training"
    assert all(split_of(key, 0.0) == "train" for key in keys)
