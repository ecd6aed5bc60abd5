"""Preprocess: a source of images to a ShardSet, one Ray task an input shard.

What is in the source's files is found by tasks, too, unless an earlier scan has found it.

A task writes its parts, then a record `parts/00003.json` of what is in them; a record that stands
is not made again, so a killed run loses at most the shards that were being worked on. The records
of a finished ShardSet are kept in `shards.json`. By these and by the records of those that were not
finished another ShardSet, of a source that has changed here and there, takes over the parts of the
shards that have not.
"""

import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import ray

from pipeline import storage
from pipeline.data.input_shards import InputShard, cut
from pipeline.data.pieces import Piece, look
from pipeline.data.preprocess import preprocess_shard, record_uri, shard_digest
from pipeline.data.shards import SHARDS, part_path
from pipeline.data.sources import DataConfig, Source
from pipeline.data.summary import (
    CONTACT_SHEET,
    bad_and_duplicates,
    contact_sheet,
    left_out,
    summary,
)
from pipeline.errors import DataError
from pipeline.storage import FileEntry, Manifest
from tasks import in_flight
from tasks.stage import Outcome, StageContext

NUM_EARLIER = 5
"""Finished ShardSets, the newest, in which unchanged shards are looked for."""
RECORDS_AT_ONCE = 16

Record = dict[str, Any]
"""What `preprocess_shard` returns."""


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
    storage.sweep(ctx.folder)
    shards = cut(source, config.images_per_shard)
    records = {i: record for i, record in _read_records(ctx.folder).items() if i < len(shards)}
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


def _read_records(folder: str) -> dict[int, Record]:
    """The records of the shards of a ShardSet that are finished, by their index."""
    names = storage.list_names(storage.join(folder, "parts"))
    indices = [int(stem) for name in names if (stem := name.removesuffix(".json")).isdigit()]
    with ThreadPoolExecutor(RECORDS_AT_ONCE) as pool:
        records = pool.map(lambda index: _read_record(record_uri(folder, index)), indices)
        return {i: record for i, record in zip(indices, records, strict=True) if record is not None}


def _read_record(uri: str) -> Record | None:
    """None if it is gone, since another run may be at work there, or is damaged."""
    try:
        record = storage.read_json(uri)
    except (FileNotFoundError, ValueError):
        return None
    return record if isinstance(record, dict) and "digest" in record else None


def _take_over(
    ctx: StageContext, shards: list[InputShard], class_names: list[str], there: dict[int, Record]
) -> dict[int, Record]:
    """Copy the parts of shards that another ShardSet has, and write their records."""
    known = _earlier_records(storage.join(ctx.config.storage, "preprocess"), ctx.folder)
    if not known:
        return {}

    def take(shard: InputShard) -> tuple[int, Record] | None:
        digest = shard_digest(shard, ctx.config.data, class_names)
        if digest not in known or shard.index in there:
            return None
        folder, record = known[digest]
        files = []
        for file in record["files"]:
            path = part_path(file["path"].split("/")[0], shard.index)
            try:
                if storage.entry_of(folder, file["path"]).sha256 != file["sha256"]:
                    return None  # damaged, so it is made anew
                storage.copy(storage.join(folder, file["path"]), storage.join(ctx.folder, path))
            except FileNotFoundError:  # deleted
                return None
            files.append({**file, "path": path})
        record = {**record, "files": files}
        storage.write_json(record_uri(ctx.folder, shard.index), record)
        return shard.index, record

    with ThreadPoolExecutor(max_workers=8) as pool:
        return dict(taken for taken in pool.map(take, shards) if taken is not None)


def _earlier_records(parent: str, but: str) -> dict[str, tuple[str, Record]]:
    """Shard digest -> (ShardSet, record): of those that are not finished, and the newest that are.

    Args:
        parent: the folder of all ShardSets.
        but: the ShardSet that is being made.
    """
    folders = [storage.join(parent, name) for name in storage.list_names(parent)]
    others = [(folder, storage.read_manifest(folder)) for folder in folders if folder != but]
    finished = [(manifest.created_at, folder, manifest) for folder, manifest in others if manifest]
    finished.sort(key=lambda entry: entry[:2])
    found = [
        (folder, [*_read_records(folder).values()]) for folder, manifest in others if not manifest
    ]
    found += [
        (folder, _kept_records(folder, manifest)) for _, folder, manifest in finished[-NUM_EARLIER:]
    ]
    return {record["digest"]: (folder, record) for folder, records in found for record in records}


def _kept_records(folder: str, manifest: Manifest) -> list[Record]:
    """The records of a finished ShardSet; none if their file is gone or damaged."""
    entry = next((file for file in manifest.files if file.path == SHARDS), None)
    try:
        kept = storage.read_bytes(storage.join(folder, SHARDS))
    except FileNotFoundError:
        return []
    if entry is None or storage.sha256(kept) != entry.sha256:
        return []
    records: list[Record] = json.loads(kept)
    return records


def named_reasons(bad: list[dict[str, str]]) -> str:
    """The first few bad images with their reasons; the manifest names the first 1,000."""
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
    bad, doubles = bad_and_duplicates(source, records)
    total = source.items.num_rows + len(source.duplicates) - len(doubles)
    check_bad_share(bad, total, config)
    if not stats["num_images"]["train"]:
        raise DataError(
            f"data.source={config.source!r} leaves no image to train on of {total}: "
            f"{left_out(stats)}, data.holdout={config.holdout}; lower "
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
