"""An input shard to its parts: what a task of the preprocess stage computes."""

from collections import Counter
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.data.images import BadImage, decode
from pipeline.data.shards import SPLITS, encode_part, part_path, split_of
from pipeline.data.sources import DataConfig, InputShard, read

NOT_IN_PARTS = {"source", "labels", "class_names", "max_bad_fraction", "images_per_shard"}
"""Keys of DataConfig that have no part in what is made of the items of a shard."""
SHARD_SET_FORMAT = 2
"""Raised when the same source gives other parts."""
MEASURED_EVERY = 8
"""Mean and deviation of the pixels are of every eighth training image of a shard."""


def record_uri(folder: str, index: int) -> str:
    """Where the record of what is in a shard's parts lies, while the ShardSet is being made."""
    return storage.join(folder, "parts", f"{index:05d}.json")


def shard_digest(shard: InputShard, config: DataConfig, class_names: list[str]) -> str:
    """What the parts of a shard depend on."""
    columns = ("key", "number", "digest", "bad")
    items = [shard.items[name].to_pylist() for name in columns]
    settings = config.model_dump(exclude=NOT_IN_PARTS)
    return storage.digest([SHARD_SET_FORMAT, settings, class_names, items])


def preprocess_shard(
    shard: InputShard, config: DataConfig, class_names: list[str], folder: str
) -> dict[str, Any]:
    """Decode the images of one input shard and write its parts; returns its record.

    In memory are the decoded pixels of the shard, at most 2 · images_per_shard images, the parts
    encoded from them, and one image in its source's size.
    """
    splits: dict[str, list[tuple[np.ndarray, int | None, str]]] = {name: [] for name in SPLITS}
    bad: list[dict[str, str]] = []
    small, narrow = 0, 0
    sizes: Counter[tuple[int, int]] = Counter()
    for item, raw in read(shard):
        try:
            if raw is None:
                raise BadImage(item.bad)
            decoded = decode(raw, config.image_size, config.channels, config.resize)
        except BadImage as error:
            bad.append({"key": item.key, "reason": str(error)})
            continue
        shorter, longer = sorted((decoded.width, decoded.height))
        if shorter < config.min_size:
            small += 1
        elif longer > config.max_aspect * shorter:
            narrow += 1
        else:
            sizes[decoded.width, decoded.height] += 1
            row = (decoded.pixels, item.label, item.key)
            splits[split_of(item.key, config.holdout)].append(row)

    files = []
    sample = np.zeros((0, 1, 1, config.channels), np.uint8)
    for split, rows in splits.items():
        if not rows:
            continue
        images = np.stack([pixels for pixels, _, _ in rows])
        labels, keys = [label for _, label, _ in rows], [key for _, _, key in rows]
        if split == "train":
            sample = images[::MEASURED_EVERY]
        path = part_path(split, shard.index)
        part = encode_part(images, labels, keys, class_names, config.encoding)
        entry = storage.write_bytes(storage.join(folder, path), part)
        files.append({**entry.model_dump(), "path": path})
    all_labels = [label for rows in splits.values() for _, label, _ in rows]
    counts = Counter(all_labels)
    record = {
        "digest": shard_digest(shard, config, class_names),
        "files": files,
        "num_images": {split: len(rows) for split, rows in splits.items()},
        "class_counts": [counts[i] for i in range(len(class_names))],
        "num_unlabelled": counts[None],
        "bad": bad,
        "num_too_small": small,
        "num_too_narrow": narrow,
        "sizes": [[width, height, count] for (width, height), count in sorted(sizes.items())],
        "histograms": [
            np.bincount(sample[..., channel].ravel(), minlength=256).tolist()
            for channel in range(config.channels)
        ],
    }
    storage.write_json(record_uri(folder, shard.index), record)
    return record
