"""Where images come from: what there is, with the label and a hash of each.

A source is scanned once: its files are listed (listing.py), each is looked into (items.py), and the
images, in the order in which they lie in their files, get their final labels. input_shards.py cuts
them into shards, each of which is read by whoever preprocesses it.
"""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline import storage
from pipeline.data.config import DataConfig
from pipeline.data.items import LookInto, find_items, list_groups, look_on_threads, values_of
from pipeline.data.labels import Label, find_label, read_labels
from pipeline.data.place import Place
from pipeline.errors import DataError

MAX_CLASSES = 2**20


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
        look_into: how to look into files that are not known, where there is more than one group.

    Raises:
        DataError: the source is missing, damaged or holds no image; or its labels do not fit.
    """
    place, groups = list_groups(config.source)
    items = find_items(groups, index_folder, remember, progress, look_into)
    items, class_names = with_labels(config, items)
    kept, duplicates = _without_duplicates(items) if config.drop_duplicates else (items, [])
    return Source(
        config.source, place, class_names, kept, duplicates, _fingerprint(items, class_names)
    )


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
