"""Preprocess: a source of images to a ShardSet, one Ray task an input shard.

What is in the source's files is found by tasks, too, unless an earlier scan has found it.

A task writes its parts, then a record `parts/00003.json` of what is in them; a record that stands
is not made again, so a killed run loses at most the shards that were being worked on. The records
of a finished ShardSet are kept in `shards.json`, by which a later one, of a source that has changed
here and there, takes over the parts of the shards that have not.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import ray

from pipeline import storage
from pipeline.data.input_shards import InputShard, cut
from pipeline.data.pieces import Piece, look
from pipeline.data.preprocess import preprocess_shard, record_uri, shard_digest
from pipeline.data.shards import part_path
from pipeline.data.sources import DataConfig, Source
from pipeline.data.summary import CONTACT_SHEET, contact_sheet, left_out, summary
from pipeline.errors import DataError
from pipeline.storage import FileEntry
from tasks import in_flight
from tasks.stage import Outcome, StageContext

SHARDS = "shards.json"
NUM_EARLIER = 5
"""Finished ShardSets, the newest, in which unchanged shards are looked for."""


# here, once: a worker takes a while to load a function that is new to it
_look_task = ray.remote(max_retries=3)(look)
_preprocess_task = ray.remote(max_retries=3)(preprocess_shard)


def index_folder(storage_uri: str) -> str:
    """Where what a scan found in the files of its source is remembered."""
    return storage.join(storage_uri, "index")


def look_on_cluster(pieces: list[Piece], keep_in: str | None) -> Iterator[tuple[int, pa.Table]]:
    """`LookInto` of pipeline.data.pieces, in tasks."""
    return in_flight.results(_look_task, [(piece, keep_in) for piece in pieces])


def run(ctx: StageContext, source: Source) -> Outcome:
    """Write the ShardSet of a scanned source.

    Raises:
        DataError: no image can be used, or more than data.max_bad_fraction cannot.
    """
    config, names = ctx.config.data, source.class_names
    shards = cut(source, config.images_per_shard)
    records = _read_records(ctx.folder, len(shards))
    if len(records) < len(shards):
        records |= _take_over(ctx, shards, names, records)
    num_items = [shard.items.num_rows for shard in shards]
    ctx.progress.start(source.items.num_rows, "images", sum(num_items[i] for i in records))

    # the largest first, so that all workers end at about the same time
    todo = [shard for shard in shards if shard.index not in records]
    todo.sort(key=lambda shard: -shard.items.num_rows)
    calls = [(shard, config, names, ctx.folder) for shard in todo]
    for i, record in in_flight.results(_preprocess_task, calls):
        records[todo[i].index] = record
        ctx.progress.update(
            sum(num_items[i] for i in records), f"{len(records)} of {len(shards)} shards"
        )
    return _outcome(ctx, source, [records[i] for i in range(len(shards))])


def _read_records(folder: str, num_shards: int) -> dict[int, dict[str, Any]]:
    """The records of an earlier run that was killed."""
    records = {}
    for name in storage.list_names(storage.join(folder, "parts")):
        stem = name.removesuffix(".json")
        if stem.isdigit() and int(stem) < num_shards:
            records[int(stem)] = storage.read_json(record_uri(folder, int(stem)))
    return records


def _take_over(
    ctx: StageContext,
    shards: list[InputShard],
    class_names: list[str],
    there: dict[int, dict[str, Any]],
) -> dict[int, dict[str, Any]]:
    """Copy the parts of shards that an earlier ShardSet has, and write their records."""
    known = _earlier_records(storage.join(ctx.config.storage, "preprocess"))
    if not known:
        return {}

    def take(shard: InputShard) -> tuple[int, dict[str, Any]] | None:
        digest = shard_digest(shard, ctx.config.data, class_names)
        if digest not in known or shard.index in there:
            return None
        folder, record = known[digest]
        files = []
        for file in record["files"]:
            old = storage.join(folder, file["path"])
            path = part_path(file["path"].split("/")[0], shard.index)
            try:
                sound = storage.sha256(storage.read_bytes(old)) == file["sha256"]
            except FileNotFoundError:
                sound = False
            if not sound:  # deleted or damaged there, so made anew here
                return None
            storage.copy(old, storage.join(ctx.folder, path))
            files.append({**file, "path": path})
        record = {**record, "files": files}
        storage.write_json(record_uri(ctx.folder, shard.index), record)
        return shard.index, record

    with ThreadPoolExecutor(max_workers=8) as pool:
        return dict(taken for taken in pool.map(take, shards) if taken is not None)


def _earlier_records(parent: str) -> dict[str, tuple[str, dict[str, Any]]]:
    """Shard digest -> (ShardSet, record), of the newest ShardSets of the storage."""
    folders = [storage.join(parent, name) for name in storage.list_names(parent)]
    finished = [
        (manifest.created_at, folder)
        for folder in folders
        if (manifest := storage.read_manifest(folder)) is not None
        and any(file.path == SHARDS for file in manifest.files)
    ]
    known = {}
    for _, folder in sorted(finished)[-NUM_EARLIER:]:
        for record in storage.read_json(storage.join(folder, SHARDS)):
            known[record["digest"]] = (folder, record)
    return known


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
    stats = summary(config, source, records)
    check_bad_share([image for r in records for image in r["bad"]], source.items.num_rows, config)
    if not stats["num_images"]["train"]:
        raise DataError(
            f"data.source={config.source!r} leaves no image to train on of "
            f"{source.items.num_rows}: {left_out(stats)}, data.holdout={config.holdout}; lower "
            "what keeps them out"
        )
    files = [FileEntry(**entry) for record in records for entry in record["files"]]
    for name, data in (
        (SHARDS, storage.canonical_json(records).encode()),
        (f"{CONTACT_SHEET}.png", contact_sheet(ctx.folder, files, len(source.class_names))),
    ):
        entry = storage.write_bytes(storage.join(ctx.folder, name), data)
        files.append(entry)
    note = f"left out {left_out(stats)}" if left_out(stats) else ""
    if stats["bad"]:
        note += f" ({named_reasons(stats['bad'])})"
    return Outcome(files, stats, note)
