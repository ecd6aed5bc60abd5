"""Images in every format as independent writers make them, and looking at what a format finds."""

import io
import json
import os
import tarfile
import zipfile
from collections.abc import Callable
from types import ModuleType
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fsspec.core import url_to_fs
from PIL import Image

from pipeline.data.formats.common import Member
from pipeline.data.place import Place
from pipeline.errors import DataError
from pipeline.storage import sha256

RNG = np.random.default_rng(0)
GREY = RNG.integers(0, 256, (11, 6, 5), dtype=np.uint8)
COLOUR = RNG.integers(0, 256, (7, 4, 5, 3), dtype=np.uint8)
PHOTOS = RNG.integers(0, 256, (5, 32, 32, 3), dtype=np.uint8)
CLASSES = np.array([2, 0, 1, 2, 2, 1, 0, 1, 2, 0, 1], np.uint8)
LARGE = np.random.default_rng(1).integers(0, 256, (64, 512, 512), dtype=np.uint8)


def png(i: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(COLOUR[i]).save(buffer, "PNG")
    return buffer.getvalue()


PNG = [png(i) for i in range(len(COLOUR))]
TREE = {
    "cat/a.png": PNG[0],
    "cat/deep/b.JPG": PNG[1],
    "dog/ü.webp": PNG[2],
    "c.png": PNG[3],
    "d" * 90 + "/" + "e" * 60 + ".png": PNG[4],
}
TREE_LABELS = ["cat", "cat", "dog", None, "d" * 90]


def put(place: Place, name: str, data: bytes) -> None:
    fs, root = url_to_fs(place.uri)
    fs.makedirs(os.path.dirname(f"{root}/{name}"), exist_ok=True)
    fs.pipe_file(f"{root}/{name}", data)


def look(module: ModuleType, place: Place, name: str) -> dict[str, Member]:
    members = list(module.index(place, name))
    found = {member.name: member for member in members}
    assert len(found) == len(members)
    return found


def contents(
    module: ModuleType, place: Place, name: str, members: list[Member]
) -> list[bytes | np.ndarray]:
    return list(module.read(place, name, [member.where for member in members]))


def check(module: ModuleType, place: Place, name: str, wanted: dict[str, object]) -> None:
    """The file holds just these images; any run of them can be read, and has the digest it had."""
    members = look(module, place, name)
    assert list(members) == list(wanted)
    assert not [member.bad for member in members.values() if member.bad]
    for run in (list(members.values()), list(members.values())[2:4]):
        read = contents(module, place, name, run)
        for member, content in zip(run, read, strict=True):
            expected = wanted[member.name]
            if isinstance(expected, np.ndarray):
                assert isinstance(content, np.ndarray)
                assert (content.shape, content.dtype) == (expected.shape, np.uint8)
                assert np.array_equal(content, expected)
                content = content.tobytes()
            else:
                assert content == expected
            assert sha256(content) == member.digest


def labels(module: ModuleType, place: Place, name: str) -> dict[str, int | str | None]:
    return {member.name: member.label for member in module.index(place, name)}


def bad(module: ModuleType, place: Place, name: str) -> dict[str, str]:
    return {member.name: member.bad for member in module.index(place, name) if member.bad}


def check_refused(
    module: ModuleType, place: Place, name: str, files: dict[str, bytes], sentence: str
) -> None:
    """With these files, `name` is refused in one sentence, which has `sentence` in it."""
    for other, data in files.items():
        put(place, other, data)
    with pytest.raises(DataError, match=sentence) as refused:
        list(module.index(place, name))
    assert str(refused.value).startswith(f"data.source: {place.uri}/")
    assert "\n" not in str(refused.value)


# --- writers ------------------------------------------------------------------------------------


def tar(entries: dict[str, bytes] | list[tuple[str, bytes]], mode: str = "w") -> bytes:
    """As Python writes it."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode=mode) as archive:
        for name, data in entries.items() if isinstance(entries, dict) else entries:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def zipped(entries: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    """As Python writes it."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", method) as archive:
        for name, data in entries.items():
            archive.writestr(name, data)
    return buffer.getvalue()


FLAGS, METHOD, CRC, PACKED, SIZE, OFFSET, NAME = 8, 10, 16, 20, 24, 42, 46


def central(data: bytes, field: int, value: bytes) -> bytes:
    """A zip with bytes of its table of contents changed, at `field` of the first entry."""
    position = data.index(b"PK\1\2") + field
    return data[:position] + value + data[position + len(value) :]


def table(data: pa.Table, **options: object) -> bytes:
    sink = io.BytesIO()
    pq.write_table(data, sink, **options)
    return sink.getvalue()


PAGES: dict[str, Any] = {"compression": None, "use_dictionary": False, "write_batch_size": 1}
"""So that pages are of 1 MiB; pyarrow else makes one of all images of a row group."""


def hugging_face(
    images: list[bytes | None], labels: list[int] | None = None, column: str = "image"
) -> pa.Table:
    """As `datasets` writes Image and ClassLabel."""
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    rows = [
        None if raw is None else {"bytes": raw, "path": f"{i}.png"} for i, raw in enumerate(images)
    ]
    fields, columns = [(column, kind)], [pa.array(rows, kind)]
    features: dict[str, object] = {column: {"_type": "Image"}}
    if labels is not None:
        fields.append(("label", pa.int64()))
        columns.append(pa.array(labels, pa.int64()))
        features["label"] = {"names": ["cat", "dog", "owl"], "_type": "ClassLabel"}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    return pa.Table.from_arrays(columns, schema=pa.schema(fields, metadata=metadata))


def numbered(contents: list[object]) -> dict[str, object]:
    return {f"{i:05d}": content for i, content in enumerate(contents)}


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


def idx_bytes(values: np.ndarray) -> bytes:
    """The IDX file of a uint8 array, by the format's description."""
    header = bytes([0, 0, 8, values.ndim])
    return header + b"".join(n.to_bytes(4, "big") for n in values.shape) + values.tobytes()


TEN = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def cifar_bytes(*labels: list[int]) -> bytes:
    """By the description at the data set's page: labels, then the red, green and blue plane."""
    rows = zip(*labels, PHOTOS, strict=True)
    return b"".join(
        bytes(row[:-1]) + b"".join(row[-1][:, :, c].tobytes() for c in range(3)) for row in rows
    )


def npy(values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, values)
    return buffer.getvalue()


def npz(save: Callable[..., None] = np.savez, **values: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    save(buffer, **values)
    return buffer.getvalue()
