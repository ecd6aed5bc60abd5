"""The one place where fsspec opens a URI."""

import threading
from typing import Any

from fsspec.core import url_to_fs

from pipeline.errors import StorageError

_lock = threading.Lock()


def filesystem_of(uri: str, remembers: bool = True) -> tuple[Any, str]:
    """The file system of a URI, and the path in it.

    Args:
        remembers: it may answer from a listing that it made before.

    Raises:
        Exception: whatever the package of that scheme raises; of one that is not known, ValueError;
            of one whose package is not installed, ImportError.
    """
    options = {} if remembers else {"use_listings_cache": False}
    with _lock:  # fsspec's registry imports backends lazily
        fs, path = url_to_fs(uri, **options)
    return fs, path


def open_fs(uri: str) -> tuple[Any, str]:
    """`filesystem_of` a place that others write to as well, so listings are made anew.

    Raises:
        StorageError: there is no such file system.
    """
    try:
        return filesystem_of(uri, remembers=False)
    except Exception as error:  # whatever the package of that scheme raises
        raise StorageError(
            f"storage URI {uri!r} cannot be opened ({error}); known schemes are a local path, "
            "s3:// and those of the fsspec packages that are installed"
        ) from error
