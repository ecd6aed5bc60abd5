"""A lock in a bucket: an object that its holder keeps writing anew.

The object is written on a condition only: that there is none (If-None-Match), or that it is still
the one that was seen (If-Match), so of several who want it one gets it. A holder that died stops
writing; who has seen the same object for LEASE_SECONDS by its own clock takes it over, so no two
clocks are compared. A dead process of the same machine is not waited for.

A holder that was stopped for longer than that goes on beside its heir, whose work is then done
twice; see lock.py for why both write the same. Servers that do not know conditions
(MinIO before 2025) lock nothing.
"""

import contextlib
import os
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from pipeline.storage.refusals import code_of

RENEW_SECONDS = 5.0
LEASE_SECONDS = 30.0
POLL_SECONDS = 1.0
FREE = ""
"""Who holds a lock that nobody holds."""


class Seen(NamedTuple):
    """The object at some moment."""

    etag: str
    holder: str
    """`process 17 on HOST`"""
    machine: str
    """Where that process number means something."""
    writing: str
    """No two writings of the object have the same."""


@contextlib.contextmanager
def held(fs: Any, path: str, waiting: Callable[[str], None]) -> Iterator[None]:
    """Hold the lock at `path` of an s3fs file system; waits until whoever holds it is gone.

    Args:
        waiting: called once, with the holder, when there is someone to wait for.

    Raises:
        OSError: the server refuses, or cannot be reached.
    """
    lease = _Lease(fs, path)
    lease.take(waiting)
    over = threading.Event()
    renewing = threading.Thread(target=lease.renew, args=[over], name="lease", daemon=True)
    renewing.start()
    try:
        yield
    finally:
        over.set()
        renewing.join()
        with contextlib.suppress(OSError):  # it runs out by itself
            lease.leave()


class _Lease:
    def __init__(self, fs: Any, path: str) -> None:
        self._fs = fs
        bucket, key, _ = fs.split_path(path)
        self._object = {"Bucket": bucket, "Key": key}
        self._etag: str | None = None
        """Of the object as this process wrote it; None if it does not hold the lock."""

    def take(self, waiting: Callable[[str], None]) -> None:
        seen, since, told = self._look(), time.monotonic(), False
        while True:
            if seen is None:
                self._etag = self._write(_me(), IfNoneMatch="*")
            elif seen.holder == FREE or _is_dead(seen) or time.monotonic() - since >= LEASE_SECONDS:
                self._etag = self._write(_me(), IfMatch=seen.etag)
            if self._etag is not None:
                return
            if seen is not None and not told:
                waiting(seen.holder)
                told = True
            time.sleep(POLL_SECONDS)
            now = self._look()
            if now != seen:
                seen, since = now, time.monotonic()

    def renew(self, over: threading.Event) -> None:
        """Write the object anew, until `over` or until another process has taken it."""
        while not over.wait(RENEW_SECONDS) and self._etag is not None:
            with contextlib.suppress(OSError):  # the server may be back at the next turn
                self._etag = self._write(_me(), IfMatch=self._etag)

    def leave(self) -> None:
        if self._etag is not None:
            self._write(FREE, IfMatch=self._etag)

    def _look(self) -> Seen | None:
        try:
            found = self._fs.call_s3("head_object", **self._object)
        except FileNotFoundError:
            return None
        said = found["Metadata"]
        return Seen(
            found["ETag"],
            said.get("holder", FREE),
            said.get("machine", ""),
            said.get("writing", ""),
        )

    def _write(self, holder: str, **condition: str) -> str | None:
        """The new ETag; None if the condition does not hold."""
        writing = uuid.uuid4().hex
        said = {"holder": holder, "machine": _machine(), "writing": writing}
        try:
            found = self._fs.call_s3(
                "put_object", **self._object, Body=writing.encode(), Metadata=said, **condition
            )
        except OSError as error:
            if code_of(error) not in ("PreconditionFailed", "ConditionalRequestConflict"):
                raise
            # where its answer was lost, a request is sent again, and finds what it did itself
            seen = self._look()
            return seen.etag if seen is not None and seen.writing == writing else None
        return str(found["ETag"])


def _me() -> str:
    return f"process {os.getpid()} on {socket.gethostname()}"


def _machine() -> str:
    """The same for processes that see each other's numbers, on no other machine or container."""
    with contextlib.suppress(OSError):
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    return ""


def _is_dead(seen: Seen) -> bool:
    """Whether the holder was a process of this machine that is no more."""
    if not seen.machine or seen.machine != _machine():
        return False
    number = int(seen.holder.split()[1])
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return True
    except PermissionError:
        pass
    return False
