"""Where images come from: what there is, with the label and a hash of each.

A source is scanned once: its files are listed, each is looked into (pieces.py), and the images, in
the order in which they lie in their files, get their final labels. input_shards.py cuts them into
shards, each of which is read by whoever preprocesses it.
"""

import functools
import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.data.config import DataConfig
from pipeline.data.formats.common import IMAGE_SUFFIXES, Place
from pipeline.data.labels import Label, find_label, read_labels
from pipeline.data.listing import BUILTIN, list_files
from pipeline.data.pieces import (
    FORMATS,
    LookInto,
    Piece,
    look_on_threads,
    pieces_of,
    recall,
)
from pipeline.errors import DataError

MAX_CLASSES = 2**20
VALUES_AT_ONCE = 2**16


@dataclass(frozen=True)
class Source:
    """What a scan found."""

    uri: str
    place: Place
    class_names: list[str]
    items: pa.Table
    """ITEMS, archives before image files, in the order of their names and of what is in them."""
    duplicates: list[tuple[str, str]]
    """(key, key of the image that was kept)."""
    fingerprint: str
    """What the images are: their names, labels and hashes, whenever they were written. Of an image
    file in a bucket the hash is the store's own, the ETag, since the scan does not read it: the
    same images have one fingerprint there and another elsewhere."""


def scan(
    config: DataConfig,
    index_folder: str | None = None,
    remember: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
    look_into: LookInto = look_on_threads,
) -> Source:
    """List a source's images with their labels and hashes.

    Args:
        index_folder: URI of a folder with what earlier scans found in files; they are not read
            again while their size and modification mark are the same.
        remember: add to that folder.
        progress: called with the number of files looked into, and of all.
        look_into: how to look into files that are not known, where there is more than one piece.

    Raises:
        DataError: the source is missing, damaged or holds no image; or its labels do not fit.
    """
    place, pieces = list_pieces(config.source)
    items = _items(pieces, index_folder, remember, progress, look_into)
    items, class_names = with_labels(config, items)
    kept, duplicates = _without_duplicates(items) if config.drop_duplicates else (items, [])
    return Source(
        config.source, place, class_names, kept, duplicates, _fingerprint(items, class_names)
    )


def list_pieces(source: str) -> tuple[Place, list[Piece]]:
    """The place of a source, and its files by what reads them together.

    Raises:
        DataError: the source is missing, or no file in it can hold images.
    """
    place, files = list_files(source)
    pieces = pieces_of(place, files)
    if not pieces:
        raise DataError(
            f"data.source={source!r} holds no image ({len(files)} files looked at; images "
            f"end in {', '.join(IMAGE_SUFFIXES)}, archives and arrays in "
            f"{', '.join(suffix for suffixes, _ in FORMATS for suffix in suffixes)})"
        )
    return place, pieces


def _items(
    pieces: list[Piece],
    index_folder: str | None,
    remember: bool,
    progress: Callable[[int, int], None],
    look_into: LookInto,
) -> pa.Table:
    """ITEMS of all pieces, in their order."""
    if pieces[0].place.uri == BUILTIN:  # another version of its package may have other images
        index_folder = None
    tables: dict[int, pa.Table] = {}
    num_files, done = sum(len(piece.names) for piece in pieces), 0

    def found(i: int, table: pa.Table) -> None:
        nonlocal done
        tables[i] = table
        done += len(pieces[i].names)
        progress(done, num_files)

    progress(0, num_files)
    if index_folder is not None:
        recalled = functools.partial(recall, folder=index_folder)
        with ThreadPoolExecutor(max_workers=8) as pool:
            for i, table in enumerate(pool.map(recalled, pieces)):
                if table is not None:
                    found(i, table)
    unknown = [i for i in range(len(pieces)) if i not in tables]
    if len(unknown) == 1:  # there is nothing to share out
        look_into = look_on_threads
    keep_in = index_folder if remember else None
    if unknown:
        for j, table in look_into([pieces[i] for i in unknown], keep_in):
            found(unknown[j], table)
    # a slice of many chunks, of which there are as many as shards, is found by counting them
    return pa.concat_tables(tables.pop(i) for i in range(len(pieces))).combine_chunks()


# --- labels, duplicates, identity ---------------------------------------------------------------


def with_labels(config: DataConfig, items: pa.Table) -> tuple[pa.Table, list[str]]:
    """The items with their final labels in `number`, and the names of the classes.

    Raises:
        DataError: there is no item; or the labels do not fit.
    """
    if not items.num_rows:
        raise DataError(f"data.source={config.source!r} holds no image: its files are empty")
    if config.labels is not None:
        given = read_labels(config.labels)
        found: list[Label | None] = [find_label(given, key) for key in values_of(items["key"])]
        if all(label is None for label in found):
            raise DataError(
                f"data.labels={config.labels!r} names none of the images of data.source="
                f"{config.source!r}: it has {next(iter(given))!r}, the source "
                f"{items['key'][0].as_py()!r}"
            )
        numbers = [label if isinstance(label, int) else None for label in found]
        names = [label if isinstance(label, str) else None for label in found]
        items = _with(
            items, number=pa.array(numbers, pa.int64()), name=pa.array(names, pa.string())
        )

    # in columns: as a list of Python's the labels of an image would take 16 times their bytes
    of_names = sorted(pc.unique(items["name"]).drop_null().to_pylist())
    ends = pc.min_max(items["number"]).as_py()
    if of_names and ends["min"] is not None:
        raise DataError(
            f"data.source={config.source!r} has both names of classes, such as {of_names[0]!r}, "
            f"and numbers, such as {ends['min']}, as labels: give all of them in data.labels"
        )
    if ends["min"] is not None and (ends["min"] < 0 or ends["max"] >= MAX_CLASSES):
        wrong = ends["min"] if ends["min"] < 0 else ends["max"]
        raise DataError(
            f"data.source={config.source!r} has the label {wrong}: labels are numbers from 0 "
            f"to {MAX_CLASSES - 1:,}, one after the other"
        )
    class_names = of_names
    if ends["min"] is not None:
        class_names = [str(number) for number in range(ends["max"] + 1)]
    else:
        numbers_of_names = pc.index_in(items["name"], pa.array(of_names, pa.string()))
        items = _with(items, number=numbers_of_names.cast(pa.int64()))
    if config.class_names is not None:
        if len(config.class_names) != len(class_names):
            raise DataError(
                f"data.class_names has {len(config.class_names)} names, but data.source="
                f"{config.source!r} has {len(class_names)} classes: give one name a class, in the "
                "order of the labels"
            )
        class_names = list(config.class_names)
    return items, class_names


def _with(items: pa.Table, **columns: Any) -> pa.Table:
    """The items with these columns in place of theirs."""
    for name, column in columns.items():
        items = items.set_column(items.schema.get_field_index(name), name, column)
    return items


def values_of(column: pa.ChunkedArray) -> Iterator[Any]:
    """The values of a column as Python has them, which takes ten times the memory: few at once."""
    for chunk in column.chunks:
        for start in range(0, len(chunk), VALUES_AT_ONCE):
            yield from chunk.slice(start, VALUES_AT_ONCE).to_pylist()


def _without_duplicates(items: pa.Table) -> tuple[pa.Table, list[tuple[str, str]]]:
    """The first of each content, and which were dropped for which; bad images are not compared."""
    sound = np.flatnonzero(pc.equal(items["bad"], "").to_numpy())
    # large: with offsets of 32 bits a column would end at 2 GiB, some 30 million digests
    digests = items["digest"].cast(pa.large_string()).combine_chunks().take(pa.array(sound))
    group = digests.dictionary_encode().indices.to_numpy()
    # contents are numbered as they first come
    is_first = group > np.maximum.accumulate(np.concatenate([[-1], group[:-1]]))
    keeper = np.arange(items.num_rows)  # the row that each row is a copy of
    keeper[sound] = sound[is_first][group]
    dropped = keeper != np.arange(items.num_rows)
    if not dropped.any():
        return items, []
    keys = items["key"]
    duplicates = list(
        zip(
            keys.filter(pa.array(dropped)).to_pylist(),
            keys.take(pa.array(keeper[dropped])).to_pylist(),
            strict=True,
        )
    )
    return items.filter(pa.array(~dropped)), duplicates


def _fingerprint(items: pa.Table, class_names: list[str]) -> str:
    found = hashlib.sha256(storage.canonical_json(class_names).encode())
    columns = (values_of(items[name]) for name in ("key", "number", "digest", "bad"))
    for row in zip(*columns, strict=True):
        found.update(repr(row).encode())
    return found.hexdigest()
