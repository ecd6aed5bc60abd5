"""The stored form of a data set: Parquet parts of uint8 pixels, without loss.

Columns: `image`, `label` (int64, null where there is none), `key` (the path within the source). In
the schema's metadata stand the shape [H, W, C] of all images, the names of the classes, and what
Hugging Face's `datasets` needs to know the classes and images by itself. `image` is either

    raw   the pixels as FIXED_LEN_BYTE_ARRAY. It reads some twenty times faster than a tensor
          column, whose elements Parquet would widen to 32 bits.
    png   struct{bytes, path}, Hugging Face's form of an image, with null for the path. Smaller,
          and seen as images by other tools, but read at a thirtieth of the speed.

Pages carry checksums, so that a reader of single row groups notices damage.
"""

import json
import math
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.data.images import from_png, png
from pipeline.errors import CorruptArtifact
from pipeline.seeding import key, uniform
from pipeline.storage import FileEntry

ROW_GROUP_SIZE = 512
PAGE_BYTES = 2**20
"""With one page a row group, writing takes three times the memory, and reading longer."""
NO_LABEL = -1
"""In memory, where a part has null; Hugging Face writes the same where a number is not known."""
SPLITS = ("train", "holdout")


def split_of(image_key: str, holdout: float) -> str:
    """`holdout` for a share of the keys, chosen by their hash, so that more images move none."""
    return "holdout" if uniform(key(0, f"holdout/{image_key}")) < holdout else "train"


def part_path(split: str, index: int) -> str:
    """Where the part of an input shard lies in the ShardSet, e.g. train/part-00003.parquet."""
    return f"{split}/part-{index:05d}.parquet"


def encode_part(
    images: np.ndarray,
    labels: list[int | None],
    keys: list[str],
    class_names: list[str],
    encoding: Literal["raw", "png"] = "raw",
) -> memoryview:
    """A Parquet file of (N, H, W, C) uint8 images; the same input gives the same bytes."""
    column = _raw_column(images) if encoding == "raw" else _png_column(images)
    features = {
        "image": {"_type": "Image"} if encoding == "png" else _value(str(column.type)),
        "label": {"names": class_names, "_type": "ClassLabel"} if class_names else _value("int64"),
        "key": _value("string"),
    }
    schema = pa.schema(
        [("image", column.type), ("label", pa.int64()), ("key", pa.string())],
        metadata={
            "shape": json.dumps(images.shape[1:]),
            "class_names": json.dumps(class_names),
            "huggingface": json.dumps({"info": {"features": features}}),
        },
    )
    columns = [column, pa.array(labels, pa.int64()), pa.array(keys, pa.string())]
    table = pa.Table.from_arrays(columns, schema=schema)
    image_bytes = math.prod(images.shape[1:])
    # memory that is not written to is not taken, but a buffer that grows is copied; the metadata
    # stands in the footer as it is and in base64
    named = sum(map(len, schema.metadata.values()))
    buffer = pa.allocate_buffer(2 * table.nbytes + 3 * named + 2**20)
    sink = pa.FixedSizeBufferWriter(buffer)
    pq.write_table(
        table,
        sink,
        row_group_size=ROW_GROUP_SIZE,
        data_page_size=PAGE_BYTES,
        write_batch_size=max(1, PAGE_BYTES // image_bytes),  # how often pages are measured
        compression="lz4",
        use_dictionary=False,
        write_page_checksum=True,
    )
    return memoryview(buffer.slice(0, sink.tell()))


def _value(dtype: str) -> dict[str, Any]:
    return {"dtype": dtype, "_type": "Value"}


def _raw_column(images: np.ndarray) -> pa.Array:
    kind = pa.binary(int(np.prod(images.shape[1:])))
    pixels = pa.py_buffer(np.ascontiguousarray(images))
    return pa.FixedSizeBinaryArray.from_buffers(kind, len(images), [None, pixels])


def _png_column(images: np.ndarray) -> pa.Array:
    files = [png(pixels) for pixels in images]
    offsets = np.cumsum([0, *map(len, files)], dtype=np.int32)
    # put together by hand: pa.array would take several times the memory
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(b"".join(files))]
    column = pa.BinaryArray.from_buffers(pa.binary(), len(files), buffers)
    return pa.StructArray.from_arrays(
        [column, pa.nulls(len(files), pa.string())], names=["bytes", "path"]
    )


def images_of(table: pa.Table) -> np.ndarray:
    """The images of a part's table, or of a slice of it: (N, H, W, C) uint8.

    Raw pixels in one chunk are not copied: the array then shares the table's memory and cannot be
    written to.
    """
    shape = tuple(json.loads(table.schema.metadata[b"shape"]))
    column = table["image"]
    if pa.types.is_struct(column.type):
        files = column.combine_chunks().field("bytes")
        images = np.empty((len(files), *shape), np.uint8)
        for i, file in enumerate(files):
            images[i] = from_png(file.as_buffer())
        return images
    size = column.type.byte_width
    chunks = [
        np.frombuffer(chunk.buffers()[1], np.uint8, len(chunk) * size, chunk.offset * size)
        for chunk in column.chunks
        if len(chunk)
    ]
    pixels = chunks[0] if len(chunks) == 1 else np.concatenate([np.empty(0, np.uint8), *chunks])
    return pixels.reshape(-1, *shape)


def labels_of(table: pa.Table) -> np.ndarray:
    """The labels of a part's table: (N,) int64, NO_LABEL where there is none."""
    labels: np.ndarray = table["label"].fill_null(NO_LABEL).to_numpy().astype(np.int64)
    return labels


def read_part(shard_set: str, entry: FileEntry, columns: list[str] | None = None) -> pa.Table:
    """The table of a part that is as the list of shards says.

    Raises:
        CorruptArtifact: it is missing, or does not match its sha256.
        StorageError: it cannot be read.
    """
    try:
        data = storage.read_bytes(storage.join(shard_set, entry.path))
    except FileNotFoundError as error:
        raise corrupt(shard_set, entry.path, "is missing") from error
    if storage.sha256(data) != entry.sha256:
        raise corrupt(shard_set, entry.path, "does not match its sha256")
    return pq.read_table(pa.BufferReader(data), columns=columns)


def corrupt(shard_set: str, path: str, why: str) -> CorruptArtifact:
    """The error for a file of a ShardSet that is not what was written."""
    return CorruptArtifact(
        f"{storage.join(shard_set, path)} {why}: delete {shard_set} and run the same command again"
    )


@dataclass(frozen=True)
class ImageSet:
    """Images in memory: images (N, H, W, C) uint8, labels (N,) int64 with NO_LABEL for none."""

    images: np.ndarray
    labels: np.ndarray

    def __len__(self) -> int:
        return len(self.images)


NO_IMAGES = ImageSet(np.empty((0, 1, 1, 1), np.uint8), np.empty(0, np.int64))
