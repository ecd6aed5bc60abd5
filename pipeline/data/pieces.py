"""What is in the files of a source: each is looked into by its format, many small ones together.

What was found in a file is kept under its name, size and time of modification, so that a second
scan of the source only lists it.
"""

import hashlib
import io
import itertools
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.data.formats import arrays, cifar, digits, idx, loose, parquet, tar_files, zip_files
from pipeline.data.formats.common import (
    IMAGE_SUFFIXES,
    MAX_IMAGE_BYTES,
    TOO_LARGE,
    Member,
    Place,
)
from pipeline.data.listing import BUILTIN, ListedFile, look_up
from pipeline.errors import DataError

FORMATS: tuple[tuple[tuple[str, ...], ModuleType], ...] = (
    ((".tar", ".tar.gz", ".tgz"), tar_files),
    ((".zip",), zip_files),
    ((".parquet",), parquet),
    ((".npy", ".npz"), arrays),
    ((".bin",), cifar),
)
"""By the end of a file's name; besides, image files and IDX files, whose names are known whole."""

LOOSE_FILES_PER_PIECE = 1024
PIECE_FORMAT = 2
"""Raised when the formats find something else in the same files."""
SHA256_BYTES = 32

ITEMS = pa.schema(
    [
        ("key", pa.string()),  # where the lineage of a training image ends
        ("file", pa.string()),
        ("where", pa.list_(pa.int64())),  # in that file, as its format means it
        ("number", pa.int64()),  # the label, if it is a number
        ("name", pa.string()),  # the label, if it is the name of a class
        ("digest", pa.string()),  # of the content, empty if it cannot be read
        ("bad", pa.string()),  # why it cannot be used, if that is known already
    ]
)
"""The images of a source, unread; after the scan, `number` is the final label of each."""


def format_of(place: Place, name: str) -> ModuleType | None:
    """The module of `pipeline.data.formats` that reads a file of this name, if there is one."""
    if place.uri == BUILTIN:
        return digits
    low = name.lower()
    if low.endswith(IMAGE_SUFFIXES):
        return loose
    if idx.is_images(low):
        return idx
    return next((module for suffixes, module in FORMATS if low.endswith(suffixes)), None)


@dataclass(frozen=True)
class Piece:
    """Files of one format that are looked into together: an archive, or many image files."""

    place: Place
    names: Sequence[str]
    """With the next two in columns: a piece goes to a task, and has thousands of files."""
    sizes: Sequence[int]
    etags: Sequence[str]
    digest: str
    """Of where they are and how they look in a listing, with those that `index` looks at beside
    them; empty where a listing would not show that one has changed."""

    @property
    def format(self) -> ModuleType:
        module = format_of(self.place, self.names[0])
        assert module is not None  # the others are in no piece
        return module


LookInto = Callable[[list[Piece], str | None], Iterator[tuple[int, pa.Table]]]
"""Calls `look` of each of the pieces with the folder; yields (index, ITEMS) as each is found."""


def pieces_of(place: Place, files: list[ListedFile]) -> list[Piece]:
    """The files that some format reads: first each archive, then the image files in runs."""
    images, pieces = [], []
    for file in files:
        module = format_of(place, file.name)
        if module is loose:
            images.append(file)
        elif module in (idx, cifar):  # their labels, or the names of classes, lie beside them
            beside = look_up(place, module.beside(file.name))
            pieces.append(_piece(place, module, [file], beside))
        elif module is not None:
            pieces.append(_piece(place, module, [file], []))
    for run in runs([file.name for file in images], LOOSE_FILES_PER_PIECE):
        pieces.append(_piece(place, loose, images[run.start : run.stop], []))
    return pieces


def _piece(
    place: Place, module: ModuleType, files: list[ListedFile], beside: list[ListedFile]
) -> Piece:
    marks = [(file.name, file.size, file.mark) for file in (*files, *beside)]
    digest = storage.digest([PIECE_FORMAT, module.__name__, place.uri, marks])
    return Piece(
        place,
        [file.name for file in files],
        [file.size for file in files],
        [file.etag for file in files],
        digest if all(mark for _, _, mark in marks) else "",
    )


def runs(keys: Iterable[str], mean: int) -> Iterator[range]:
    """Ranges over `keys`, of `mean` on average, from half to twice as many.

    A run ends at a key whose hash says so, so keys that come or go change the runs they are in,
    and no run far from them.
    """
    least, most = max(1, mean // 2), 2 * mean
    start = stop = 0
    for stop, key in enumerate(keys, start=1):
        length = stop - start
        # beyond the least, the chance of an end is such that the mean length is `mean`
        is_end = zlib.crc32(key.encode()) % (mean - least + 1) == 0
        if length == most or (length >= least and is_end):
            yield range(start, stop)
            start = stop
    if start < stop:
        yield range(start, stop)


def recall(piece: Piece, folder: str) -> pa.Table | None:
    """What an earlier `look` kept in `folder`, None if it did not, or if the file is damaged."""
    if not piece.digest:
        return None
    try:
        kept = storage.read_bytes(_uri(piece, folder))
    except FileNotFoundError:
        return None
    # of the whole file: Parquet's own checksums leave out its footer and the headers of its pages
    found, data = kept[:SHA256_BYTES], memoryview(kept)[SHA256_BYTES:]
    if hashlib.sha256(data).digest() != found:
        return None
    return pq.read_table(pa.BufferReader(data))


def _keep(items: pa.Table, piece: Piece, folder: str) -> None:
    """A sha256, and Parquet of which it is."""
    sink = io.BytesIO()
    pq.write_table(items, sink, compression="zstd")
    data = sink.getvalue()
    storage.write_bytes(_uri(piece, folder), hashlib.sha256(data).digest() + data)


def _uri(piece: Piece, folder: str) -> str:
    return storage.join(folder, f"{piece.digest}.items")


def look(piece: Piece, keep_in: str | None = None, hashed: bool = True) -> pa.Table:
    """ITEMS of the piece's files.

    Args:
        keep_in: URI of the folder in which `recall` will find them.
        hashed: with a hash of each image; without, image files and archives of them are not read,
            and what is wrong within an image is not found.

    Raises:
        DataError: a file is damaged or cannot be read.
    """
    module = piece.format
    rows: list[tuple[str, str, Member]] = []
    for name, size, etag in zip(piece.names, piece.sizes, piece.etags, strict=True):
        if module is loose and size > MAX_IMAGE_BYTES:
            rows.append((name, name, Member("", None, "", bad=TOO_LARGE)))
            continue
        if module is loose and etag and hashed:  # the store has hashed it already
            rows.append((name, name, Member("", None, f"etag:{etag}")))
            continue
        try:
            for member in module.index(piece.place, name, hashed):
                rows.append((_key(module, name, member), name, member))
        except DataError:
            raise
        except Exception as error:  # whatever the package of that scheme raises
            raise piece.place.error(
                name, f"cannot be read: {error}; run the same command again"
            ) from error
    labels = [_folder(name) if module is loose else member.label for _, name, member in rows]
    items = pa.table(
        [
            [key for key, _, _ in rows],
            [name for _, name, _ in rows],
            [list(member.where) for _, _, member in rows],
            [label if isinstance(label, int) else None for label in labels],
            [label if isinstance(label, str) else None for label in labels],
            [member.digest for _, _, member in rows],
            [member.bad for _, _, member in rows],
        ],
        schema=ITEMS,
    )
    assert hashed or keep_in is None  # else `recall` would take them for what a scan found
    if keep_in is not None and piece.digest:
        _keep(items, piece, keep_in)
    return items


def _key(module: ModuleType, file: str, member: Member) -> str:
    stem = idx.stem(file) if module is idx else file
    return f"{stem}/{member.name}" if member.name else stem


def _folder(name: str) -> str | None:
    """The class of an image file: the first folder of its path."""
    return name.split("/", 1)[0] if "/" in name else None


def look_on_threads(pieces: list[Piece], keep_in: str | None) -> Iterator[tuple[int, pa.Table]]:
    """LookInto, in this process."""
    with ThreadPoolExecutor(max_workers=8) as pool:
        yield from enumerate(pool.map(look, pieces, itertools.repeat(keep_in)))
