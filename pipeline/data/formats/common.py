"""What the formats share: where files lie, and what is said of an image in one."""

import contextlib
import functools
import gzip
import math
import zlib
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import IO, Any

import numpy as np
from fsspec.implementations.local import LocalFileSystem

from pipeline import storage
from pipeline.errors import DataError
from pipeline.storage.filesystem import filesystem_of

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")
MAX_IMAGE_BYTES = 2**30
"""A larger image is not read: its size is more likely damage, or meant to do some."""
CHUNK = 2**22
"""Bytes that are read at once where more may follow."""
UNREADABLE = (FileNotFoundError, PermissionError, IsADirectoryError)
"""Errors of a file system that are about one file; all others are about the way to it."""
FETCHED_AHEAD = 16
"""Files of a remote place that are on their way at once."""


@dataclass(frozen=True)
class Place:
    """A folder at any fsspec URI, from which the files of a source are read by their names."""

    uri: str

    def open(self, name: str, compression: str | None = None) -> IO[bytes]:
        """A file for reading, seekable; `compression="infer"` goes by its suffix, such as .gz."""
        fs, path = self._path(name)
        file: IO[bytes] = fs.open(path, "rb", compression=compression)
        return file

    def read(self, name: str) -> bytes:
        """A whole file."""
        fs, path = self._path(name)
        if isinstance(fs, LocalFileSystem):  # its cat_file takes three times as long
            with open(path, "rb", buffering=0) as file:
                return file.readall()
        data: bytes = fs.cat_file(path)
        return data

    def read_many(self, names: Sequence[str]) -> Iterator[bytes]:
        """Whole files, in that order; those of a remote place are fetched ahead of their turn."""
        if storage.local_path(self.uri) is not None:
            yield from map(self.read, names)
            return
        yield from map(self.read, names[:1])  # else each thread would list its folder, on a Hub
        with ThreadPoolExecutor(max_workers=FETCHED_AHEAD) as pool:
            waiting: deque[Future[bytes]] = deque()
            for name in names[1:]:
                waiting.append(pool.submit(self.read, name))
                if len(waiting) == FETCHED_AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def etag(self, name: str) -> str:
        """The store's own hash of a file, as it is now; empty if it has none."""
        self._path(name)[0].invalidate_cache()
        return str(self.info(name).get("ETag") or "").strip('"')

    def info(self, name: str) -> dict[str, Any]:
        """What the file system says of a file, such as its size.

        Raises:
            FileNotFoundError: there is none.
        """
        fs, path = self._path(name)
        try:
            found: dict[str, Any] = fs.info(path)
        except NotADirectoryError as error:  # a file in place of its folder: it is not there
            raise FileNotFoundError(str(error)) from error
        return found

    def exists(self, name: str) -> bool:
        """Whether there is such a file; fsspec's own says no where a server is away, too."""
        try:
            self.info(name)
        except FileNotFoundError:
            return False
        return True

    def renew(self) -> None:
        """Let all threads of this process read through the file system of the calling one.

        It has listed the place; that of another thread may remember how the files once were.
        """
        _open.cache_clear()
        _open(self.uri)

    def error(self, name: str, problem: str) -> DataError:
        """`problem` of a file as one sentence; it begins with a verb, such as `is truncated`."""
        one_line = " ".join(problem.split())  # it may quote pyarrow's, which have several
        return DataError(f"data.source: {self.uri.rstrip('/')}/{name} {one_line}")

    def changed(self, name: str) -> DataError:
        """For `read`: an image is no longer where `index` saw it."""
        return self.error(name, "changed while it was being read; run the same command again")

    @contextlib.contextmanager
    def explained(self, name: str, *damage: type[Exception]) -> Iterator[None]:
        """Around the reading of a file: what is wrong with the file becomes a DataError.

        Args:
            damage: what the reader raises on a damaged file, besides the errors of gzip. Other
                errors pass: a server that is away is no property of the file.
        """
        damaged: tuple[type[Exception], ...] = (EOFError, zlib.error, gzip.BadGzipFile, *damage)
        try:
            yield
        except UNREADABLE as error:
            raise self.error(name, f"cannot be read ({why_unreadable(error)})") from error
        except damaged as error:
            raise self.error(name, f"is truncated or damaged ({error})") from error

    def _path(self, name: str) -> tuple[Any, str]:
        fs, root = _open(self.uri)
        return fs, f"{root}/{name}"


def why_unreadable(error: OSError) -> str:
    """The reason of an error that is one of UNREADABLE, in the same words on every file system."""
    if isinstance(error, PermissionError):
        return "there is no permission"
    return "it is missing" if isinstance(error, FileNotFoundError) else "it is a folder"


@functools.lru_cache(maxsize=16)  # taking a URI apart costs as much as reading a small file
def _open(uri: str) -> tuple[Any, str]:
    fs, root = filesystem_of(uri)
    return fs, root.rstrip("/")


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

LEADS_OUT = "its name leads out of the archive"
TWICE = "the archive holds this name twice"
TOO_LARGE = f"it has more than {MAX_IMAGE_BYTES:,} bytes"


def is_image(path: PurePosixPath) -> bool:
    """By its suffix; hidden files, such as ._x.png, are not."""
    hidden = any(part.startswith(".") and part != ".." for part in path.parts)
    return path.suffix.lower() in IMAGE_SUFFIXES and not hidden


def leads_out(path: PurePosixPath) -> bool:
    return path.is_absolute() or ".." in path.parts


def folder_of(path: PurePosixPath) -> str | None:
    """The first folder of a path, which is its class in a tree of class folders."""
    return path.parts[0] if len(path.parts) > 1 else None


# --- arrays: images that have a number ----------------------------------------------------------


def rows(place: Place, name: str, file: IO[bytes], shape: tuple[int, ...]) -> Iterator[bytes]:
    """The rows, along the first axis, of a uint8 array that lies in `file` from here to its end.

    Raises:
        DataError: there is nothing in it, or the file has more or less than `shape` announces.
    """
    total, size = math.prod(shape), math.prod(shape[1:])
    announced = f"{total} ({' x '.join(map(str, shape))})"
    if not total:
        raise place.error(name, f"holds no image: it has the shape {shape}")
    if size > MAX_IMAGE_BYTES:
        raise place.error(
            name, f"announces {announced} bytes, and an image has {MAX_IMAGE_BYTES:,} at most"
        )

    def other(found: int) -> DataError:
        return place.error(
            name,
            f"holds {found} bytes after its header, which announces {announced}: it is truncated "
            "or damaged",
        )

    for i in range(shape[0]):
        row = read_up_to(file, size)
        if len(row) < size:
            raise other(i * size + len(row))
        yield row
    if excess := sum(len(chunk) for chunk in iter(lambda: file.read(CHUNK), b"")):
        raise other(total + excess)


def pixels_at(place: Place, name: str, file: IO[bytes], where: tuple[int, ...]) -> np.ndarray:
    """The (H, W, C) uint8 pixels at `where` = (offset, H, W, C) of an open file.

    Raises:
        DataError: the file ends before them.
    """
    offset, *shape = where
    file.seek(offset)
    raw = read_up_to(file, math.prod(shape))
    if len(raw) < math.prod(shape):
        raise place.changed(name)
    return np.frombuffer(raw, np.uint8).reshape(shape)
