"""Tar archives, also with gzip: a tree of class folders, or samples as WebDataset writes them.

The label of an image is, in this order: the text of the .cls file of its sample; `label`, `cls` or
`class` in the .json file of its sample; the first folder of its path. A sample is the files whose
paths are the same up to the first dot of the name.
"""

import json
import re
import tarfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import PurePosixPath
from types import SimpleNamespace
from typing import IO, Any

from pipeline.data.formats.common import (
    CHUNK,
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

Label = int | str | None

BLOCK = 512
MAX_HEADER_BYTES = 2**16
"""Of the long names and other records that stand before a file."""
MAX_LABEL_BYTES = 2**20
"""A larger .cls or .json is not read: it is something other than a label."""
LABEL_KINDS, LABEL_KEYS = (".cls", ".json"), ("label", "cls", "class")
TRUNCATED = "the archive ends within this file: it is truncated"
DAMAGED = "the archive is damaged here, and what follows is not found"
HOLES = "it is stored with holes (as a sparse file); write the archive without them"
BAD_LABEL = "its label cannot be read: the .cls or .json file beside it is damaged"
DAMAGE = (tarfile.TarError, ValueError, LookupError, ArithmeticError, RecursionError)
"""What tarfile raises on headers that are damaged."""


def index(place: Place, name: str, hashed: bool = True) -> Iterator[Member]:
    """The images, once the archive's end is reached: a label may stand behind its image."""
    images: list[Member] = []
    labels: dict[str, Label] = {}  # by the path of the label's file
    damaged: set[str] = set()
    seen: set[str] = set()
    with place.explained(name), place.open(name, _compression(name)) as file:
        for info in _files(place, name, file):
            if isinstance(info, Member):
                if images and not hashed and info.bad == TRUNCATED:  # within the image before
                    images[-1] = replace(images[-1], bad=TRUNCATED)
                images.append(info)
                break
            path = PurePosixPath(info.name)
            if is_image(path):
                images.append(_image(file, info, path, seen, hashed))
                if images[-1].bad == TRUNCATED:
                    break
            elif _kind(path) in LABEL_KINDS and info.size <= MAX_LABEL_BYTES:
                try:
                    labels[_sample(path) + _kind(path)] = _label(file, info, path)
                except ValueError:
                    damaged.add(_sample(path) + _kind(path))
    for member in images:
        path = PurePosixPath(member.name)
        beside = [_sample(path) + kind for kind in LABEL_KINDS]
        label = next((labels[key] for key in beside if labels.get(key) is not None), None)
        bad = member.bad
        if label is None and not bad:
            label = folder_of(path)
            bad = BAD_LABEL if damaged.intersection(beside) else ""
        yield replace(member, label=label, bad=bad)


def read(place: Place, name: str, wheres: list[tuple[int, ...]]) -> Iterator[bytes]:
    """In a compressed archive, what lies before each image is decompressed and dropped."""
    with place.explained(name), place.open(name, _compression(name)) as file:
        for offset, size in wheres:
            file.seek(offset)
            raw = read_up_to(file, size)
            if len(raw) < size:
                raise place.changed(name)
            yield raw


def _compression(name: str) -> str | None:
    return "gzip" if name.lower().endswith((".gz", ".tgz")) else None


def _image(
    file: IO[bytes], info: tarfile.TarInfo, path: PurePosixPath, seen: set[str], hashed: bool
) -> Member:
    """An image, without its label."""
    twice = str(path) in seen
    seen.add(str(path))
    reasons = {
        LEADS_OUT: leads_out(path),
        TWICE: twice,
        HOLES: info.issparse(),
        TOO_LARGE: info.size > MAX_IMAGE_BYTES,
    }
    bad = next((reason for reason, holds in reasons.items() if holds), "")
    if not hashed and not bad:
        return Member(str(path), None, "", (info.offset_data, info.size))
    raw = None if bad else _content(file, info)
    if raw is None:
        return Member(str(path), None, "", bad=bad or TRUNCATED)
    return Member(str(path), None, sha256(raw), (info.offset_data, info.size))


def _content(file: IO[bytes], info: tarfile.TarInfo) -> bytes | None:
    """The content of a file at whose beginning `file` stands, None if the archive ends in it."""
    try:
        raw = read_up_to(file, info.size)
    except EOFError:  # the compression ends before the archive does
        return None
    return raw if len(raw) == info.size else None


# --- labels -------------------------------------------------------------------------------------


def _sample(path: PurePosixPath) -> str:
    """`a/b` of `a/b.c.d`."""
    return str(path.parent / path.name.partition(".")[0])


def _kind(path: PurePosixPath) -> str:
    """`.c.d` of `a/b.c.d`."""
    return path.name.removeprefix(path.name.partition(".")[0]).lower()


def _label(file: IO[bytes], info: tarfile.TarInfo, path: PurePosixPath) -> Label:
    """None if there is none in the file.

    Raises:
        ValueError: the archive ends within it, or it is no JSON.
    """
    raw = _content(file, info)
    if raw is None:
        raise ValueError(TRUNCATED)
    if _kind(path) == ".cls":
        text = raw.decode("utf-8", "backslashreplace").strip()
        return label_of(int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else text)
    try:
        fields = json.loads(raw)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    found = [fields[key] for key in LABEL_KEYS if key in fields] if type(fields) is dict else []
    return next((label_of(value) for value in found if isinstance(value, int | str)), None)


# --- headers ------------------------------------------------------------------------------------


def _files(place: Place, name: str, file: IO[bytes]) -> Iterator[tarfile.TarInfo | Member]:
    """The regular files, `file` standing at the content of each.

    Where the archive turns out to be truncated or damaged, a last Member says so. (tarfile itself
    takes a damaged header for the end of the archive.)

    Raises:
        DataError: it does not begin like a tar archive.
    """
    last = b""

    def read_header(size: int) -> bytes:
        nonlocal last
        if not 0 <= size <= MAX_HEADER_BYTES:  # tarfile would read whatever a header announces
            raise tarfile.ReadError(f"a header of {size} bytes")
        last = file.read(size)
        return last

    source: Any = SimpleNamespace(read=read_header, seek=file.seek, tell=file.tell)
    try:
        archive = tarfile.TarFile(fileobj=source, encoding="utf-8", errors="backslashreplace")
    except DAMAGE as error:
        raise place.error(name, f"is not a tar archive ({error})") from error

    def header(offset: int) -> tarfile.TarInfo | None:
        """None at the mark of the end."""
        file.seek(offset)
        try:
            info = tarfile.TarInfo.fromtarfile(archive)
        except tarfile.HeaderError:
            if len(last) < BLOCK:
                raise EOFError from None
            if any(last) or file.tell() != offset + BLOCK:
                raise
            while file.read(CHUNK):  # to where gzip compares its checksum
                pass
            return None
        if archive.offset <= offset:  # it would lead back, round and round
            raise tarfile.ReadError("a size below 0")
        return info

    offset = 0
    while True:
        try:
            info = header(offset)
        except EOFError:
            yield Member(f"(byte {offset})", None, "", bad=TRUNCATED)
            return
        except DAMAGE:
            yield Member(f"(byte {offset})", None, "", bad=DAMAGED)
            return
        if info is None:
            return
        offset = archive.offset
        if info.isreg():
            yield info
