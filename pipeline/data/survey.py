"""A survey of a source: what its images are like, from a sample of them.

All files are listed, and archives looked into until they have shown enough images; of these a few
hundred are read and decoded. So it takes seconds and little memory of a million images, too.
"""

import hashlib
import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from pipeline.data.config import DataConfig
from pipeline.data.formats import loose
from pipeline.data.formats.choice import format_of
from pipeline.data.images import BadImage, decode
from pipeline.data.items import FileGroup, list_groups, look
from pipeline.data.place import Place
from pipeline.data.shards import split_of
from pipeline.data.source import with_labels
from pipeline.errors import DataError
from pipeline.seeding import key, permutation
from pipeline.storage.refusals import explain

MOST_IN_ARCHIVES = 100_000
"""Images after which no further archive is looked into."""
RUNS, RUN = 32, 8
"""The sample: so many images that follow one another, at so many places; what lies before an image
of an archive must often be read, too."""
THREADS = 4
THUMBNAIL = 64
"""Pixels of a side at which the colours of an image are compared."""
GREY_SPREAD = 16
"""By which the channels of a grey pixel differ at most: JPEG leaves a little."""
COLOURED_PIXELS = 0.01
"""An image with a larger share of coloured pixels has colour."""


class Seen(NamedTuple):
    """An image of the sample."""

    key: str
    digest: str
    """sha256 of its content."""
    width: int
    height: int
    has_colour: bool
    seconds: float
    """Of a core, to decode it."""


@dataclass(frozen=True)
class Survey:
    """What was found."""

    source: str
    num_images: int
    """All of them, or about as many if `is_counted` is false."""
    is_counted: bool
    class_names: list[str]
    class_counts: list[int]
    """Images by class, of those that were found."""
    seen: list[Seen]
    """The usable images of the sample, of the same content the first alone."""
    num_doubles: int
    """Usable images of the sample with the content of another one of it."""
    bad: list[tuple[str, str]]
    """(key, reason) of each image of the sample that cannot be used."""

    @property
    def num_sampled(self) -> int:
        return len(self.seen) + self.num_doubles + len(self.bad)

    @property
    def is_whole(self) -> bool:
        """Whether every image is in the sample."""
        return self.num_sampled == self.num_images

    @property
    def seconds_per_image(self) -> float:
        """Of a core, to decode one."""
        return float(np.median([image.seconds for image in self.seen]))

    @cached_property
    def shorter_sides(self) -> np.ndarray:
        """(n,) rising, in pixels."""
        return np.sort([min(image.width, image.height) for image in self.seen])

    @cached_property
    def median_size(self) -> tuple[int, int]:
        """(width, height)"""
        sizes = np.array([(image.width, image.height) for image in self.seen])
        width, height = np.median(sizes, axis=0).astype(int).tolist()
        return width, height

    @property
    def num_with_colour(self) -> int:
        return sum(image.has_colour for image in self.seen)

    def least_to_train(self, holdout: float) -> int:
        """Training images that there are for certain: usable ones of the sample."""
        return sum(split_of(image.key, holdout) == "train" for image in self.seen)


def survey(source: str, progress: Callable[[int, int], None] = lambda done, total: None) -> Survey:
    """What the images of a source are like.

    Args:
        progress: called with the number of images of the sample that were read, and of all.

    Raises:
        DataError: the source cannot be used, for a reason for which preprocessing would stop, too.
    """
    place, groups = list_groups(source)
    items, share = _items(groups)
    # of the rest of the config labels do not depend
    items, class_names = with_labels(DataConfig(source=source, image_size=4, channels=3), items)
    numbers = items["number"].drop_null().to_numpy()
    rows = items.take(pa.array(_sample(items.num_rows))).to_pylist()

    seen: dict[str, Seen] = {}
    bad, doubles = [], 0
    progress(0, len(rows))
    for i, (row, found) in enumerate(zip(rows, _look_at(place, rows, source), strict=True)):
        if isinstance(found, BadImage):
            bad.append((row["key"], str(found)))
        elif found.digest in seen:
            doubles += 1
        else:
            seen[found.digest] = found
        progress(i + 1, len(rows))
    if not seen:
        of = "its" if len(rows) == items.num_rows else f"{len(rows)} sampled of its"
        named = "; ".join(f"{key}: {reason}" for key, reason in bad[:3])
        raise DataError(
            f"data.source={source!r}: none of {of} {items.num_rows} images can be used ({named})"
        )
    return Survey(
        source,
        num_images=round(items.num_rows / share),
        is_counted=share == 1,
        class_names=class_names,
        class_counts=np.bincount(numbers, minlength=len(class_names)).tolist(),
        seen=list(seen.values()),
        num_doubles=doubles,
        bad=bad,
    )


def _items(groups: list[FileGroup]) -> tuple[pa.Table, float]:
    """ITEMS without hashes, in the order of the groups, and the share of the source that it is."""
    of_files = [i for i, group in enumerate(groups) if group.format is loose]
    archives = [i for i, group in enumerate(groups) if group.format is not loose]
    tables = {i: look(groups[i], hashed=False) for i in of_files}
    num_loose = sum(table.num_rows for table in tables.values())
    bytes_seen = found = 0
    for i in permutation(key(0, "survey"), len(archives)).tolist():
        if found >= MOST_IN_ARCHIVES:
            break
        tables[archives[i]] = look(groups[archives[i]], hashed=False)
        found += tables[archives[i]].num_rows
        bytes_seen += sum(groups[archives[i]].sizes)
    num_bytes = sum(sum(groups[i].sizes) for i in archives)
    items = pa.concat_tables(tables[i] for i in sorted(tables)).combine_chunks()
    if bytes_seen == num_bytes or not items.num_rows:
        return items, 1.0
    return items, items.num_rows / (num_loose + found * num_bytes / bytes_seen)


def _sample(n: int) -> np.ndarray:
    """Which of n images: all, or runs of them that are evenly spread; rising."""
    if n <= RUNS * RUN:
        return np.arange(n)
    starts = np.linspace(0, n - RUN, RUNS).astype(np.int64)
    return np.unique(starts[:, None] + np.arange(RUN))


def _look_at(place: Place, rows: list[dict[str, Any]], source: str) -> Iterator[Seen | BadImage]:
    """What each of the rows of ITEMS is like, or why it cannot be used."""
    with ThreadPoolExecutor(THREADS) as pool:
        for file, run in itertools.groupby(rows, key=_archive(place)):
            if file is None:  # each a file: several are on their way at once
                calls = ((place, row["file"], [row], source) for row in run)
                for found in pool.map(lambda call: list(_look_into(*call)), calls):
                    yield from found
            else:
                yield from _look_into(place, file, list(run), source)


def _archive(place: Place) -> Callable[[dict[str, Any]], str | None]:
    """The file in which a row lies beside others, None if it is one by itself."""
    return lambda row: None if format_of(place, row["file"]) is loose else row["file"]


def _look_into(
    place: Place, file: str, rows: list[dict[str, Any]], source: str
) -> Iterator[Seen | BadImage]:
    """The same of rows in one file."""
    module, known = format_of(place, file), [row for row in rows if not row["bad"]]
    assert module is not None  # it was listed by what reads it
    wheres, found = [tuple(row["where"]) for row in known], list[Seen | BadImage]()
    while len(found) < len(known):
        try:
            for raw in module.read(place, file, wheres[len(found) :]):
                found.append(_look_at_one(known[len(found)]["key"], raw))
        except DataError as error:  # it may be about this image alone: on with the next one
            found.append(BadImage(str(error)))
        except Exception as error:  # whatever the package of that scheme raises
            reason = explain(error, source) or f"{error}; run the same command again"
            raise place.error(file, f"cannot be read: {reason}") from error
    usable = iter(found)
    yield from (BadImage(row["bad"]) if row["bad"] else next(usable) for row in rows)


def _look_at_one(name: str, raw: bytes | np.ndarray) -> Seen | BadImage:
    began = time.thread_time()
    try:
        pixels, width, height = decode(raw, THUMBNAIL, 3, "exact")
    except BadImage as error:
        return error
    seconds = time.thread_time() - began
    spread = np.ptp(pixels, axis=-1)
    content = raw if isinstance(raw, bytes) else np.ascontiguousarray(raw).data
    has_colour = float((spread > GREY_SPREAD).mean()) > COLOURED_PIXELS
    digest = hashlib.sha256(content).hexdigest()
    return Seen(name, digest, width, height, has_colour, seconds)
