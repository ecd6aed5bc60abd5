"""Zip archives: a tree of class folders, or labels in a `dataset.json` as StyleGAN and EDM write.

`dataset.json` is {"labels": [["path.png", 3], ...]}, {"labels": {"path.png": 3, ...}} or
{"labels": null}; where there is one, folders are not classes.
"""

import contextlib
import json
import stat
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import IO, Any

from pipeline.data.formats.common import Member, folder_of, is_image, label_of, read_up_to, refusal
from pipeline.data.place import Place
from pipeline.storage import sha256

LABELS = "dataset.json"
MAX_LABELS_BYTES = 2**30
DAMAGE = (zipfile.BadZipFile, RuntimeError, ValueError, EOFError, zlib.error, struct.error)
"""What zipfile raises on what is damaged, encrypted, or compressed by a method unknown to it."""


def index(place: Place, name: str, hashed: bool = True) -> Iterator[Member]:
    with opened(place, name) as (file, archive):
        labels = _labels(place, name, archive)
        seen: set[str] = set()
        for info in archive.infolist():
            path = PurePosixPath(info.filename)
            if not is_image(path) or info.is_dir() or stat.S_ISLNK(info.external_attr >> 16):
                continue
            if bad := refusal(path, max(info.file_size, info.compress_size), seen):
                yield Member(str(path), None, "", bad=bad)
                continue
            label = folder_of(path) if labels is None else labels.get(str(path))
            try:
                yield Member(str(path), label, *_digest_and_where(file, archive, info, hashed))
            except DAMAGE as error:
                yield Member(str(path), label, "", bad=f"it cannot be read ({error})")


def read(place: Place, name: str, wheres: list[tuple[int, ...]]) -> Iterator[bytes]:
    """The entries straight from their places; the table of contents is not read again."""
    with place.explained(name), place.open(name) as file:
        for offset, packed, method, size in wheres:
            file.seek(offset)
            data = read_up_to(file, packed)
            if method == zipfile.ZIP_DEFLATED:
                data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
            if len(data) != size:
                raise place.changed(name)
            yield data


@contextlib.contextmanager
def opened(place: Place, name: str) -> Iterator[tuple[IO[bytes], zipfile.ZipFile]]:
    """The file, and its table of contents.

    Raises:
        DataError: it is missing, or no zip archive.
    """
    with place.explained(name), place.open(name) as file:
        try:
            archive = _archive(file)
            offsets = [info.header_offset for info in archive.infolist()]
            if offsets and not 0 <= min(offsets) <= max(offsets) < archive.start_dir:
                raise zipfile.BadZipFile("an entry lies outside the archive")
        except DAMAGE as error:
            raise place.error(name, f"is not a sound zip archive ({error})") from error
        with archive:
            yield file, archive


def _archive(file: IO[bytes]) -> zipfile.ZipFile:
    try:  # what macOS and Info-ZIP write, though the names do not say that they are UTF-8
        return zipfile.ZipFile(file, metadata_encoding="utf-8")
    except UnicodeDecodeError:
        return zipfile.ZipFile(file)


def _digest_and_where(
    file: IO[bytes], archive: zipfile.ZipFile, info: zipfile.ZipInfo, hashed: bool
) -> tuple[str, tuple[int, ...]]:
    """The hash of an entry, and (offset of its content, bytes there, method, its own bytes).

    Raises:
        DAMAGE: it cannot be read, or is not what the archive announces.
    """
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"compressed by method {info.compress_type}; stored and deflated are read")
    with archive.open(info) as entry:
        # zipfile has read the entry's header, and `file` stands behind it
        where = (file.tell(), info.compress_size, info.compress_type, info.file_size)
        if not hashed:
            return "", where
        content = read_up_to(entry, info.file_size)  # its read() alone would inflate any bomb
    if len(content) < info.file_size:
        raise ValueError(f"it inflates to less than the {info.file_size} bytes that are announced")
    return sha256(content), where


def _labels(
    place: Place, name: str, archive: zipfile.ZipFile
) -> dict[str, int | str | None] | None:
    """Path -> label of `dataset.json`, None if there is none."""
    if LABELS not in archive.namelist():
        return None
    try:
        with archive.open(LABELS) as file:
            found: Any = json.loads(read_up_to(file, MAX_LABELS_BYTES))
        pairs = dict(found["labels"] or {})
    except (*DAMAGE, TypeError, KeyError) as error:
        raise place.error(
            name,
            f"holds a {LABELS} that is not as StyleGAN and EDM write it, "
            f'{{"labels": [["path.png", 3], ...]}} ({error})',
        ) from error
    for path, label in pairs.items():
        if not isinstance(label, int | str):
            raise place.error(
                name,
                f"holds a {LABELS} with the label {label!r} for {path!r}: a label is a number or "
                "the name of a class",
            )
    return {path: label_of(label) for path, label in pairs.items()}
