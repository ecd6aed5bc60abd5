"""A lock on a registered model, so that one process at a time reads and changes it.

A sqlite store is held by a file lock beside it, which the kernel releases when its holder dies. A
server has nothing of the kind, only values that are read and written whole. There the lock is one
tag of the registered model, taken by Fischer's protocol (Lamport 1987, A fast mutual exclusion
algorithm, section 2): write your name where there is none, wait until everybody who saw none has
written too, and go on if it is still yours.

On a server this rests on time: a request that takes longer than SETTLE seconds, or a holder that
pauses for longer than LEASE, can let two processes in. Nor does it bind those who do not ask,
such as a person who moves an alias in MLflow's own pages.
"""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator
from typing import TYPE_CHECKING

from pipeline import storage

if TYPE_CHECKING:  # importing mlflow takes seconds
    from mlflow.tracking import MlflowClient

SQLITE = "sqlite:///"
LOCK_TAG = "ddpm.turn"
SETTLE = 2.0
"""Seconds between a look at the tag and the arrival of what is written after it, at most."""
LEASE = 60.0
"""Seconds after which a lock that nobody released is taken for that of a dead process."""
POLL = 0.5


def lock_store(uri: str) -> contextlib.AbstractContextManager[None]:
    """Lock a whole sqlite store; does nothing for a server, which orders requests itself."""
    if not uri.startswith(SQLITE):
        return contextlib.nullcontext()
    return storage.exclusive(
        uri.removeprefix(SQLITE) + ".lock", remedy="set another place with --set tracking.uri=URI"
    )


def lock_model(
    client: MlflowClient, uri: str, name: str
) -> contextlib.AbstractContextManager[None]:
    """Lock a registered model that exists, while its versions and aliases are read and changed.

    Not to be nested, nor around what uses `lock_store` itself, such as `make_client`.
    """
    return lock_store(uri) if uri.startswith(SQLITE) else _lock_by_tag(client, name)


@contextlib.contextmanager
def _lock_by_tag(client: MlflowClient, name: str) -> Iterator[None]:
    def holder() -> str | None:
        tag: str | None = client.get_registered_model(name).tags.get(LOCK_TAG)
        return tag

    mine = uuid.uuid4().hex
    seen, since = holder(), time.monotonic()
    while seen != mine:
        if seen is None or time.monotonic() - since > LEASE:
            client.set_registered_model_tag(name, LOCK_TAG, mine)
            time.sleep(SETTLE)
        else:
            time.sleep(POLL)
        now = holder()
        if now != seen:
            seen, since = now, time.monotonic()
    try:
        yield
    finally:
        if holder() == mine:
            client.delete_registered_model_tag(name, LOCK_TAG)
