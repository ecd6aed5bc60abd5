"""Input shards: the items of a source in runs, each of which one task reads."""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.data.formats import loose
from pipeline.data.formats.choice import format_of
from pipeline.data.items import values_of
from pipeline.data.place import Place
from pipeline.data.runs import runs
from pipeline.data.source import Source
from pipeline.errors import DataError
from pipeline.storage.refusals import explain


@dataclass(frozen=True)
class InputShard:
    """A run of a source's items, preprocessed by one task into one part."""

    index: int
    source: str
    place: Place
    items: pa.Table


@dataclass(frozen=True, slots=True)
class Item:
    """One image of a shard."""

    key: str
    label: int | None
    digest: str
    bad: str


def cut(source: Source, images_per_shard: int) -> list[InputShard]:
    """The source's items in runs of `images_per_shard` on average, from half to twice as many.

    Images that come or go change the shards they are in, and none far from them.
    """
    keys = values_of(source.items["key"])
    return [
        InputShard(i, source.uri, source.place, source.items.slice(run.start, len(run)))
        for i, run in enumerate(runs(keys, images_per_shard))
    ]


def read(shard: InputShard) -> Iterator[tuple[Item, bytes | np.ndarray | None]]:
    """Each item of a shard with its content: an encoded file, or (H, W, C) uint8 pixels.

    What is known to be bad comes as None.

    Raises:
        DataError: a file is not what the scan found, or cannot be read now.
    """
    rows = shard.items.to_pylist()
    contents = _contents(shard.place, [row for row in rows if not row["bad"]])
    for row in rows:
        item = Item(row["key"], row["number"], row["digest"], row["bad"])
        if item.bad:
            yield item, None
            continue
        try:
            raw = next(contents)
            is_same = _is_same(raw, item.digest, shard.place, row["file"])
        except (FileNotFoundError, StopIteration):
            is_same = False
        except DataError:
            raise
        except Exception as error:  # whatever the package of that scheme raises
            reason = explain(error, shard.source) or f"{error}; run the same command again"
            raise shard.place.error(row["file"], f"cannot be read: {reason}") from error
        if not is_same:
            raise DataError(
                f"data.source={shard.source!r}: the image {item.key!r} changed while the source "
                "was being read; run the same command again"
            )
        yield item, raw


def _contents(place: Place, rows: list[dict[str, Any]]) -> Iterator[bytes | np.ndarray]:
    for module, run in itertools.groupby(rows, key=lambda row: format_of(place, row["file"])):
        if module is loose:
            yield from place.read_many([row["file"] for row in run])
            continue
        assert module is not None  # the scan read it
        for file, members in itertools.groupby(run, key=lambda row: row["file"]):
            yield from module.read(place, file, [tuple(row["where"]) for row in members])


def _is_same(raw: bytes | np.ndarray, digest: str, place: Place, file: str) -> bool:
    content = raw if isinstance(raw, bytes) else np.ascontiguousarray(raw).data
    if not digest.startswith("etag:"):
        return hashlib.sha256(content).hexdigest() == digest
    etag = digest.removeprefix("etag:")
    # usually an MD5; what else it may be only the store knows
    return hashlib.md5(content).hexdigest() == etag or place.etag(file) == etag
