"""The list of a ShardSet's shards: a row each, with what its parts are.

The manifest of a ShardSet names this file, and this file the parts. So a manifest stays small, and
whoever opens a ShardSet of a million parts reads one file of columns, and none of the parts.
"""

from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from pipeline import storage
from pipeline.data import shards
from pipeline.data.shards import SPLITS, corrupt
from pipeline.storage import FileEntry

SHARDS = "shards.arrow"
"""Not .parquet: who opens all Parquet files of a ShardSet means its images."""
SCHEMA = pa.schema(
    [
        ("digest", pa.binary(8)),  # see shard_digest
        *[
            column
            for split in SPLITS
            for column in (
                (f"{split}_images", pa.int64()),  # 0 where there is no part, which the others say
                (f"{split}_bytes", pa.int64()),
                (f"{split}_sha256", pa.binary(32)),
            )
        ],
    ]
)

Row = tuple[Any, ...]
"""Of SCHEMA."""


def row_of(record: dict[str, Any]) -> Row:
    """What the list keeps of a record of `preprocess_shard`."""
    files = {file["path"].split("/")[0]: file for file in record["files"]}
    row: list[Any] = [bytes.fromhex(record["digest"])]
    for split in SPLITS:
        file = files.get(split)
        row += (
            [record["num_images"][split], file["bytes"], bytes.fromhex(file["sha256"])]
            if file
            else [0, None, None]
        )
    return tuple(row)


def table_of(rows: Iterable[Row]) -> pa.Table:
    """The list of shards, in the order of their indices."""
    columns = list(zip(*rows, strict=True)) or [()] * len(SCHEMA)
    arrays = [pa.array(column, field.type) for column, field in zip(columns, SCHEMA, strict=True)]
    about = {"row_group_size": str(shards.ROW_GROUP_SIZE)}
    return pa.table(arrays, schema=SCHEMA.with_metadata(about))


def write(folder: str, table: pa.Table) -> FileEntry:
    """Write the list of the ShardSet in `folder`, for its manifest."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_file(sink, table.schema) as file:
        file.write_table(table)
    return storage.write_bytes(storage.join(folder, SHARDS), memoryview(sink.getvalue()))


def read(folder: str) -> pa.Table:
    """The list of a finished ShardSet.

    Raises:
        FileNotFoundError: the ShardSet is not complete.
        CorruptArtifact: the list is missing or damaged.
        StorageError: it cannot be read.
    """
    manifest = storage.read_manifest(folder)
    if manifest is None:
        raise FileNotFoundError(f"there is no complete ShardSet at {folder}")
    entry = next((file for file in manifest.files if file.path == SHARDS), None)
    if entry is None:
        raise corrupt(folder, SHARDS, "is not in the manifest")
    try:
        data = storage.read_bytes(storage.join(folder, SHARDS))
    except FileNotFoundError as error:
        raise corrupt(folder, SHARDS, "is missing") from error
    if storage.sha256(data) != entry.sha256:
        raise corrupt(folder, SHARDS, "does not match its sha256 in the manifest")
    return pa.ipc.open_file(data).read_all()
