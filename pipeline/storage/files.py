"""Reading and writing files; each is either absent or whole.

Locally a file is written beside its place and renamed; object stores make a put visible at once.
"""

import contextlib
import hashlib
import json
import os
import shutil
import uuid
from pathlib import Path
from typing import Any

from fsspec.implementations.local import LocalFileSystem
from pydantic import BaseModel

from pipeline.storage.filesystem import open_fs
from pipeline.storage.hashes import sha256
from pipeline.storage.refusals import REMEDY, explained

CHUNK = 2**22
"""Bytes of a file that are held at once where only its hash is wanted."""


class FileEntry(BaseModel):
    """One file of a stage's output, its path relative to the output's folder."""

    path: str
    bytes: int
    sha256: str


def absolute(uri: str) -> str:
    """The URI with a local path made absolute, since Ray's workers run in folders of their own."""
    fs, path = open_fs(uri)
    return str(path) if isinstance(fs, LocalFileSystem) else uri.rstrip("/")


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *parts])


def exists(uri: str) -> bool:
    fs, path = open_fs(uri)
    with explained("read", uri):
        return bool(fs.exists(path))


def list_names(uri: str) -> list[str]:
    """The names in a folder, sorted; empty if there is no such folder."""
    fs, path = open_fs(uri)
    with explained("list", uri):
        try:
            entries = fs.ls(path, detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
    paths = {entry.rstrip("/") for entry in entries}
    paths.discard(path.rstrip("/"))  # the empty object that some clients make for a folder
    return sorted(entry.rsplit("/", 1)[-1] for entry in paths)


def read_bytes(uri: str, remedy: str = REMEDY) -> bytes:
    """The content of a file.

    Args:
        remedy: what the user can do where there is no permission; part of a sentence.

    Raises:
        FileNotFoundError: there is none; callers know what that means and say it.
        StorageError: it cannot be read.
    """
    fs, path = open_fs(uri)
    with explained("read", uri, remedy):
        try:
            data: bytes = fs.cat_file(path)
        except NotADirectoryError as error:  # a file in place of its folder: it is not there
            raise FileNotFoundError(str(error)) from error
        return data


def entry_of(folder: str, path: str) -> FileEntry:
    """A file that lies in an output's folder, as it is now; a few MiB are held at a time.

    Raises:
        FileNotFoundError: there is none.
        StorageError: it cannot be read.
    """
    uri = join(folder, path)
    fs, place = open_fs(uri)
    # a remote file is fetched as it is asked for; else 50 MB at once, and more ahead
    how = {} if isinstance(fs, LocalFileSystem) else {"cache_type": "none"}
    found, size = hashlib.sha256(), 0
    with explained("read", uri), fs.open(place, "rb", **how) as file:
        while chunk := file.read(CHUNK):
            found.update(chunk)
            size += len(chunk)
    return FileEntry(path=path, bytes=size, sha256=found.hexdigest())


def write_bytes(uri: str, data: bytes | memoryview) -> FileEntry:
    """Write a file in one atomic step; the entry's path is the file's name."""
    with explained("write to", uri):
        _put(uri, data)
    return FileEntry(path=uri.rsplit("/", 1)[-1], bytes=len(data), sha256=sha256(data))


def _put(uri: str, data: bytes | memoryview) -> None:
    fs, path = open_fs(uri)
    if isinstance(fs, LocalFileSystem):
        _write_local(Path(path), data)
    else:
        fs.pipe_file(path, bytes(data))


def _write_local(path: Path, data: bytes | memoryview) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def _temporary(path: Path) -> Path:
    """Where a local file is written before it is renamed to `path`."""
    return path.with_name(f".{path.name}.{uuid.uuid4().hex[:8]}.tmp")


def sweep(folder: str) -> None:
    """Remove the files that killed writers left half written below a local folder.

    Only for those who alone write there, such as the holder of its lock.
    """
    path = local_path(folder)
    if path is not None:
        with explained("list", folder):
            for left in path.rglob(".*.tmp"):
                left.unlink(missing_ok=True)


def copy(source: str, target: str) -> None:
    """Copy a file within a storage in one atomic step; locally it is one file with two names.

    Raises:
        FileNotFoundError: there is none at `source`.
        StorageError: it cannot be copied.
    """
    fs, path = open_fs(source)
    with explained("read", source):
        if not isinstance(fs, LocalFileSystem):
            fs.cp_file(path, open_fs(target)[1])
            return
    place = Path(open_fs(target)[1])
    temporary = _temporary(place)
    with explained("write to", target):
        place.parent.mkdir(parents=True, exist_ok=True)
    try:
        with explained("read", source):
            try:
                os.link(path, temporary)
            except FileNotFoundError:
                raise
            except OSError:  # a file system without links
                shutil.copyfile(path, temporary)
        with explained("write to", target):
            os.replace(temporary, place)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(uri: str) -> Any:
    return json.loads(read_bytes(uri))


def write_json(uri: str, value: Any) -> FileEntry:
    return write_bytes(uri, json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode())


def remove(uri: str) -> None:
    """Delete a file, or a folder with all that is in it; nothing happens if there is none."""
    fs, path = open_fs(uri)
    with explained("delete", uri), contextlib.suppress(FileNotFoundError):
        fs.rm(path, recursive=True)


def local_path(uri: str) -> Path | None:
    """The path behind a URI of the local file system, None for any other."""
    fs, path = open_fs(uri)
    return Path(path) if isinstance(fs, LocalFileSystem) else None


def check_writable(uri: str, remedy: str = REMEDY) -> None:
    """Raise StorageError, before any work is done, unless files can be written below `uri`."""
    probe = join(uri, f".probe-{uuid.uuid4().hex[:8]}")
    with explained("write to", uri, remedy):
        _put(probe, b"")
    remove(probe)
