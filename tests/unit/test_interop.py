"""Parts are opened by other tools, with the right pixels, labels and keys."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipeline.data.shards import encode_part, part_path
from tests import needs

COUNT, SHAPE = 12, (6, 5, 3)
IMAGES = np.random.default_rng(0).integers(0, 256, (COUNT, *SHAPE), dtype=np.uint8)
LABELS = [i % 3 if i % 4 else None for i in range(COUNT)]
KEYS = [f"birds/{i:02d}.png" for i in range(COUNT)]
NAMES = ["duck", "goose", "swan"]
ENCODINGS = ["raw", "png"]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A folder of two parts for each encoding."""
    folders = {}
    for encoding in ENCODINGS:
        folders[encoding] = tmp_path_factory.mktemp(encoding)
        (folders[encoding] / "train").mkdir()
        for index, rows in enumerate((slice(0, 7), slice(7, COUNT))):
            data = encode_part(IMAGES[rows], LABELS[rows], KEYS[rows], NAMES, encoding)
            (folders[encoding] / part_path("train", index)).write_bytes(data)
    return folders


def tool(name: str) -> Any:
    """Another package, or a skipped test that says where to get it."""
    return needs.package(name, "interop")


def glob(parts: dict[str, Path], encoding: str) -> str:
    return str(parts[encoding] / "train" / "*.parquet")


def pixels(cell: Any) -> np.ndarray:
    """The image in a cell of the column `image`, whichever the encoding."""
    if isinstance(cell, dict):
        assert cell["path"] is None
        return np.asarray(Image.open(io.BytesIO(cell["bytes"])))
    return np.frombuffer(cell, np.uint8).reshape(SHAPE)


def check(images: Any, labels: Any, keys: Any) -> None:
    """Columns are those that were written."""
    assert list(keys) == KEYS
    assert list(labels) == LABELS
    assert len(images) == COUNT
    for cell, image in zip(images, IMAGES, strict=True):
        assert np.array_equal(pixels(cell), image)


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_pyarrow_opens_parts(parts: dict[str, Path], encoding: str) -> None:
    table = pq.read_table(parts[encoding] / "train")
    assert json.loads(table.schema.metadata[b"shape"]) == list(SHAPE)
    assert json.loads(table.schema.metadata[b"class_names"]) == NAMES
    check(*(table[name].to_pylist() for name in ("image", "label", "key")))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_pandas_opens_parts(parts: dict[str, Path], encoding: str) -> None:
    pandas = tool("pandas")
    frame = pandas.read_parquet(parts[encoding] / "train")
    labels = [None if pandas.isna(label) else label for label in frame["label"]]
    check(frame["image"], labels, frame["key"])


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_duckdb_opens_parts(parts: dict[str, Path], encoding: str) -> None:
    duckdb = tool("duckdb")
    with duckdb.connect() as connection:
        rows = connection.execute(
            "SELECT image, label, key FROM read_parquet(?) ORDER BY key", [glob(parts, encoding)]
        ).fetchall()
        check(*zip(*rows, strict=True))
        counts = connection.execute(
            "SELECT label, count(*) FROM read_parquet(?) GROUP BY label ORDER BY label NULLS LAST",
            [glob(parts, encoding)],
        ).fetchall()
    assert counts == [(label, LABELS.count(label)) for label in (0, 1, 2, None)]


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_polars_opens_parts(parts: dict[str, Path], encoding: str) -> None:
    polars = tool("polars")
    frame = polars.read_parquet(glob(parts, encoding))
    check(*(frame[name].to_list() for name in ("image", "label", "key")))


@pytest.mark.parametrize("encoding", ENCODINGS)
def test_hugging_face_datasets_opens_parts_and_knows_their_classes(
    parts: dict[str, Path], encoding: str, tmp_path: Path
) -> None:
    datasets = tool("datasets")
    datasets.disable_progress_bars()
    found = datasets.load_dataset(
        "parquet", data_files=glob(parts, encoding), split="train", cache_dir=str(tmp_path)
    )
    assert found.features["label"] == datasets.ClassLabel(names=NAMES)
    assert found.features["key"] == datasets.Value("string")
    if encoding == "png":
        assert found.features["image"] == datasets.Image()
        assert found[3]["image"].size == (SHAPE[1], SHAPE[0])
        images = [{"bytes": png_of(image), "path": None} for image in found["image"]]
    else:
        images = found["image"]
    check(images, found["label"], found["key"])


def png_of(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
