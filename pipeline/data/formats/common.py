"""What the formats share: what is said of an image in a file, and how images are read from one."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO

import numpy as np

from pipeline.data.place import Place

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MAX_IMAGE_BYTES = 2**30
"""A larger image is not read: its size is more likely damage, or meant to do some."""
CHUNK = 2**22
"""Bytes that are read at once where more may follow."""


@dataclass(frozen=True, slots=True)
class Member:
    """One image in a file of a source, not yet decoded."""

    name: str
    """Within the file; empty where the file is the image itself."""
    label: int | str | None
    """A number, or the name of a class."""
    digest: str
    """A hash of its content; empty where it cannot be read."""
    where: tuple[int, ...] = ()
    """Where `read` of the same format finds it, such as (offset, size)."""
    bad: str = ""
    """Why it cannot be used, if that is known already."""


def read_up_to(file: IO[bytes], size: int) -> bytes:
    """The next `size` bytes, or fewer if the file ends; no memory is taken for what is not there.

    (`file.read(size)` takes it at once, and the size may come from a damaged header.)
    """
    chunks = []
    while size > 0 and (chunk := file.read(min(size, CHUNK))):
        chunks.append(chunk)
        size -= len(chunk)
    return b"".join(chunks)


def label_of(value: int | str) -> int | str | None:
    """A label as Parquet can hold it: a number of 64 bits, or a name in UTF-8; None if empty."""
    if isinstance(value, int):
        return max(-(2**63), min(int(value), 2**63 - 1))
    return value.encode("utf-8", "backslashreplace").decode() or None


# --- archives: images that have a path ----------------------------------------------------------

TOO_LARGE = f"it has more than {MAX_IMAGE_BYTES:,} bytes"


def is_image(path: PurePosixPath) -> bool:
    """By its suffix; hidden files, such as ._x.png, are not."""
    hidden = any(part.startswith(".") and part != ".." for part in path.parts)
    return path.suffix.lower() in IMAGE_SUFFIXES and not hidden


def refusal(path: PurePosixPath, size: int, seen: set[str]) -> str:
    """Why an image of an archive is not read, empty if it is; its path is added to those seen."""
    twice = str(path) in seen
    seen.add(str(path))
    if path.is_absolute() or ".." in path.parts:
        return "its name leads out of the archive"
    if twice:
        return "the archive holds this name twice"
    return TOO_LARGE if size > MAX_IMAGE_BYTES else ""


def folder_of(path: PurePosixPath) -> str | None:
    """The first folder of a path, which is its class in a tree of class folders."""
    return path.parts[0] if len(path.parts) > 1 else None


# --- arrays: images that have a number ----------------------------------------------------------


def rows(place: Place, name: str, file: IO[bytes], shape: tuple[int, ...]) -> Iterator[bytes]:
    """The rows, along the first axis, of a uint8 array that lies in `file` from here to its end.

    Raises:
        DataError: there is nothing in it, or the file has more or less than `shape` announces.
    """
    size = math.prod(shape[1:])
    announced = f"its header announces {' x '.join(map(str, shape))}"
    if not math.prod(shape):
        raise place.error(name, f"holds no image: {announced}")
    if size > MAX_IMAGE_BYTES:
        raise place.error(name, f"has images of {size} bytes, more than {MAX_IMAGE_BYTES:,}")
    for i in range(shape[0]):
        row = read_up_to(file, size)
        if len(row) < size:
            raise place.error(name, f"is truncated: it ends in row {i}, and {announced}")
        yield row
    if file.read(1):
        raise place.error(name, f"is damaged: it goes on behind its end, {announced}")


def read_pixels(
    place: Place, name: str, file: IO[bytes], wheres: Iterable[tuple[int, ...]]
) -> Iterator[np.ndarray]:
    """The (H, W, C) uint8 pixels at each `where` = (offset, H, W, C) of an open file.

    Raises:
        DataError: the file ends before them.
    """
    for offset, *shape in wheres:
        file.seek(offset)
        raw = read_up_to(file, math.prod(shape))
        if len(raw) < math.prod(shape):
            raise place.changed(name)
        yield np.frombuffer(raw, np.uint8).reshape(shape)
