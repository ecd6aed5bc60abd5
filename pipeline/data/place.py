"""Where the files of a source lie, and reading them there."""

import contextlib
import functools
import gzip
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import IO, Any

from fsspec.implementations.local import LocalFileSystem

from pipeline import storage
from pipeline.data.prefetch import prefetch
from pipeline.errors import DataError
from pipeline.storage.filesystem import filesystem_of

BUILTIN = "builtin:"
"""What a source that is part of a package begins with."""
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
        yield from prefetch(self.read, names[1:], FETCHED_AHEAD, FETCHED_AHEAD)

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
