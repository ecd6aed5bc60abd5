"""The parts of a split where they lie: on a local disk or in an object store.

They are read by row group. What is read is checked against the checksums that Parquet keeps of its
pages; the sha256 of a part can only be checked by those who read the whole of it.
"""

import contextlib
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from fsspec.core import url_to_fs

from pipeline import storage
from pipeline.data.shards import NO_IMAGES, ImageSet, corrupt, images_of, labels_of
from pipeline.errors import CorruptArtifact, DataError, StorageError
from pipeline.seeding import key, permutation
from pipeline.storage import FileEntry

COLUMNS = ["image", "label"]
FOOTERS_AT_ONCE = 16
PIECE_BYTES = 2**22
"""What is read, and decoded, at once where single images of a part are wanted."""


@dataclass(frozen=True)
class Part:
    """One Parquet file of a split."""

    shard_set: str
    entry: FileEntry
    footer: Any
    """pyarrow's FileMetaData"""

    @property
    def uri(self) -> str:
        return storage.join(self.shard_set, self.entry.path)

    @property
    def num_images(self) -> int:
        return int(self.footer.num_rows)

    @property
    def shape(self) -> tuple[int, int, int]:
        """(H, W, C) of its images."""
        height, width, channels = json.loads(self.footer.metadata[b"shape"])
        return height, width, channels

    @property
    def group_sizes(self) -> list[int]:
        """The images of each of its row groups."""
        return [self.footer.row_group(i).num_rows for i in range(self.footer.num_row_groups)]

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
        with (
            _opened(self.shard_set, self.entry) as file,
            pq.ParquetFile(
                file, metadata=self.footer, page_checksum_verification=True, **how
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


def read_parts(shard_set: str, split: str) -> list[Part]:
    """The parts of a split of a ShardSet in their order; only their footers are read.

    Raises:
        FileNotFoundError: the ShardSet is not complete.
        DataError: the split is empty.
        CorruptArtifact: a part is missing, damaged, or not of the size in the manifest.
        StorageError: a part cannot be read.
    """
    manifest = storage.read_manifest(shard_set)
    if manifest is None:
        raise FileNotFoundError(f"there is no complete ShardSet at {shard_set}")
    entries = [entry for entry in manifest.files if entry.path.startswith(f"{split}/")]
    with ThreadPoolExecutor(FOOTERS_AT_ONCE) as pool:
        parts = list(pool.map(lambda entry: read_footer(shard_set, entry), entries))
    if not any(part.num_images for part in parts):
        raise DataError(
            f"{shard_set} has no images in {split}: give it more, or lower data.holdout"
        )
    return parts


def keys_at(parts: list[Part], indices: np.ndarray) -> list[str]:
    """The keys of images of a split, by their indices over all of its parts.

    Raises:
        CorruptArtifact: a part is missing or damaged.
        StorageError: a part cannot be read.
    """
    ends = np.cumsum([part.num_images for part in parts])
    keys: dict[int, str] = {}
    for i in sorted(set(np.searchsorted(ends, indices, side="right").tolist())):
        with _opened(parts[i].shard_set, parts[i].entry) as file:
            of_part = pq.read_table(file, columns=["key"])["key"].to_pylist()
        keys |= dict(enumerate(of_part, start=int(ends[i]) - len(of_part)))
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
    parts = read_parts(shard_set, split)
    rising = np.unique(indices)
    images, labels, begin = [], [], 0
    for part in parts:
        rows = rising[(rising >= begin) & (rising < begin + part.num_images)] - begin
        begin += part.num_images
        if len(rows):
            images.append(np.stack(list(part.read_images(rows.tolist()))))
            labels.append(part.read_labels()[rows])
    place = np.searchsorted(rising, indices)
    return ImageSet(np.concatenate(images)[place], np.concatenate(labels)[place])


def choose(n: int, most: int, seed: int) -> np.ndarray:
    """The numbers below n, or `most` of them, chosen by the seed; rising."""
    return np.sort(permutation(key(seed, "sample"), n)[:most]) if n > most else np.arange(n)


def read_footer(shard_set: str, entry: FileEntry) -> Part:
    """A part of which the footer alone is read.

    Raises:
        CorruptArtifact: it is missing, damaged, or not of the size in its entry.
        StorageError: it cannot be read.
    """
    with _opened(shard_set, entry) as file:
        size = file.seek(0, 2)
        if size != entry.bytes:
            why = f"has {size:,} bytes, its manifest says {entry.bytes:,}"
            raise corrupt(shard_set, entry.path, why)
        file.seek(0)
        return Part(shard_set, entry, pq.read_metadata(file))


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
    fs, name = url_to_fs(uri)
    return fs.open(name, "rb", cache_type="none")  # a row group is one request, exactly of its size
