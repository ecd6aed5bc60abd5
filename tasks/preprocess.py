"""Preprocess: a source of images to a ShardSet, one Ray task an input shard.

A task writes its parts, then a record `parts/00003.json` of what is in them; a record that stands
is not made again, so a killed run loses at most the shards that were being worked on.
"""

from collections import Counter
from typing import Any

import numpy as np
import ray

from pipeline import storage
from pipeline.data.images import BadImage, decode
from pipeline.data.shards import SPLITS, encode_part, part_path, split_of
from pipeline.data.sources import DataConfig, FileIndex, InputShard, Source, cut, read, scan
from pipeline.errors import DataError
from pipeline.storage import FileEntry
from tasks.stage import Outcome, StageContext

MAX_NAMED_BAD_IMAGES = 1000


def scan_source(config: DataConfig, storage_uri: str, remember: bool) -> Source:
    """The source's items.

    Args:
        remember: keep the hashes of its files in the storage, for the next scan.
    """
    index_uri = storage.join(
        storage_uri, "preprocess", f"index-{storage.digest(config.source)}.json"
    )
    index: FileIndex = {}
    if not config.source.startswith("builtin:"):
        try:
            index = storage.read_json(index_uri)
        except (FileNotFoundError, ValueError):
            index = {}
    source, entries = scan(config.source, index, config.class_names)
    if remember and {key: tuple(entry) for key, entry in index.items()} != entries:
        storage.write_json(index_uri, entries)
    return source


def preprocess_shard(
    shard: InputShard, config: DataConfig, class_names: list[str], folder: str
) -> dict[str, Any]:
    """Decode the images of one input shard and write its parts; returns its record."""
    splits: dict[str, list[tuple[np.ndarray, int | None, str]]] = {name: [] for name in SPLITS}
    bad: list[dict[str, str]] = []
    for item, raw in read(shard):
        try:
            if raw is None:
                raise BadImage("the file cannot be read")
            pixels = decode(raw, config.image_size, config.channels)
        except BadImage as error:
            bad.append({"key": item.key, "reason": str(error)})
            continue
        splits[split_of(item.key, config.holdout)].append((pixels, item.label, item.key))

    files = []
    for split, rows in splits.items():
        if not rows:
            continue
        images = np.stack([pixels for pixels, _, _ in rows])
        labels, keys = [label for _, label, _ in rows], [key for _, _, key in rows]
        path = part_path(split, shard.index)
        entry = storage.write_bytes(
            storage.join(folder, path), encode_part(images, labels, keys, class_names)
        )
        files.append({**entry.model_dump(), "path": path})
    record = {
        "files": files,
        "num_images": {split: len(rows) for split, rows in splits.items()},
        "bad": bad,
        "labels": [label for rows in splits.values() for _, label, _ in rows],
    }
    storage.write_json(_record_uri(folder, shard.index), record)
    return record


def run(ctx: StageContext, source: Source) -> Outcome:
    """Write the ShardSet of a scanned source.

    Raises:
        DataError: no image can be used, or more than data.max_bad_fraction cannot.
    """
    config = ctx.config.data
    shards = cut(source, config.images_per_shard)
    records = _read_records(ctx.folder, len(shards))
    num_items = [len(shard.items) for shard in shards]
    ctx.progress.start(len(source.items), "images", sum(num_items[i] for i in records))

    task = ray.remote(max_retries=3)(preprocess_shard)
    todo = [shard for shard in shards if shard.index not in records]
    # a few in flight per CPU: enough to hide the driver, few enough to bound memory
    limit = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    running: dict[Any, int] = {}
    while todo or running:
        while todo and len(running) < limit:
            shard = todo.pop(0)
            running[task.remote(shard, config, source.class_names, ctx.folder)] = shard.index
        (ready, *_), _ = ray.wait(list(running), num_returns=1)
        records[running.pop(ready)] = ray.get(ready)
        ctx.progress.update(sum(num_items[i] for i in records))
    return _outcome(ctx, source, [records[i] for i in range(len(shards))])


def named_reasons(bad: list[dict[str, str]]) -> str:
    """The first few bad images with their reasons; the manifest has them all."""
    return "; ".join(f"{image['key']}: {image['reason']}" for image in bad[:3])


def check_bad_share(bad: list[dict[str, str]], total: int, config: DataConfig) -> None:
    """Raise DataError if none of `total` images is left, or more are bad than the config allows."""
    named = named_reasons(bad)
    if len(bad) == total:
        raise DataError(
            f"data.source={config.source!r}: none of its {total} images can be used ({named})"
        )
    if len(bad) > config.max_bad_fraction * total:
        raise DataError(
            f"data.source={config.source!r}: {len(bad)} of {total} images cannot be used, more "
            f"than data.max_bad_fraction={config.max_bad_fraction} allows ({named}); mend or "
            "remove them, or raise the share"
        )


def _outcome(ctx: StageContext, source: Source, records: list[dict[str, Any]]) -> Outcome:
    config = ctx.config.data
    bad = [image for record in records for image in record["bad"]]
    total = len(source.items)
    check_bad_share(bad, total, config)
    num_images = {split: sum(record["num_images"][split] for record in records) for split in SPLITS}
    if not num_images["train"]:
        raise DataError(
            f"data.holdout={config.holdout} leaves no image to train on of {total}: lower it"
        )
    files = [FileEntry(**entry) for record in records for entry in record["files"]]
    counts = Counter(label for record in records for label in record["labels"])
    stats = {
        "source": config.source,
        "source_sha256": storage.sha256(storage.canonical_json(source.fingerprint()).encode()),
        "num_images": num_images,
        "image_shape": [config.image_size, config.image_size, config.channels],
        "class_names": source.class_names,
        "class_counts": [counts[i] for i in range(len(source.class_names))],
        "num_unlabelled": counts[None],
        "num_bad": len(bad),
        "bad": bad[:MAX_NAMED_BAD_IMAGES],
    }
    note = f"{len(bad)} of {total} images left out ({named_reasons(bad)})" if bad else ""
    return Outcome(files, stats, note)


def _read_records(folder: str, num_shards: int) -> dict[int, dict[str, Any]]:
    """The records of an earlier run that was killed."""
    records = {}
    for name in storage.list_names(storage.join(folder, "parts")):
        stem = name.removesuffix(".json")
        if stem.isdigit() and int(stem) < num_shards:
            records[int(stem)] = storage.read_json(_record_uri(folder, int(stem)))
    return records


def _record_uri(folder: str, index: int) -> str:
    return storage.join(folder, "parts", f"{index:05d}.json")
