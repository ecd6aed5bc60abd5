"""A lock that one process at a time holds, on this machine or, in a bucket, on any."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from pipeline.storage import lease
from pipeline.storage.files import local_path
from pipeline.storage.filesystem import open_fs
from pipeline.storage.refusals import REMEDY, explained

POLL_SECONDS = 0.2


@contextlib.contextmanager
def exclusive(
    lock: str,
    waiting: Callable[[str], None] = lambda holder: None,
    remedy: str = REMEDY,
) -> Iterator[None]:
    """Hold a lock file for this process; a second process waits until the first is gone.

    The kernel releases the lock when its holder dies, however it dies; in a bucket it is a lease,
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
    if path is not None:
        with _locked(path, lock, waiting, remedy):
            yield
        return
    fs, place = open_fs(lock)
    with contextlib.ExitStack() as stack:
        if "s3" in fs.protocol:
            with explained("write to", lock, remedy):
                stack.enter_context(lease.held(fs, place, waiting))
        yield


@contextlib.contextmanager
def _locked(path: Path, lock: str, waiting: Callable[[str], None], remedy: str) -> Iterator[None]:
    import fcntl  # not on Windows, where Ray clusters are not supported either

    with explained("write to", lock, remedy):
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
                time.sleep(POLL_SECONDS)
        file.truncate(0)
        file.write(str(os.getpid()))
        file.flush()
        yield
    finally:
        file.close()
