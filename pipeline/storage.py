"""Files at any fsspec URI, written so that each is either absent or whole.

An output of a stage is a folder `<storage>/<stage>/<id>/` whose `manifest.json` is written last: it
names every file with its size and sha256, and its existence means that the output is complete.

Locally a file is written beside its place and renamed; object stores make a put visible at once.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from pydantic import BaseModel

from pipeline import bucket_errors, lease
from pipeline.errors import StorageError

MANIFEST = "manifest.json"
CHUNK = 2**22
"""Bytes of a file that are held at once where only its hash is wanted."""
REMEDY = "choose another place with --set storage=URI"
"""What to do about a place below `storage:`; a caller with another place says what helps there."""


class FileEntry(BaseModel):
    """One file of a stage's output, its path relative to the output's folder."""

    path: str
    bytes: int
    sha256: str


class Manifest(BaseModel):
    """What a stage made, from what; `manifest.json` of its output."""

    format: int
    stage: str
    id: str
    inputs: dict[str, str]
    """The ids of the outputs of other stages that went in, by stage."""
    config: dict[str, Any]
    """The sections of the configuration that the stage reads."""
    files: list[FileEntry]
    stats: dict[str, Any] = {}
    versions: dict[str, str] = {}
    created_at: str = ""


def sha256(data: bytes | memoryview) -> str:
    return hashlib.sha256(data).hexdigest()


def digest(value: Any) -> str:
    """A short stable name for a JSON-able value: 16 hex digits of its sha256."""
    return sha256(canonical_json(value).encode())[:16]


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces, the same for equal values; NaN is refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)


def absolute(uri: str) -> str:
    """The URI with a local path made absolute, since Ray's workers run in folders of their own."""
    fs, path = _open_fs(uri)
    return str(path) if isinstance(fs, LocalFileSystem) else uri.rstrip("/")


def join(uri: str, *parts: str) -> str:
    return "/".join([uri.rstrip("/"), *parts])


def exists(uri: str) -> bool:
    fs, path = _open_fs(uri)
    with _explained("read", uri):
        return bool(fs.exists(path))


def list_names(uri: str) -> list[str]:
    """The names in a folder, sorted; empty if there is no such folder."""
    fs, path = _open_fs(uri)
    with _explained("list", uri):
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
    fs, path = _open_fs(uri)
    with _explained("read", uri, remedy):
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
    fs, place = _open_fs(uri)
    # a remote file is fetched as it is asked for; else 50 MB at once, and more ahead
    how = {} if isinstance(fs, LocalFileSystem) else {"cache_type": "none"}
    found, size = hashlib.sha256(), 0
    with _explained("read", uri), fs.open(place, "rb", **how) as file:
        while chunk := file.read(CHUNK):
            found.update(chunk)
            size += len(chunk)
    return FileEntry(path=path, bytes=size, sha256=found.hexdigest())


def write_bytes(uri: str, data: bytes | memoryview) -> FileEntry:
    """Write a file in one atomic step; the entry's path is the file's name."""
    with _explained("write to", uri):
        _put(uri, data)
    return FileEntry(path=uri.rsplit("/", 1)[-1], bytes=len(data), sha256=sha256(data))


def _put(uri: str, data: bytes | memoryview) -> None:
    fs, path = _open_fs(uri)
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
        with _explained("list", folder):
            for left in path.rglob(".*.tmp"):
                left.unlink(missing_ok=True)


def copy(source: str, target: str) -> None:
    """Copy a file within a storage in one atomic step; locally it is one file with two names.

    Raises:
        FileNotFoundError: there is none at `source`.
        StorageError: it cannot be copied.
    """
    fs, path = _open_fs(source)
    with _explained("read", source):
        if not isinstance(fs, LocalFileSystem):
            fs.cp_file(path, _open_fs(target)[1])
            return
    place = Path(_open_fs(target)[1])
    temporary = _temporary(place)
    with _explained("write to", target):
        place.parent.mkdir(parents=True, exist_ok=True)
    try:
        with _explained("read", source):
            try:
                os.link(path, temporary)
            except FileNotFoundError:
                raise
            except OSError:  # a file system without links
                shutil.copyfile(path, temporary)
        with _explained("write to", target):
            os.replace(temporary, place)
    finally:
        temporary.unlink(missing_ok=True)


def read_json(uri: str) -> Any:
    return json.loads(read_bytes(uri))


def write_json(uri: str, value: Any) -> FileEntry:
    return write_bytes(uri, json.dumps(value, indent=1, sort_keys=True, allow_nan=False).encode())


def remove(uri: str) -> None:
    """Delete a file, or a folder with all that is in it; nothing happens if there is none."""
    fs, path = _open_fs(uri)
    with _explained("delete", uri), contextlib.suppress(FileNotFoundError):
        fs.rm(path, recursive=True)


def local_path(uri: str) -> Path | None:
    """The path behind a URI of the local file system, None for any other."""
    fs, path = _open_fs(uri)
    return Path(path) if isinstance(fs, LocalFileSystem) else None


def check_writable(uri: str, remedy: str = REMEDY) -> None:
    """Raise StorageError, before any work is done, unless files can be written below `uri`."""
    probe = join(uri, f".probe-{uuid.uuid4().hex[:8]}")
    with _explained("write to", uri, remedy):
        _put(probe, b"")
    remove(probe)


def read_manifest(folder: str) -> Manifest | None:
    """The manifest of a stage's output, None if the output is not complete."""
    try:
        return Manifest.model_validate(read_json(join(folder, MANIFEST)))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise StorageError(
            f"{join(folder, MANIFEST)} is not a manifest ({str(error).splitlines()[0]}): "
            "delete that folder and run the same command again"
        ) from error


def commit(folder: str, manifest: Manifest) -> Manifest:
    """Make a stage's output visible: write its manifest, last."""
    manifest = manifest.model_copy(
        update={"created_at": datetime.now(UTC).isoformat(timespec="seconds")}
    )
    write_json(join(folder, MANIFEST), manifest.model_dump())
    return manifest


@contextlib.contextmanager
def exclusive(
    lock: str,
    waiting: Callable[[str], None] = lambda holder: None,
    remedy: str = REMEDY,
) -> Iterator[None]:
    """Hold a lock file for this process; a second process waits until the first is gone.

    The kernel lets go of the lock when its holder dies, however it dies; in a bucket it is a lease,
    see lease.py. Other object stores have no such lock: two runs of the same config at once do
    their work twice there, and write the same.

    Args:
        lock: URI of the lock file.
        waiting: called once, with the holder (`process 17`), when there is someone to wait for.
        remedy: what the user can do where the lock file cannot be made; part of a sentence.

    Raises:
        StorageError: the lock file cannot be made.
    """
    path = local_path(lock)
    if path is None:
        fs, place = _open_fs(lock)
        with contextlib.ExitStack() as stack:
            if "s3" in fs.protocol:
                with _explained("write to", lock, remedy):
                    stack.enter_context(lease.held(fs, place, waiting))
            yield
        return
    import fcntl  # not on Windows, where Ray clusters are not supported either

    with _explained("write to", lock, remedy):
        path.parent.mkdir(parents=True, exist_ok=True)
        file = open(path, "a+")  # noqa: SIM115 - closed below, after the caller's work
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            waiting(f"process {file.read().strip()}")
            while True:  # in slices, so that Ctrl-C is heard
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                time.sleep(0.2)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
    finally:
        file.close()


_fs_lock = threading.Lock()


def _open_fs(uri: str) -> tuple[Any, str]:
    try:
        with _fs_lock:  # fsspec's registry imports backends lazily
            # others write here, so what a folder was seen to hold is not remembered
            fs, path = url_to_fs(uri, use_listings_cache=False)
    except Exception as error:  # whatever the package of that scheme raises
        raise StorageError(
            f"storage URI {uri!r} cannot be opened ({error}); known schemes are a local path, "
            "s3:// and those of the fsspec packages that are installed"
        ) from error
    return fs, path


@contextlib.contextmanager
def _explained(verb: str, uri: str, remedy: str = REMEDY) -> Iterator[None]:
    """Turn a file system's error into one sentence; a missing file is the caller's to explain."""
    try:
        yield
    except FileNotFoundError as error:
        _raise_told(error, verb, uri, remedy)
        if verb == "read":
            raise
        raise StorageError(
            f"cannot {verb} {uri}: no such folder, and none can be made; {remedy}"
        ) from error
    except (FileExistsError, NotADirectoryError) as error:
        raise StorageError(
            f"cannot {verb} {uri}: a part of the path is a file, not a folder; {remedy}"
        ) from error
    except OSError as error:
        _raise_told(error, verb, uri, remedy)
        if isinstance(error, PermissionError) or error.errno == errno.EROFS:
            why = "it is read-only" if error.errno == errno.EROFS else "permission denied"
            raise StorageError(
                f"cannot {verb} {uri}: {why}; {remedy}, or check your rights there (for s3:// the "
                "AWS_* variables)"
            ) from error
        if error.errno == errno.ENOSPC:
            raise StorageError(
                f"cannot {verb} {uri}: the disk is full; free some space and run the "
                "same command again, finished work is kept"
            ) from error
        raise StorageError(f"cannot {verb} {uri}: {error.strerror or error}") from error
    except StorageError:
        raise
    except Exception as error:  # such as botocore's NoCredentialsError
        _raise_told(error, verb, uri, remedy)
        raise StorageError(f"cannot {verb} {uri}: {error}") from error


def _raise_told(error: Exception, verb: str, uri: str, remedy: str) -> None:
    if sentence := bucket_errors.told(error, uri, remedy):
        raise StorageError(f"cannot {verb} {uri}: {sentence}") from error
