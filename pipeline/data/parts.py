"""The parts of a split where they lie: on a local disk or in an object store.

How many images each has stands in the list of the ShardSet's shards, so none is opened before an
image of it is wanted: there may be a million of them, and thousands of processes that train.

They are read by row group. What is read is checked against the checksums that Parquet keeps of its
pages; the sha256 of a part can only be checked by those who read the whole of it.
"""

import contextlib
import functools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.data import shard_list
from pipeline.data.shards import NO_IMAGES, ImageSet, corrupt, images_of, labels_of, part_path
from pipeline.errors import CorruptArtifact, DataError, StorageError
from pipeline.seeding import key, permutation
from pipeline.storage import FileEntry
from pipeline.storage.filesystem import filesystem_of

COLUMNS = ["image", "label"]
FOOTERS_KEPT = 1024
"""Of parts that were read last: where there are more, reading a row group takes a request more."""
PIECE_BYTES = 2**22
"""What is read, and decoded, at once where single images of a part are wanted."""


@dataclass(frozen=True)
class Part:
    """One Parquet file of a split."""

    shard_set: str
    entry: FileEntry
    num_images: int
    row_group_size: int

    @property
    def uri(self) -> str:
        return storage.join(self.shard_set, self.entry.path)

    @property
    def footer(self) -> Any:
        """pyarrow's FileMetaData; raises as read_group does."""
        footer = _footer(self.shard_set, self.entry.path, self.entry.bytes, self.entry.sha256)
        if footer.num_rows != self.num_images:
            why = f"has {footer.num_rows:,} images, the list of shards says {self.num_images:,}"
            raise corrupt(self.shard_set, self.entry.path, why)
        return footer

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of its images; raises as read_group does."""
        height, width, channels = json.loads(self.footer.metadata[b"shape"])
        return height, width, channels

    @property
    def group_sizes(self) -> list[int]:
        """The images of each of its row groups."""
        whole, rest = divmod(self.num_images, self.row_group_size)
        return [self.row_group_size] * whole + [rest] * (rest > 0)

    def read_group(self, group: int) -> tuple[np.ndarray, np.ndarray]:
        """The images (N, H, W, C) uint8 and labels (N,) int64 of a row group.

        Raises:
            CorruptArtifact: the part is missing or damaged.
            StorageError: it cannot be read.
        """
        with self._reader(pre_buffer=True) as parquet:
            return arrays_of(parquet.read_row_group(group, columns=COLUMNS, use_threads=False))

    def read_labels(self) -> np.ndarray:
        """The labels (n,) int64 of all its images; raises as read_group does."""
        with self._reader() as parquet:
            return labels_of(parquet.read(columns=["label"], use_threads=False))

    def read_images(self, rows: Sequence[int]) -> Iterator[np.ndarray]:
        """The images (H, W, C) uint8 at these rows, which ascend; raises as read_group does.

        What lies between them is read in pieces and let go of.
        """
        batch_size = max(1, PIECE_BYTES // math.prod(self.shape))
        with self._reader(pre_buffer=False, buffer_size=PIECE_BYTES) as parquet:
            begin = 0
            for group, size in enumerate(self.group_sizes):
                wanted = [row - begin for row in rows if begin <= row < begin + size]
                begin += size
                if wanted:
                    batches = parquet.iter_batches(
                        batch_size, row_groups=[group], columns=["image"], use_threads=False
                    )
                    yield from _images_in(batches, wanted)

    @contextlib.contextmanager
    def _reader(self, **how: Any) -> Iterator[pq.ParquetFile]:
        footer = self.footer
        with (
            _opened(self.shard_set, self.entry) as file,
            pq.ParquetFile(
                file, metadata=footer, page_checksum_verification=True, **how
            ) as parquet,
        ):
            yield parquet


def _images_in(batches: Iterable[pa.RecordBatch], wanted: list[int]) -> Iterator[np.ndarray]:
    """The images at these rows of a row group; what follows the last is not read."""
    start = 0
    for batch in batches:
        stop = start + batch.num_rows
        here = [row - start for row in wanted if start <= row < stop]
        if here:
            yield from images_of(pa.Table.from_batches([batch]).take(here))
        if wanted[-1] < stop:
            return
        start = stop


def arrays_of(table: Any) -> tuple[np.ndarray, np.ndarray]:
    """The images (N, H, W, C) uint8 and labels (N,) int64 of a part's table."""
    return images_of(table), labels_of(table)


class Parts:
    """The parts of a split in their order, none of them opened.

    Args:
        shards: the list of the ShardSet's shards.
    """

    def __init__(self, shard_set: str, split: str, shards: pa.Table) -> None:
        self.shard_set, self.split = shard_set, split
        images = shards[f"{split}_images"].to_numpy()
        self._shards = np.flatnonzero(images)
        self._bytes, self._sha256 = (
            shards[f"{split}_{what}"].combine_chunks() for what in ("bytes", "sha256")
        )
        self._row_group_size = int(shards.schema.metadata[b"row_group_size"])
        self.num_images: np.ndarray = images[self._shards]
        """(n,) int64: of each part"""
        groups = -(-self.num_images // self._row_group_size)
        self._first_groups: np.ndarray = np.cumsum(groups) - groups
        self.group_sizes = np.full(groups.sum(), self._row_group_size, np.int64)
        """(G,) int64: the images of each row group of all parts, in their order"""
        self.group_sizes[self._first_groups + groups - 1] -= (
            groups * self._row_group_size - self.num_images
        )

    def __len__(self) -> int:
        return len(self._shards)

    def __getitem__(self, i: int) -> Part:
        shard = int(self._shards[i])
        entry = FileEntry(
            path=part_path(self.split, shard),
            bytes=self._bytes[shard].as_py(),
            sha256=self._sha256[shard].as_py().hex(),
        )
        return Part(self.shard_set, entry, int(self.num_images[i]), self._row_group_size)

    def __iter__(self) -> Iterator[Part]:
        return map(self.__getitem__, range(len(self)))

    def read_group(self, group: int) -> tuple[np.ndarray, np.ndarray]:
        """`read_group` of the part that has the row group `group` of all parts."""
        i = int(np.searchsorted(self._first_groups, group, side="right")) - 1
        return self[i].read_group(group - int(self._first_groups[i]))

    def holding(self, indices: np.ndarray) -> Iterator[tuple[Part, int, np.ndarray]]:
        """The parts that have some images of the split, with how many images lie before each, and
        which of the rising `indices` it has."""
        ends = np.cumsum(self.num_images)
        of_part = np.searchsorted(ends, indices, side="right")
        for i, first, stop in _runs(of_part):
            yield self[i], int(ends[i] - self.num_images[i]), indices[first:stop]


def _runs(values: np.ndarray) -> Iterator[tuple[int, int, int]]:
    """(value, start, stop) of the runs of equal values in a rising array."""
    found, firsts = np.unique(values, return_index=True)
    stops = [*firsts[1:].tolist(), len(values)]
    yield from zip(found.tolist(), firsts.tolist(), stops, strict=True)


def read_parts(shard_set: str, split: str) -> Parts:
    """The parts of a split of a ShardSet.

    Raises:
        FileNotFoundError: the ShardSet is not complete.
        DataError: the split is empty.
        CorruptArtifact: the list of its shards is missing or damaged.
        StorageError: it cannot be read.
    """
    parts = Parts(shard_set, split, shard_list.read(shard_set))
    if not len(parts):
        raise DataError(
            f"{shard_set} has no images in {split}: give it more, or lower data.holdout"
        )
    return parts


def keys_at(parts: Parts, indices: np.ndarray) -> list[str]:
    """The keys of images of a split, by their indices over all of its parts.

    Raises:
        CorruptArtifact: a part is missing or damaged.
        StorageError: a part cannot be read.
    """
    keys: dict[int, str] = {}
    for part, begin, of_part in parts.holding(np.unique(indices)):
        with _opened(part.shard_set, part.entry) as file:
            column = pq.read_table(file, columns=["key"])["key"]
        found = column.take(pa.array(of_part - begin)).to_pylist()
        keys |= dict(zip(of_part.tolist(), found, strict=True))
    return [keys[index] for index in indices.tolist()]


def images_at(shard_set: str, split: str, indices: np.ndarray) -> ImageSet:
    """The images of a split at some indices, in that order; what lies between is let go of.

    Raises:
        FileNotFoundError: the ShardSet is not complete.
        CorruptArtifact: a part is missing or damaged.
        StorageError: a part cannot be read.
    """
    if not len(indices):
        return NO_IMAGES
    rising = np.unique(indices)
    images, labels = [], []
    for part, begin, of_part in read_parts(shard_set, split).holding(rising):
        rows = of_part - begin
        images.append(np.stack(list(part.read_images(rows.tolist()))))
        labels.append(part.read_labels()[rows])
    place = np.searchsorted(rising, indices)
    return ImageSet(np.concatenate(images)[place], np.concatenate(labels)[place])


def choose(n: int, most: int, seed: int) -> np.ndarray:
    """The numbers below n, or `most` of them, chosen by the seed; rising."""
    return np.sort(permutation(key(seed, "sample"), n)[:most]) if n > most else np.arange(n)


@functools.lru_cache(FOOTERS_KEPT)
def _footer(shard_set: str, path: str, size: int, sha256: str) -> Any:
    entry = FileEntry(path=path, bytes=size, sha256=sha256)
    with _opened(shard_set, entry) as file:
        there = file.seek(0, 2)
        if there != size:
            why = f"has {there:,} bytes, the list of shards says {size:,}"
            raise corrupt(shard_set, path, why)
        file.seek(0)
        return pq.read_metadata(file)


@contextlib.contextmanager
def _opened(shard_set: str, entry: FileEntry) -> Iterator[Any]:
    """A part as a file of random access; whatever goes wrong while it is read, in one sentence."""
    uri = storage.join(shard_set, entry.path)
    try:
        with _open(uri) as file:
            yield file
    except (CorruptArtifact, StorageError):
        raise
    except FileNotFoundError as error:
        raise corrupt(shard_set, entry.path, "is missing") from error
    except Exception as error:
        # pyarrow's own errors are of the content, those of the system and of a store have a number
        # or a type of theirs
        if isinstance(error, pa.ArrowException) or (type(error) is OSError and not error.errno):
            raise corrupt(shard_set, entry.path, f"is damaged ({str(error).strip()})") from error
        raise StorageError(f"cannot read {uri}: {error}") from error


def _open(uri: str) -> Any:
    path = storage.local_path(uri)
    if path is not None:
        return pa.OSFile(str(path))
    fs, name = filesystem_of(uri)
    return fs.open(name, "rb", cache_type="none")  # a row group is one request, exactly of its size
