"""An input shard to its parts: what a task of the preprocess stage computes."""

from collections import Counter
from typing import Any

import numpy as np

from pipeline import storage
from pipeline.data.config import NOT_IN_PARTS, DataConfig
from pipeline.data.images import BadImage, decode
from pipeline.data.input_shards import InputShard, read
from pipeline.data.shards import SPLITS, encode_part, part_path, split_of

SHARD_SET_FORMAT = 5
"""Raised when the same source gives other parts, or another list of them."""
MEASURED_EVERY = 8
"""Mean and deviation of the pixels are of every eighth training image of a shard."""


def record_uri(folder: str, index: int) -> str:
    """Where the record of what is in a shard's parts lies, while the ShardSet is being made."""
    return storage.join(folder, "parts", f"{index:05d}.json")


def shard_digest(shard: InputShard, config: DataConfig, class_names: list[str]) -> str:
    """What the parts of a shard depend on."""
    columns = ("key", "number", "digest", "bad")
    items = [shard.items[name].to_pylist() for name in columns]
    settings = config.model_dump(exclude=set(NOT_IN_PARTS))
    return storage.digest([SHARD_SET_FORMAT, settings, class_names, items])


def preprocess_shard(
    shard: InputShard, config: DataConfig, class_names: list[str], folder: str
) -> dict[str, Any]:
    """Decode the images of one input shard and write its parts; returns its record.

    In memory are the decoded pixels of the shard, at most 2 · images_per_shard images, a part
    encoded from them, and one image in its source's size.
    """
    shape = (shard.items.num_rows, config.image_size, config.image_size, config.channels)
    # memory that is not written to is not taken: together they hold each image once
    images = {split: np.empty(shape, np.uint8) for split in SPLITS}
    labels: dict[str, list[int | None]] = {split: [] for split in SPLITS}
    keys: dict[str, list[str]] = {split: [] for split in SPLITS}
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
            split = split_of(item.key, config.holdout)
            images[split][len(keys[split])] = decoded.pixels
            labels[split].append(item.label)
            keys[split].append(item.key)

    files = []
    for split in SPLITS:
        if not keys[split]:
            continue
        path, whole = part_path(split, shard.index), images[split][: len(keys[split])]
        entry = storage.write_bytes(
            storage.join(folder, path),
            encode_part(whole, labels[split], keys[split], class_names, config.encoding),
        )
        files.append({**entry.model_dump(), "path": path})
    counts = Counter(label for split in SPLITS for label in labels[split])
    sample = images["train"][: len(keys["train"]) : MEASURED_EVERY]
    record = {
        "digest": shard_digest(shard, config, class_names),
        "files": files,
        "num_images": {split: len(keys[split]) for split in SPLITS},
        "class_counts": [counts[i] for i in range(len(class_names))],
        "num_unlabelled": counts[None],
        "bad": bad,
        "num_too_small": small,
        "num_too_narrow": narrow,
        "sizes": [[width, height, count] for (width, height), count in sorted(sizes.items())],
        "histograms": [_histogram(sample[..., channel]) for channel in range(config.channels)],
    }
    storage.write_json(record_uri(folder, shard.index), record)
    return record


def _histogram(images: np.ndarray) -> list[int]:
    """How often each value stands in (N, H, W) uint8."""
    found = np.zeros(256, np.int64)
    for image in images:  # bincount widens what it is given to 64 bits
        found += np.bincount(image.ravel(), minlength=256)
    return [int(count) for count in found]
