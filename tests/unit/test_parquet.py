"""Parquet files as a source: Hugging Face's, binary columns, and the parts of a ShardSet."""

import io
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.data.formats import parquet
from pipeline.data.place import Place
from pipeline.data.shards import encode_part
from pipeline.storage import sha256
from tests.unit.formats import (
    COLOUR,
    GREY,
    LARGE,
    PAGES,
    PNG,
    bad,
    check,
    check_refused,
    contents,
    hugging_face,
    labels,
    numbered,
    put,
    table,
)


@pytest.mark.parametrize("column", ["image", "img", "picture"])
def test_parquet_is_read_as_hugging_face_writes_it(place: Place, column: str) -> None:
    data = hugging_face(PNG, [0, 2, 1, 0, -1, 2, 1], column)
    put(place, "a.parquet", table(data, row_group_size=3))
    check(parquet, place, "a.parquet", numbered(list(PNG)))
    found = list(labels(parquet, place, "a.parquet").values())
    assert found == ["cat", "owl", "dog", "cat", None, "owl", "dog"]
    assert [m.where for m in parquet.index(place, "a.parquet")][2:5] == [(0, 2), (1, 0), (1, 1)]


@pytest.mark.parametrize(
    ("kind", "values", "wanted"),
    [
        (pa.int8(), [4, 0, None], [4, 0, None]),
        (pa.uint64(), [2**64 - 1, 0, 1], [2**63 - 1, 0, 1]),
        (pa.string(), ["a", "", None], ["a", None, None]),
        (pa.dictionary(pa.int8(), pa.string()), ["a", "b", "a"], ["a", "b", "a"]),
        (pa.list_(pa.int64()), [[1], [2], []], [None, None, None]),
    ],
)
@pytest.mark.parametrize("image", [pa.binary(), pa.large_binary(), pa.binary_view()])
def test_binary_columns_and_every_kind_of_label_are_read(
    local: Place, image: pa.DataType, kind: pa.DataType, values: list[object], wanted: list[object]
) -> None:
    data = pa.table(
        {"photo": pa.array(PNG[:3], image), "cls": pa.array(values, kind), "n": [1, 2, 3]}
    )
    put(local, "a.parquet", table(data))
    check(parquet, local, "a.parquet", numbered(list(PNG[:3])))
    assert list(labels(parquet, local, "a.parquet").values()) == wanted


@pytest.mark.parametrize("shape", [(6, 5, 1), (4, 5, 3)])
def test_the_parts_of_a_shard_set_are_a_source_of_pixels(
    place: Place, shape: tuple[int, int, int]
) -> None:
    images = GREY[..., None] if shape[2] == 1 else COLOUR
    numbers = [None, *[i % 2 for i in range(len(images) - 1)]]
    keys = [f"k/{i}" for i in range(len(images))]
    put(place, "p.parquet", encode_part(images, numbers, keys, ["cat", "dog"]))
    check(parquet, place, "p.parquet", numbered(list(images)))
    assert list(labels(parquet, place, "p.parquet").values())[:3] == [None, "cat", "dog"]


def test_a_null_image_and_a_label_without_a_name_are_bad(local: Place) -> None:
    put(local, "a.parquet", table(hugging_face([PNG[0], None, PNG[2], PNG[3]], [0, 0, 3, -2])))
    assert bad(parquet, local, "a.parquet") == {
        "00001": "it is null",
        "00002": "its label is 3, of 3 classes",
        "00003": "its label is -2, of 3 classes",
    }


def test_only_the_row_groups_and_the_column_that_are_asked_for_are_read(
    local: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    put(local, "a.parquet", table(hugging_face(PNG, [0] * 7), row_group_size=2))
    members = list(parquet.index(local, "a.parquet"))
    asked = []
    real = pq.ParquetFile.iter_batches

    def watch(self: pq.ParquetFile, *args: object, **options: object) -> Iterator[pa.RecordBatch]:
        asked.append((options["row_groups"], options["columns"]))
        return real(self, *args, **options)

    monkeypatch.setattr(pq.ParquetFile, "iter_batches", watch)
    run = [members[6], members[3], members[2]]  # in any order
    assert contents(parquet, local, "a.parquet", run) == [PNG[6], PNG[3], PNG[2]]
    groups = [3, 1, 1]  # who goes back within a group reads it again
    assert asked == [([group], ["image.bytes"]) for group in groups]


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"", "is truncated or damaged"),
        (b"PAR1" * 30, "is truncated or damaged"),
        (table(hugging_face(PNG))[:-20], "is truncated or damaged"),
        (table(pa.table({"a": [1], "url": ["x"]})), "has none of its columns a, url as images"),
        (
            table(pa.table({"a": PNG[:1], "b": PNG[:1]})),
            r"has several \(a, b\) of its columns a, b as images: name one image",
        ),
        (
            table(pa.table({"image": pa.array([b"123"], pa.binary(3))})),
            "has none of its columns image as images",
        ),
    ],
)
def test_a_parquet_file_without_images_is_refused_in_one_sentence(
    local: Place, data: bytes, sentence: str
) -> None:
    check_refused(parquet, local, "a.parquet", {"a.parquet": data}, f"a.parquet {sentence}")


def test_of_a_small_file_that_unpacks_to_gigabytes_little_is_held_at_once(local: Place) -> None:
    page = bytes(2**20)
    column = pa.DictionaryArray.from_arrays(pa.array([0] * 3000, pa.int32()), pa.array([page]))
    data = table(pa.table({"image": column}), store_schema=False)  # it is then simply binary
    assert len(data) < 2**20
    put(local, "a.parquet", data)
    held = []
    for member, _ in zip(parquet.index(local, "a.parquet"), range(70), strict=False):
        assert member.digest == sha256(page)
        held.append(pa.total_allocated_bytes())
    assert len(held) == 70
    assert max(held) < 150 * 2**20  # of 3 GB


def test_of_a_large_row_group_little_is_held_at_once(
    local: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    cells = [image.tobytes() for image in LARGE]
    put(local, "a.parquet", table(pa.table({"image": cells}), **PAGES))
    asked: list[int] = []
    real = Place.open

    class Watched(io.FileIO):
        def read(self, size: int | None = -1) -> bytes:  # type: ignore[override]
            asked.append(size or 0)
            return super().read(size)  # type: ignore[return-value]

    monkeypatch.setattr(Place, "open", lambda self, name: Watched(real(self, name).name))
    before, held = pa.total_allocated_bytes(), []
    members = []
    for member in parquet.index(local, "a.parquet"):
        members.append(member)
        held.append(pa.total_allocated_bytes() - before)
    for content, cell in zip(
        parquet.read(local, "a.parquet", [member.where for member in members]), cells, strict=True
    ):
        assert content == cell
        held.append(pa.total_allocated_bytes() - before)
    assert max(asked) <= 2 * 2**20, "of 16 MiB"
    assert max(held) < 13 * 2**20, "32 images of 256 KiB, and what is read ahead of them"


def test_a_cell_of_an_unlikely_size_is_bad(local: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parquet, "MAX_IMAGE_BYTES", len(PNG[0]))
    put(local, "a.parquet", table(hugging_face([PNG[0], PNG[0] + b"x"])))
    assert bad(parquet, local, "a.parquet") == {"00001": "it has more than 1,073,741,824 bytes"}
