"""Tar archives, also with gzip: a tree of class folders, or samples as WebDataset writes them.

The label of an image is, in this order: the text of the .cls file of its sample; `label`, `cls` or
`class` in the .json file of its sample; the first folder of its path. A sample is the files whose
paths are the same up to the first dot of the name.
"""

import contextlib
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
    Member,
    folder_of,
    is_image,
    label_of,
    read_up_to,
    refusal,
)
from pipeline.data.place import Place
from pipeline.storage import sha256

Label = int | str | None

MAX_HEADER_BYTES = 2**16
"""Of the long names and other records that stand before a file."""
MAX_LABEL_BYTES = 2**20
"""A larger .cls or .json is not read: it is something other than a label."""
LABEL_KINDS, LABEL_KEYS = (".cls", ".json"), ("label", "cls", "class")
HOLES = "it is stored with holes (as a sparse file); write the archive without them"
BAD_LABEL = "its label cannot be read: the .cls or .json file beside it is damaged"
CUT = "the archive is truncated or damaged here, and what follows is not found"
DAMAGE = (tarfile.TarError, ValueError, LookupError, ArithmeticError, RecursionError)
"""What tarfile raises on headers that are damaged."""


def index(place: Place, name: str, hashed: bool = True) -> Iterator[Member]:
    """The images, once the archive's end is reached: a label may stand behind its image.

    Of an archive that is truncated or damaged further on, what stands before that is found.
    """
    images: list[Member] = []
    labels: dict[str, Label] = {}  # by the path of the label's file
    damaged: set[str] = set()
    seen: set[str] = set()
    with place.explained(name, *DAMAGE), place.open(name, _compression(name)) as file:
        archive = _opened(file)
        try:
            for info in _files(archive, file):
                path = PurePosixPath(info.name)
                if is_image(path):
                    bad = refusal(path, info.size, seen) or (HOLES if info.issparse() else "")
                    digest = sha256(_content(file, info)) if hashed and not bad else ""
                    where = () if bad else (info.offset_data, info.size)
                    images.append(Member(str(path), None, digest, where, bad))
                elif _kind(path) in LABEL_KINDS and info.size <= MAX_LABEL_BYTES:
                    key = _sample(path) + _kind(path)
                    damaged.add(key)
                    content = _content(file, info)
                    with contextlib.suppress(ValueError, RecursionError):
                        labels[key] = _label(content, _kind(path))
                        damaged.remove(key)
        except (*DAMAGE, EOFError) as error:
            images.append(Member(f"(byte {archive.offset})", None, "", bad=f"{CUT} ({error})"))
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


def _opened(file: IO[bytes]) -> tarfile.TarFile:
    """The archive in a file.

    Raises:
        DAMAGE: it does not begin like one.
    """

    def read_header(size: int) -> bytes:
        if not 0 <= size <= MAX_HEADER_BYTES:  # tarfile would read whatever a header announces
            raise tarfile.ReadError(f"a header of {size} bytes")
        return file.read(size)

    source: Any = SimpleNamespace(read=read_header, seek=file.seek, tell=file.tell)
    return tarfile.TarFile(fileobj=source, encoding="utf-8", errors="backslashreplace")


def _files(archive: tarfile.TarFile, file: IO[bytes]) -> Iterator[tarfile.TarInfo]:
    """The regular files of an archive, `file` standing at the content of each.

    Raises:
        DAMAGE: a header is damaged, or the archive ends before the mark of its end.
    """
    end = 0
    while (info := archive.next()) is not None:
        archive.members.clear()  # type: ignore[attr-defined]  # it would keep them all
        if info.size < 0 or archive.offset <= end:  # which leads back, round and round
            raise tarfile.ReadError("a size below 0")
        end = archive.offset
        if info.isreg():
            file.seek(info.offset_data)
            yield info
    file.seek(archive.offset)
    mark = file.read(tarfile.BLOCKSIZE)
    if any(mark) or len(mark) < tarfile.BLOCKSIZE:  # tarfile takes a damaged header for the end
        raise tarfile.ReadError("no sound header")
    while file.read(CHUNK):  # to where gzip compares its checksum
        pass


def _content(file: IO[bytes], info: tarfile.TarInfo) -> bytes:
    """The content of a file at whose beginning `file` stands.

    Raises:
        ReadError: the archive ends within it.
    """
    content = read_up_to(file, info.size)
    if len(content) < info.size:
        raise tarfile.ReadError(f"it ends within {info.name}")
    return content


# --- labels -------------------------------------------------------------------------------------


def _sample(path: PurePosixPath) -> str:
    """`a/b` of `a/b.c.d`."""
    return str(path.parent / path.name.partition(".")[0])


def _kind(path: PurePosixPath) -> str:
    """`.c.d` of `a/b.c.d`."""
    return path.name.removeprefix(path.name.partition(".")[0]).lower()


def _label(content: bytes, kind: str) -> Label:
    """The label that a .cls or .json file holds, None if it holds none.

    Raises:
        ValueError, RecursionError: it is no JSON.
    """
    if kind == ".cls":
        text = content.decode("utf-8", "backslashreplace").strip()
        return label_of(int(text) if re.fullmatch(r"-?[0-9]{1,18}", text) else text)
    fields = json.loads(content)
    found = [fields[key] for key in LABEL_KEYS if key in fields] if type(fields) is dict else []
    return next((label_of(value) for value in found if isinstance(value, int | str)), None)
