"""Preprocess: a source of images to a ShardSet, one Ray task an input shard.

What is in the source's files is found by tasks, too, unless an earlier scan has found it.

A task writes its parts, then a record `parts/00003.json` of what is in them; a record that stands
is not made again, so a killed run loses at most the shards that were being worked on. The driver
adds the records up and keeps a row of each, which are the list `shards.arrow` of the finished
ShardSet. By that, and by the records of ShardSets that were not finished, another one, of a source
that has changed here and there, takes over the parts of the shards that have not.
"""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pyarrow as pa
import ray

from pipeline import storage
from pipeline.data import shard_list
from pipeline.data.config import DataConfig
from pipeline.data.input_shards import InputShard, cut
from pipeline.data.items import FileGroup, look
from pipeline.data.parts import Parts
from pipeline.data.preprocess import preprocess_shard, record_uri, shard_digest
from pipeline.data.shards import part_path
from pipeline.data.source import Source
from pipeline.data.summary import (
    CONTACT_SHEET,
    Tally,
    bad_and_duplicates,
    contact_sheet,
    left_out,
    summary,
)
from pipeline.errors import CorruptArtifact, DataError
from tasks.stages import in_flight
from tasks.stages.stage import Outcome, StageContext

NUM_EARLIER = 5
"""Finished ShardSets, the newest, in which unchanged shards are looked for."""
RECORDS_AT_ONCE = 16

Record = dict[str, Any]
"""What `preprocess_shard` returns."""


# here, once: a worker takes a while to load a function that is new to it
_look_task = ray.remote(max_retries=3)(look)
_preprocess_task = ray.remote(max_retries=3)(preprocess_shard)


def look_on_cluster(groups: list[FileGroup], keep_in: str | None) -> Iterator[tuple[int, pa.Table]]:
    """`LookInto` of pipeline.data.items, in tasks."""
    return in_flight.results(_look_task, [(group, keep_in) for group in groups])


def run(ctx: StageContext) -> Outcome:
    """Write the ShardSet of the source that was scanned when the plan was made.

    Raises:
        DataError: no image can be used, or more than data.max_bad_fraction cannot.
    """
    source: Source = ctx.external
    config, names = ctx.config.data, source.class_names
    storage.sweep(ctx.folder)
    shards, tally = cut(source, config.images_per_shard), Tally()
    for i, record in _read_records(ctx.folder):
        if i < len(shards):
            tally.add(i, record)
    if missing := [shard for shard in shards if shard.index not in tally.rows]:
        for i, record in _take_over(ctx, missing, names):
            tally.add(i, record)
    done = sum(shards[i].items.num_rows for i in tally.rows)
    ctx.progress.start(source.items.num_rows, "images", done)

    # the largest first, so that all workers end at about the same time
    todo = [shard for shard in missing if shard.index not in tally.rows]
    todo.sort(key=lambda shard: -shard.items.num_rows)
    calls = [(shard, config, names, ctx.folder) for shard in todo]
    for i, record in in_flight.results(_preprocess_task, calls):
        tally.add(todo[i].index, record)
        done += todo[i].items.num_rows
        ctx.progress.update(done, f"{len(tally.rows)} of {len(shards)} shards")
    return _outcome(ctx, source, tally)


def _read_records(folder: str) -> Iterator[tuple[int, Record]]:
    """(index, record) of the shards of a ShardSet that are finished, one after the other."""
    names = storage.list_names(storage.join(folder, "parts"))
    indices = [int(stem) for name in names if (stem := name.removesuffix(".json")).isdigit()]
    with ThreadPoolExecutor(RECORDS_AT_ONCE) as pool:
        records = pool.map(lambda index: _read_record(record_uri(folder, index)), indices)
        yield from ((i, record) for i, record in zip(indices, records, strict=True) if record)


def _read_record(uri: str) -> Record | None:
    """None if it is gone, since another run may be at work there, or is damaged."""
    try:
        record = storage.read_json(uri)
    except (FileNotFoundError, ValueError):
        return None
    return record if isinstance(record, dict) and "digest" in record else None


def _take_over(
    ctx: StageContext, shards: list[InputShard], class_names: list[str]
) -> Iterator[tuple[int, Record]]:
    """Copy the parts of shards that another ShardSet has, and write their records."""
    known = _earlier_shards(storage.join(ctx.config.storage, "preprocess"), ctx.folder)
    if not known:
        return

    def take(shard: InputShard) -> tuple[int, Record] | None:
        digest = shard_digest(shard, ctx.config.data, class_names)
        if digest not in known:
            return None
        folder, index = known[digest]
        record = _read_record(record_uri(folder, index))
        if record is None or record["digest"] != digest:
            return None
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
        yield from (taken for taken in pool.map(take, shards) if taken is not None)


def _earlier_shards(parent: str, but: str) -> dict[str, tuple[str, int]]:
    """Shard digest -> (ShardSet, index): of those that are not finished, and the newest that are.

    Args:
        parent: the folder of all ShardSets.
        but: the ShardSet that is being made.
    """
    folders = [storage.join(parent, name) for name in storage.list_names(parent)]
    others = [(folder, storage.read_manifest(folder)) for folder in folders if folder != but]
    known: dict[str, tuple[str, int]] = {}
    for folder, manifest in others:
        if manifest is None:
            known |= {record["digest"]: (folder, i) for i, record in _read_records(folder)}
    finished = sorted((manifest.created_at, folder) for folder, manifest in others if manifest)
    for _, folder in finished[-NUM_EARLIER:]:
        try:
            digests = shard_list.read(folder)["digest"]
        except (CorruptArtifact, FileNotFoundError):  # damaged, or being deleted
            continue
        known |= {digest.as_py().hex(): (folder, i) for i, digest in enumerate(digests)}
    return known


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


def _outcome(ctx: StageContext, source: Source, tally: Tally) -> Outcome:
    config = ctx.config.data
    stats = summary(config, source, tally)
    bad, doubles = bad_and_duplicates(source, tally.bad)
    total = source.items.num_rows + len(source.duplicates) - len(doubles)
    check_bad_share(bad, total, config)
    if not stats["num_images"]["train"]:
        raise DataError(
            f"data.source={config.source!r} leaves no image to train on of {total}: "
            f"{left_out(stats)}, data.holdout={config.holdout}; lower "
            "what keeps them out"
        )
    shards = shard_list.table_of(tally.rows[i] for i in range(len(tally.rows)))
    sheet = contact_sheet(Parts(ctx.folder, "train", shards), len(source.class_names))
    files = [
        shard_list.write(ctx.folder, shards),
        storage.write_bytes(storage.join(ctx.folder, f"{CONTACT_SHEET}.png"), sheet),
    ]
    note = f"left out {left_out(stats)}" if left_out(stats) else ""
    if stats["bad"]:
        note += f" ({named_reasons(stats['bad'])})"
    return Outcome(files, stats, note)
