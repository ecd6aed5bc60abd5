"""The items of a source: the images in its files, unread.

Each file is looked into by its format, many small ones together. What was found in a file is kept
under its name, size and time of modification, so that a second scan of the source only lists it.
"""

import functools
import hashlib
import io
import itertools
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.data.formats import cifar, idx, loose
from pipeline.data.formats.choice import FORMATS, format_of
from pipeline.data.formats.common import IMAGE_SUFFIXES, MAX_IMAGE_BYTES, TOO_LARGE, Member
from pipeline.data.listing import ListedFile, list_files, look_up
from pipeline.data.place import BUILTIN, Place
from pipeline.data.runs import runs
from pipeline.errors import DataError

LOOSE_FILES_PER_GROUP = 1024
ITEMS_FORMAT = 3
"""Raised when the formats find something else in the same files."""
SHA256_BYTES = 32
VALUES_AT_ONCE = 2**16

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
class FileGroup:
    """Files of one format that are looked into together: an archive, or many image files."""

    place: Place
    names: Sequence[str]
    """With the next two in columns: a group goes to a task, and has thousands of files."""
    sizes: Sequence[int]
    etags: Sequence[str]
    digest: str
    """Of where they are and how they look in a listing, with those that `index` looks at beside
    them; empty where a listing would not show that one has changed."""

    @property
    def format(self) -> ModuleType:
        module = format_of(self.place, self.names[0])
        assert module is not None  # the others are in no group
        return module


LookInto = Callable[[list[FileGroup], str | None], Iterator[tuple[int, pa.Table]]]
"""Calls `look` of each of the groups with the folder; yields (index, ITEMS) as each is found."""


def list_groups(source: str) -> tuple[Place, list[FileGroup]]:
    """The place of a source, and its files by what reads them together.

    Raises:
        DataError: the source is missing, or no file in it can hold images.
    """
    place, files = list_files(source)
    groups = group_files(place, files)
    if not groups:
        raise DataError(
            f"data.source={source!r} holds no image ({len(files)} files looked at; images "
            f"end in {', '.join(IMAGE_SUFFIXES)}, archives and arrays in "
            f"{', '.join(suffix for suffixes, _ in FORMATS for suffix in suffixes)})"
        )
    return place, groups


def group_files(place: Place, files: list[ListedFile]) -> list[FileGroup]:
    """The files that some format reads: first each archive, then the image files in runs."""
    images, groups = [], []
    for file in files:
        module = format_of(place, file.name)
        if module is loose:
            images.append(file)
        elif module in (idx, cifar):  # their labels, or the names of classes, lie beside them
            beside = look_up(place, module.beside(file.name))
            groups.append(_group(place, module, [file], beside))
        elif module is not None:
            groups.append(_group(place, module, [file], []))
    for run in runs([file.name for file in images], LOOSE_FILES_PER_GROUP):
        groups.append(_group(place, loose, images[run.start : run.stop], []))
    return groups


def _group(
    place: Place, module: ModuleType, files: list[ListedFile], beside: list[ListedFile]
) -> FileGroup:
    marks = [(file.name, file.size, file.mark) for file in (*files, *beside)]
    digest = storage.digest([ITEMS_FORMAT, module.__name__, place.uri, marks])
    return FileGroup(
        place,
        [file.name for file in files],
        [file.size for file in files],
        [file.etag for file in files],
        digest if all(mark for _, _, mark in marks) else "",
    )


def recall(group: FileGroup, folder: str) -> pa.Table | None:
    """What an earlier `look` kept in `folder`, None if it did not, or if the file is damaged."""
    if not group.digest:
        return None
    try:
        kept = storage.read_bytes(_uri(group, folder))
    except FileNotFoundError:
        return None
    # of the whole file: Parquet's own checksums leave out its footer and the headers of its pages
    found, data = kept[:SHA256_BYTES], memoryview(kept)[SHA256_BYTES:]
    if hashlib.sha256(data).digest() != found:
        return None
    return pq.read_table(pa.BufferReader(data))


def _keep(items: pa.Table, group: FileGroup, folder: str) -> None:
    """A sha256, and Parquet of which it is."""
    sink = io.BytesIO()
    pq.write_table(items, sink, compression="zstd")
    data = sink.getvalue()
    storage.write_bytes(_uri(group, folder), hashlib.sha256(data).digest() + data)


def _uri(group: FileGroup, folder: str) -> str:
    return storage.join(folder, f"{group.digest}.items")


def look(group: FileGroup, keep_in: str | None = None, hashed: bool = True) -> pa.Table:
    """ITEMS of the group's files.

    Args:
        keep_in: URI of the folder in which `recall` will find them.
        hashed: with a hash of each image; without, image files and archives of them are not read,
            and what is wrong within an image is not found.

    Raises:
        DataError: a file is damaged or cannot be read.
    """
    module = group.format
    rows: list[tuple[str, str, Member]] = []
    for name, size, etag in zip(group.names, group.sizes, group.etags, strict=True):
        if module is loose and size > MAX_IMAGE_BYTES:
            rows.append((name, name, Member("", None, "", bad=TOO_LARGE)))
            continue
        if module is loose and etag and hashed:  # the store has hashed it already
            rows.append((name, name, Member("", None, f"etag:{etag}")))
            continue
        try:
            for member in module.index(group.place, name, hashed):
                rows.append((_key(module, name, member), name, member))
        except DataError:
            raise
        except Exception as error:  # whatever the package of that scheme raises
            raise group.place.error(
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
    if keep_in is not None and group.digest:
        _keep(items, group, keep_in)
    return items


def _key(module: ModuleType, file: str, member: Member) -> str:
    stem = idx.stem(file) if module is idx else file
    return f"{stem}/{member.name}" if member.name else stem


def _folder(name: str) -> str | None:
    """The class of an image file: the first folder of its path."""
    return name.split("/", 1)[0] if "/" in name else None


def look_on_threads(groups: list[FileGroup], keep_in: str | None) -> Iterator[tuple[int, pa.Table]]:
    """LookInto, in this process."""
    with ThreadPoolExecutor(max_workers=8) as pool:
        yield from enumerate(pool.map(look, groups, itertools.repeat(keep_in)))


def find_items(
    groups: list[FileGroup],
    index_folder: str | None,
    remember: bool,
    progress: Callable[[int, int], None],
    look_into: LookInto,
) -> pa.Table:
    """ITEMS of all groups, in their order.

    Args:
        index_folder: URI of the folder with what earlier calls found, as far as it still holds.
        remember: add to that folder.
        progress: called with the number of files looked into, and of all.
        look_into: how to look into what is not known, where there is more than one group.

    Raises:
        DataError: a file is damaged or cannot be read.
    """
    if groups[0].place.uri == BUILTIN:  # another version of its package may have other images
        index_folder = None
    tables: dict[int, pa.Table] = {}
    num_files, done = sum(len(group.names) for group in groups), 0

    def found(i: int, table: pa.Table) -> None:
        nonlocal done
        tables[i] = table
        done += len(groups[i].names)
        progress(done, num_files)

    progress(0, num_files)
    if index_folder is not None:
        recalled = functools.partial(recall, folder=index_folder)
        with ThreadPoolExecutor(max_workers=8) as pool:
            for i, table in enumerate(pool.map(recalled, groups)):
                if table is not None:
                    found(i, table)
    unknown = [i for i in range(len(groups)) if i not in tables]
    if len(unknown) == 1:  # there is nothing to share out
        look_into = look_on_threads
    keep_in = index_folder if remember else None
    if unknown:
        for j, table in look_into([groups[i] for i in unknown], keep_in):
            found(unknown[j], table)
    # a slice of many chunks, of which there are as many as shards, is found by counting them
    return pa.concat_tables(tables.pop(i) for i in range(len(groups))).combine_chunks()


def values_of(column: pa.ChunkedArray) -> Iterator[Any]:
    """The values of a column as Python has them, which takes ten times the memory: few at once."""
    for chunk in column.chunks:
        for start in range(0, len(chunk), VALUES_AT_ONCE):
            yield from chunk.slice(start, VALUES_AT_ONCE).to_pylist()
