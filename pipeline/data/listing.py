"""The files of a source: what a path, a glob or an fsspec URI stands for."""

import contextlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from fsspec.implementations.local import LocalFileSystem

from pipeline import storage
from pipeline.data.place import BUILTIN, Place
from pipeline.data.shard_list import SHARDS
from pipeline.errors import DataError
from pipeline.storage import MANIFEST
from pipeline.storage.filesystem import filesystem_of
from pipeline.storage.refusals import explain

MARKS = ("mtime", "LastModified", "Last-Modified", "blob_id")
"""By what name file systems say when a file was written; Hugging Face's, what git calls it."""
LOGIN = "; what is private there needs a token: run hf auth login, or set HF_TOKEN"
"""Without one Hugging Face's Hub says that there is no such repository."""


@dataclass(frozen=True, slots=True)
class ListedFile:
    """A file as a listing shows it, unread."""

    name: str
    """Its path within the source."""
    size: int
    mark: str
    """Something that changes when the file does: its ETag or its time of modification. Empty where
    the file system tells nothing of the kind."""
    etag: str = ""
    """The store's own hash of the content, where it has one."""


def absolute(source: str) -> str:
    """The source with a local path made absolute: Ray's workers run in folders of their own.

    Raises:
        DataError: the package that reads such a URI is not there.
    """
    if source.startswith(BUILTIN):
        return source
    _opened(source)  # storage would take it for a place to write to
    return storage.absolute(source)


def list_files(source: str) -> tuple[Place, list[ListedFile]]:
    """The place of a source and its files in the order of their names, hidden ones left out.

    Args:
        source: a folder, a file, or a glob of either (path or fsspec URI); or `builtin:digits`.

    Raises:
        DataError: it does not exist, matches nothing or cannot be listed.
    """
    if source.startswith(BUILTIN):
        if source != "builtin:digits":
            raise DataError(
                f"data.source={source!r} is not a builtin source; there is builtin:digits"
            )
        return Place(BUILTIN), [ListedFile("digits", 0, "")]
    fs, path = _opened(source)
    schemes = [fs.protocol] if isinstance(fs.protocol, str) else fs.protocol
    is_s3, login = "s3" in schemes, LOGIN if "hf" in schemes else ""
    path = path.rstrip("/")
    try:
        fs.invalidate_cache()  # what an earlier call saw
        pattern = any(letter in path for letter in "*?[") and not fs.exists(path)
        if pattern:
            root = _before_the_pattern(path)
            found = _glob(fs, path)
        elif not fs.exists(path):
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                fs.info(path)  # `exists` is also false where a server is away or refuses
            raise DataError(
                f"data.source={source!r} does not exist: give a folder, an archive, a glob of "
                f"either, or builtin:digits{login}"
            )
        # to s3fs a folder is what it can list, so it lists it: for a second time, below
        elif fs.info(path)["type"] == "directory" if is_s3 else fs.isdir(path):
            root, found = path, _below(fs, path)
        else:
            root, found = path.rpartition("/")[0], {path: fs.info(path)}
        for name in [name for name, info in found.items() if info.get("islink")]:
            with contextlib.suppress(FileNotFoundError):  # the listing says when the link was made
                found[name] = fs.info(name)
    except DataError:
        raise
    except Exception as error:  # whatever the package of that scheme raises
        one_line = " ".join(str(error).split()).rstrip(".")
        reason = explain(error, source) or (
            f"{one_line}; check that it can be reached, and your rights to it{login}"
        )
        raise DataError(f"data.source={source!r} cannot be read: {reason}") from error
    if pattern and not found:
        raise DataError(f"data.source={source!r} matches no file: mend the pattern")
    files = [_listed(name[len(root) + 1 :], info, is_s3) for name, info in found.items()]
    place = Place((root if isinstance(fs, LocalFileSystem) else fs.unstrip_protocol(root)) or "/")
    place.renew()
    files = [file for file in files if not _is_hidden(file.name)]
    return place, sorted(_without_covers(files), key=lambda file: file.name)


def look_up(place: Place, names: Iterable[str]) -> list[ListedFile]:
    """Those of these files of a place that are there, whether or not they are in the source.

    Raises:
        DataError: that cannot be told.
    """
    found = []
    for name in names:
        try:
            found.append(_listed(name, place.info(name), is_s3=False))
        except FileNotFoundError:
            continue
        except Exception as error:  # whatever the package of that scheme raises
            raise place.error(
                name, f"cannot be read: {error}; run the same command again"
            ) from error
    return found


def _opened(source: str) -> tuple[Any, str]:
    try:
        return filesystem_of(source)
    except Exception as error:  # of a scheme that is not known, or whose package is missing
        raise DataError(f"data.source={source!r} cannot be read: {error}") from error


def _before_the_pattern(path: str) -> str:
    """`a/b` of `a/b/c*/d.png`."""
    parts = path.split("/")
    first = next(i for i, part in enumerate(parts) if any(letter in part for letter in "*?["))
    return "/".join(parts[:first])


def _glob(fs: Any, path: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for name, info in fs.glob(path, detail=True).items():
        found |= _below(fs, name) if info["type"] == "directory" else {name: info}
    return found


def _below(fs: Any, folder: str) -> dict[str, dict[str, Any]]:
    """What the file system says of each file in a folder and the folders in it, by its path."""
    if not isinstance(fs, LocalFileSystem):
        found: dict[str, dict[str, Any]] = fs.find(folder, detail=True)
        return found
    # its `find` takes three times as long and follows no link to a folder
    found, waiting = {}, [(folder, frozenset[tuple[int, int]]())]
    while waiting:
        folder, above = waiting.pop()
        status = os.stat(folder)
        this = (status.st_dev, status.st_ino)
        if this in above:  # a link led back to where it lies
            continue
        with os.scandir(folder) as entries:
            for entry in entries:
                if entry.is_dir():
                    waiting.append((entry.path, above | {this}))
                elif entry.is_file() or entry.is_symlink():  # a pipe would be read for ever
                    status = entry.stat(follow_symlinks=entry.is_file())  # it may lead nowhere
                    found[entry.path] = {"size": status.st_size, "mtime": status.st_mtime}
    return found


def _listed(name: str, info: dict[str, Any], is_s3: bool) -> ListedFile:
    etag = str(info.get("ETag") or "").strip('"')
    mark = str(etag or next(filter(None, map(info.get, MARKS)), ""))
    name = name.encode("utf-8", "backslashreplace").decode()  # else it will not be found, by name
    # a web server's is often no hash, but made of the size and the time
    return ListedFile(name, int(info.get("size") or 0), mark, etag if is_s3 else "")


def _without_covers(files: list[ListedFile]) -> list[ListedFile]:
    """Of a ShardSet the parts alone; its contact sheet is no image of it."""
    places = {file.name.rpartition("/")[::2] for file in files}
    sets = {folder for folder, name in places if name == MANIFEST and (folder, SHARDS) in places}
    return [file for file in files if file.name.rpartition("/")[0] not in sets]


def _is_hidden(name: str) -> bool:
    return "/." in f"/{name}"
