"""The stored form of a data set: Parquet parts of raw uint8 pixels.

Columns: `image` (pixels [H, W, C] as FIXED_LEN_BYTE_ARRAY, the shape in the schema's metadata),
`label` (int32, null where there is none), `key` (the path within the source). Fixed-length binary
reads some twenty times faster than a tensor column, whose elements Parquet would widen to 32 bits.
"""

import io
import json
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.errors import CorruptArtifact
from pipeline.seeding import key, uniform

ROW_GROUP_SIZE = 512
NO_LABEL = -1
SPLITS = ("train", "holdout")


def split_of(image_key: str, holdout: float) -> str:
    """`holdout` for a share of the keys, chosen by their hash, so that more images move none."""
    return "holdout" if uniform(key(0, f"holdout/{image_key}")) < holdout else "train"


def part_path(split: str, index: int) -> str:
    """Where the part of an input shard lies in the ShardSet, e.g. train/part-00003.parquet."""
    return f"{split}/part-{index:05d}.parquet"


def encode_part(
    images: np.ndarray, labels: list[int | None], keys: list[str], class_names: list[str]
) -> bytes:
    """A Parquet file of (N, H, W, C) uint8 images; the same input gives the same bytes."""
    shape = images.shape[1:]
    size = int(np.prod(shape))
    pixels = pa.FixedSizeBinaryArray.from_buffers(
        pa.binary(size), len(images), [None, pa.py_buffer(np.ascontiguousarray(images).tobytes())]
    )
    schema = pa.schema(
        [("image", pa.binary(size)), ("label", pa.int32()), ("key", pa.string())],
        metadata={"shape": json.dumps(shape), "class_names": json.dumps(class_names)},
    )
    columns = [pixels, pa.array(labels, pa.int32()), pa.array(keys, pa.string())]
    sink = io.BytesIO()
    pq.write_table(
        pa.Table.from_arrays(columns, schema=schema),
        sink,
        row_group_size=ROW_GROUP_SIZE,
        compression="lz4",
        use_dictionary=False,
    )
    return sink.getvalue()


@dataclass(frozen=True)
class ImageSet:
    """A split in memory: images (N, H, W, C) uint8, labels (N,) int64 with NO_LABEL for none."""

    images: np.ndarray
    labels: np.ndarray
    keys: list[str]

    def __len__(self) -> int:
        return len(self.images)


def read_split(shard_set: str, split: str) -> ImageSet:
    """All images of a split of a ShardSet, in the order of the parts.

    Raises:
        FileNotFoundError: the ShardSet is not complete.
        CorruptArtifact: a part does not match the sha256 in the manifest.
    """
    manifest = storage.read_manifest(shard_set)
    if manifest is None:
        raise FileNotFoundError(f"there is no complete ShardSet at {shard_set}")
    images, labels, keys = [], [], []
    for entry in manifest.files:
        if not entry.path.startswith(f"{split}/"):
            continue
        data = storage.read_bytes(storage.join(shard_set, entry.path))
        if storage.sha256(data) != entry.sha256:
            raise CorruptArtifact(
                f"{storage.join(shard_set, entry.path)} does not match its sha256 in the manifest: "
                f"delete {shard_set} and run the same command again"
            )
        table = pq.read_table(io.BytesIO(data)).combine_chunks()
        shape = json.loads(table.schema.metadata[b"shape"])
        column = table["image"].chunk(0) if table.num_rows else pa.array([], pa.binary(1))
        pixels = np.frombuffer(column.buffers()[1] or b"", np.uint8)
        images.append(pixels[: len(column) * int(np.prod(shape))].reshape(-1, *shape))
        labels.append(table["label"].fill_null(NO_LABEL).to_numpy().astype(np.int64))
        keys.extend(table["key"].to_pylist())
    if not images:
        return ImageSet(np.empty((0, 1, 1, 1), np.uint8), np.empty(0, np.int64), [])
    return ImageSet(np.concatenate(images), np.concatenate(labels), keys)
