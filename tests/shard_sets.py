"""ShardSets of given images, as the stage `preprocess` leaves them."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.data import shard_list
from pipeline.data.parts import Parts
from pipeline.data.shards import SPLITS, encode_part, part_path
from pipeline.storage import FileEntry, Manifest


def write_shard_set(
    folder: str,
    images: np.ndarray,
    labels: Sequence[int | None],
    keys: list[str],
    class_names: list[str],
    sizes: Sequence[int],
    encoding: Any = "raw",
) -> str:
    """All of the images (N, H, W, C) uint8 to train on, in parts of these sizes; the folder."""
    records, start = [], 0
    for index, size in enumerate(sizes):
        rows, path = slice(start, start + size), part_path("train", index)
        data = encode_part(images[rows], list(labels[rows]), keys[rows], class_names, encoding)
        entry = storage.write_bytes(storage.join(folder, path), data)
        file = {**entry.model_dump(), "path": path}
        records.append({"digest": "00" * 8, "files": [file], "num_images": {"train": size}})
        start += size
    return finish(folder, records)


def finish(folder: str, records: list[dict[str, Any]]) -> str:
    """Write the list and the manifest of a ShardSet of these records of its shards; the folder."""
    shards = shard_list.table_of(map(shard_list.row_of, records))
    made = {"format": 1, "stage": "preprocess", "id": "x", "inputs": {}, "config": {}}
    storage.commit(folder, Manifest(files=[shard_list.write(folder, shards)], **made))
    return folder


def parts_of(folder: str) -> list[FileEntry]:
    """All parts of a finished ShardSet, as its list of shards has them."""
    shards = shard_list.read(folder)
    return [part.entry for split in SPLITS for part in Parts(folder, split, shards)]
