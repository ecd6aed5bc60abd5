"""Where images come from: what there is, with a hash of each, and how to read it.

A source is scanned once, on the driver: its files are listed, and each is looked into by its
format. What was found in a file is kept in the storage under the file's name, size and time, so a
second scan only lists. The images, in the order in which they lie in their files, are then cut
into input shards, each of which is read by whoever preprocesses it.
"""

import hashlib
import io
import itertools
import zlib
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Annotated, Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import BaseModel, Field, field_validator, model_validator

from pipeline import storage
from pipeline.data.formats import arrays, cifar, digits, idx, loose, parquet, tar_files, zip_files
from pipeline.data.formats.common import IMAGE_SUFFIXES, Member, Place
from pipeline.data.labels import Label, find_label, read_labels
from pipeline.data.listing import BUILTIN, ListedFile, list_files
from pipeline.errors import DataError

MAX_SHARD_BYTES = 2**30
"""Decoded pixels of a shard; while they are encoded a task holds them three times."""


class DataConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """Which images, and the form in which they are stored."""

    source: str = Field(min_length=1)
    """A folder, an archive, or a glob of either, as a path or fsspec URI; or `builtin:digits`.
    Each file is read as what its name says: see FORMATS."""
    labels: str | None = None
    """A .csv, .tsv, .json or .jsonl file with the label of each image, in place of the source's
    own."""
    class_names: Annotated[tuple[str, ...], Field(strict=False)] | None = None
    """In place of the source's own names, in the order of the labels: numbers have no names."""
    image_size: int = Field(ge=4, le=4096)
    """Height and width in pixels."""
    channels: Literal[1, 3]
    """1 for grey, 3 for RGB."""
    resize: Literal["crop", "exact"] = "crop"
    """crop: the shortest side is resized to image_size, the centre kept. exact: both sides are."""
    min_size: int = Field(default=0, ge=0)
    """Images with a shorter side than so many pixels are left out."""
    max_aspect: float = Field(default=100.0, ge=1.0, allow_inf_nan=False)
    """Images whose longer side is more than so many times the shorter are left out."""
    drop_duplicates: bool = True
    """Of images of the same content only the first is kept."""
    encoding: Literal["raw", "png"] = "raw"
    """How the parts hold the pixels: raw is read fastest, png is smaller and an Image to others."""
    holdout: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of the images that training never sees, chosen by the hash of their key."""
    max_bad_fraction: float = Field(default=0.01, ge=0.0, le=1.0)
    """More undecodable images than this share stop the stage."""
    images_per_shard: int = Field(default=512, ge=1)
    """On average; a shard has between half and twice as many."""

    @model_validator(mode="after")
    def _a_shard_fits_in_memory(self) -> "DataConfig":
        largest = MAX_SHARD_BYTES // (2 * self.image_size**2 * self.channels)
        if self.images_per_shard > max(1, largest):
            raise ValueError(
                f"images_per_shard={self.images_per_shard} images of {self.image_size} pixels a "
                f"side are too much for the memory of one task: use at most {max(1, largest)}"
            )
        return self

    @field_validator("class_names")
    @classmethod
    def _names_differ(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if twice := [name for name in names or () if (names or ()).count(name) > 1]:
            raise ValueError(f"the name {twice[0]!r} stands twice, and a request could not tell")
        return names


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


FORMATS: tuple[tuple[tuple[str, ...], ModuleType], ...] = (
    ((".tar", ".tar.gz", ".tgz"), tar_files),
    ((".zip",), zip_files),
    ((".parquet",), parquet),
    ((".npy", ".npz"), arrays),
    ((".bin",), cifar),
)
"""By the end of a file's name; besides, image files and IDX files, whose names are known whole."""

MAX_CLASSES = 2**20
LOOSE_FILES_PER_PIECE = 1024
PIECE_FORMAT = 1
"""Raised when the formats find something else in the same files."""

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
    """What the images are, whatever the place they lie in or the time they were written."""


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


def scan(
    config: DataConfig,
    index_folder: str | None = None,
    remember: bool = False,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Source:
    """List a source's images with their labels and hashes.

    Args:
        index_folder: URI of a folder with what earlier scans found in files; they are not read
            again while their size and modification mark are the same.
        remember: add to that folder.
        progress: called with the number of files looked into, and of all.

    Raises:
        DataError: the source is missing, damaged or holds no image; or its labels do not fit.
    """
    place, files = list_files(config.source)
    pieces = _pieces(place, files)
    if not pieces:
        raise DataError(
            f"data.source={config.source!r} holds no image ({len(files)} files looked at; images "
            f"end in {', '.join(IMAGE_SUFFIXES)}, archives and arrays in "
            f"{', '.join(suffix for suffixes, _ in FORMATS for suffix in suffixes)})"
        )

    def look(piece: _Piece) -> pa.Table:
        if index_folder is None or place.uri == BUILTIN:
            return _index(place, piece)
        uri = storage.join(index_folder, f"{piece.digest}.parquet")
        known = _read_piece(uri)
        if known is not None:
            return known
        found = _index(place, piece)
        if remember:
            sink = io.BytesIO()
            pq.write_table(found, sink, compression="zstd")
            storage.write_bytes(uri, sink.getvalue())
        return found

    tables, done = [], 0
    num_files = sum(len(piece.files) for piece in pieces)
    progress(0, num_files)
    with ThreadPoolExecutor(max_workers=8) as pool:
        for piece, table in zip(pieces, pool.map(look, pieces), strict=True):
            tables.append(table)
            done += len(piece.files)
            progress(done, num_files)
    items = pa.concat_tables(tables)
    if not items.num_rows:
        raise DataError(f"data.source={config.source!r} holds no image: its files are empty")
    items, class_names = _with_labels(config, items)
    kept, duplicates = _without_duplicates(items) if config.drop_duplicates else (items, [])
    return Source(
        config.source, place, class_names, kept, duplicates, _fingerprint(items, class_names)
    )


# --- looking into files -------------------------------------------------------------------------


@dataclass(frozen=True)
class _Piece:
    """Files that are looked into together: one archive, or many image files."""

    format: ModuleType
    files: Sequence[ListedFile]
    digest: str


def _pieces(place: Place, files: list[ListedFile]) -> list[_Piece]:
    images, pieces = [], []
    for file in files:
        module = format_of(place, file.name)
        if module is loose:
            images.append(file)
        elif module in (idx, cifar):  # their labels, or the names of classes, lie beside them
            folder = file.name.rpartition("/")[0]
            beside = [
                other
                for other in files
                if other.name.rpartition("/")[0] == folder and format_of(place, other.name) is None
            ]
            pieces.append(_piece(place, module, [file], beside))
        elif module is not None:
            pieces.append(_piece(place, module, [file], []))
    for run in _cut([file.name for file in images], LOOSE_FILES_PER_PIECE):
        pieces.append(_piece(place, loose, images[run.start : run.stop], []))
    return pieces


def _piece(
    place: Place, module: ModuleType, files: list[ListedFile], beside: list[ListedFile]
) -> _Piece:
    marks = [(file.name, file.size, file.mark) for file in (*files, *beside)]
    return _Piece(module, files, storage.digest([PIECE_FORMAT, module.__name__, place.uri, marks]))


def _read_piece(uri: str) -> pa.Table | None:
    try:
        table = pq.read_table(io.BytesIO(storage.read_bytes(uri)))
    except (FileNotFoundError, pa.ArrowInvalid):
        return None
    return table if table.schema.equals(ITEMS) else None


def _index(place: Place, piece: _Piece) -> pa.Table:
    """ITEMS of the piece's files."""
    rows: list[tuple[str, str, Member]] = []
    for file in piece.files:
        if piece.format is loose and file.etag:  # the store has hashed it already
            rows.append((file.name, file.name, Member("", None, f"etag:{file.etag}")))
            continue
        try:
            for member in piece.format.index(place, file.name):
                rows.append((_key(piece.format, file.name, member), file.name, member))
        except DataError:
            raise
        except Exception as error:  # whatever the package of that scheme raises
            raise place.error(
                file.name, f"cannot be read: {error}; run the same command again"
            ) from error
    labels = [_folder(name) if piece.format is loose else member.label for _, name, member in rows]
    return pa.table(
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


def _key(module: ModuleType, file: str, member: Member) -> str:
    stem = idx.stem(file) if module is idx else file
    return f"{stem}/{member.name}" if member.name else stem


def _folder(name: str) -> str | None:
    """The class of an image file: the first folder of its path."""
    return name.split("/", 1)[0] if "/" in name else None


# --- labels, duplicates, identity ---------------------------------------------------------------


def _with_labels(config: DataConfig, items: pa.Table) -> tuple[pa.Table, list[str]]:
    """The items with their final labels in `number`, and the names of the classes."""
    numbers, names = items["number"].to_pylist(), items["name"].to_pylist()
    if config.labels is not None:
        given = read_labels(config.labels)
        found: list[Label | None] = [find_label(given, key) for key in items["key"].to_pylist()]
        if all(label is None for label in found):
            raise DataError(
                f"data.labels={config.labels!r} names none of the images of data.source="
                f"{config.source!r}: it has {next(iter(given))!r}, the source "
                f"{items['key'][0].as_py()!r}"
            )
        numbers = [label if isinstance(label, int) else None for label in found]
        names = [label if isinstance(label, str) else None for label in found]

    of_names = sorted({name for name in names if name is not None})
    of_numbers = {number for number in numbers if number is not None}
    if of_names and of_numbers:
        raise DataError(
            f"data.source={config.source!r} has both names of classes, such as {of_names[0]!r}, "
            f"and numbers, such as {min(of_numbers)}, as labels: give all of them in data.labels"
        )
    if wrong := {number for number in of_numbers if not 0 <= number < MAX_CLASSES}:
        raise DataError(
            f"data.source={config.source!r} has the label {min(wrong)}: labels are numbers from 0 "
            f"to {MAX_CLASSES - 1:,}, one after the other"
        )
    class_names = of_names
    if of_numbers:
        class_names = [str(number) for number in range(max(of_numbers) + 1)]
    else:
        place = {name: i for i, name in enumerate(of_names)}
        numbers = [None if name is None else place[name] for name in names]
    if config.class_names is not None:
        if len(config.class_names) != len(class_names):
            raise DataError(
                f"data.class_names has {len(config.class_names)} names, but data.source="
                f"{config.source!r} has {len(class_names)} classes: give one name a class, in the "
                "order of the labels"
            )
        class_names = list(config.class_names)
    column = pa.array(numbers, pa.int64())
    return items.set_column(items.schema.get_field_index("number"), "number", column), class_names


def _without_duplicates(items: pa.Table) -> tuple[pa.Table, list[tuple[str, str]]]:
    """The first of each content, and which were dropped for which."""
    digest = items["digest"].to_numpy()
    _, first, group = np.unique(digest, return_index=True, return_inverse=True)
    keeper = first[group]  # the row that each row is a copy of
    row = np.arange(len(digest))
    dropped = (keeper != row) & (digest != "")
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
    columns = (items[name].to_pylist() for name in ("key", "number", "digest", "bad"))
    for row in zip(*columns, strict=True):
        found.update(repr(row).encode())
    return found.hexdigest()


# --- input shards -------------------------------------------------------------------------------


def cut(source: Source, images_per_shard: int) -> list[InputShard]:
    """The source's items in runs of `images_per_shard` on average, from half to twice as many.

    A run ends at a key whose hash says so, so images that come or go change the runs they are in,
    and no run far from them.
    """
    keys = source.items["key"].to_pylist()
    return [
        InputShard(i, source.uri, source.place, source.items.slice(run.start, len(run)))
        for i, run in enumerate(_cut(keys, images_per_shard))
    ]


def _cut(keys: list[str], mean: int) -> Iterator[range]:
    least, most = max(1, mean // 2), 2 * mean
    start = 0
    for i, key in enumerate(keys):
        length = i + 1 - start
        # beyond the least, the chance of an end is such that the mean length is `mean`
        is_end = zlib.crc32(key.encode()) % (mean - least + 1) == 0
        if length == most or (length >= least and is_end):
            yield range(start, i + 1)
            start = i + 1
    if start < len(keys):
        yield range(start, len(keys))


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
        except (FileNotFoundError, StopIteration):
            raw = b""
        except DataError:
            raise
        except Exception as error:  # whatever the package of that scheme raises
            raise shard.place.error(
                row["file"], f"cannot be read: {error}; run the same command again"
            ) from error
        if not _is_same(raw, item.digest, shard.place, row["file"]):
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
