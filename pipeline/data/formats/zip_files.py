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

from pipeline.data.formats.common import (
    LEADS_OUT,
    MAX_IMAGE_BYTES,
    TOO_LARGE,
    TWICE,
    Member,
    folder_of,
    is_image,
    label_of,
    leads_out,
    read_up_to,
)
from pipeline.data.place import Place
from pipeline.storage import sha256

LABELS = "dataset.json"
LOCAL_HEADER = struct.Struct("<4s22xHH")
"""The signature and the lengths of the name and of what follows it, before an entry's content."""
DAMAGE = (zipfile.BadZipFile, NotImplementedError, ValueError, struct.error)
"""What zipfile raises on an archive that is damaged, or says that it is of a later version."""


def index(place: Place, name: str, hashed: bool = True) -> Iterator[Member]:
    with opened(place, name) as (file, archive):
        labels = _labels(place, name, file, archive)
        seen: set[str] = set()
        for info in archive.infolist():
            path = PurePosixPath(info.filename)
            if not is_image(path) or info.is_dir() or stat.S_ISLNK(info.external_attr >> 16):
                continue
            label = folder_of(path) if labels is None else labels.get(str(path))
            if leads_out(path) or str(path) in seen:
                yield Member(str(path), None, "", bad=LEADS_OUT if leads_out(path) else TWICE)
                continue
            seen.add(str(path))
            try:
                where = _where(file, info)
                digest = sha256(_content(file, where, info.CRC)) if hashed else ""
            except ValueError as reason:
                yield Member(str(path), label, "", bad=str(reason))
            else:
                yield Member(str(path), label, digest, where)


def read(place: Place, name: str, wheres: list[tuple[int, ...]]) -> Iterator[bytes]:
    """The entries straight from their places; the table of contents is not read again."""
    with place.explained(name), place.open(name) as file:
        for where in wheres:
            try:
                yield _content(file, where)
            except ValueError as error:
                raise place.changed(name) from error


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


def refusal(info: zipfile.ZipInfo) -> str:
    """Why an entry cannot be read at all; empty if it can be."""
    if info.flag_bits & 1:
        return "it is encrypted"
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        return f"it is compressed by method {info.compress_type}; stored and deflated are read"
    return ""


def _where(file: IO[bytes], info: zipfile.ZipInfo) -> tuple[int, ...]:
    """(offset of the content, its size in the archive, method of compression, its own size).

    Raises:
        ValueError: it cannot be read, with the reason.
    """
    if reason := refusal(info):
        raise ValueError(reason)
    if max(info.file_size, info.compress_size) > MAX_IMAGE_BYTES:
        raise ValueError(TOO_LARGE)
    file.seek(info.header_offset)
    header = file.read(LOCAL_HEADER.size)
    if len(header) < LOCAL_HEADER.size or not header.startswith(b"PK\3\4"):
        raise ValueError("its header within the archive is damaged")
    _, name_size, extra_size = LOCAL_HEADER.unpack(header)
    offset = info.header_offset + LOCAL_HEADER.size + name_size + extra_size
    return offset, info.compress_size, info.compress_type, info.file_size


def _content(file: IO[bytes], where: tuple[int, ...], crc: int | None = None) -> bytes:
    """An entry's content, never more than its announced size is inflated.

    Raises:
        ValueError: it is damaged, with the reason.
    """
    offset, packed, method, size = where
    file.seek(offset)
    data = read_up_to(file, packed)
    if len(data) < packed:
        raise ValueError("the archive ends within this file: it is truncated")
    if method == zipfile.ZIP_DEFLATED:
        try:
            data = zlib.decompressobj(-zlib.MAX_WBITS).decompress(data, size + 1)
        except zlib.error as error:
            raise ValueError(f"it cannot be inflated: {error}") from error
    if len(data) != size:
        more = "more" if len(data) > size else "less"
        raise ValueError(f"it inflates to {more} than the {size} bytes that the archive announces")
    if crc is not None and zlib.crc32(data) != crc:
        raise ValueError("its content does not have the CRC that the archive announces")
    return data


def _labels(
    place: Place, name: str, file: IO[bytes], archive: zipfile.ZipFile
) -> dict[str, int | str | None] | None:
    """Path -> label of `dataset.json`, None if there is none."""
    if LABELS not in archive.namelist():
        return None
    info = archive.getinfo(LABELS)
    try:
        found: Any = json.loads(_content(file, _where(file, info), info.CRC))
        pairs = dict(found["labels"] or {})
    except (ValueError, TypeError, KeyError, RecursionError) as error:
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
