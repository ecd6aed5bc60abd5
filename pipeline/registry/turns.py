"""One after the other: what two processes must not do to a registry at once.

A sqlite store is held by a lock file beside it, which the kernel frees when its holder dies. A
server has nothing of the kind, only values that are read and written whole. There a turn is taken
with one tag of the registered model, by Fischer's protocol (Lamport 1987, A fast mutual exclusion
algorithm, section 2): write your name where there is none, wait until everybody who saw none has
written too, and go on if it is still yours.

On a server this rests on time: a request that takes longer than SETTLE seconds, or a holder that
pauses for longer than LEASE, can make two turns overlap. Nor does it bind those who do not ask,
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
TURN_TAG = "ddpm.turn"
SETTLE = 2.0
"""Seconds between a look at the tag and the arrival of what is written after it, at most."""
LEASE = 60.0
"""Seconds after which a turn that nobody ended is taken for that of a dead process."""
POLL = 0.5


def in_turn(uri: str) -> contextlib.AbstractContextManager[None]:
    """Hold a sqlite store for this process; nothing for a server, which knows its own order."""
    if not uri.startswith(SQLITE):
        return contextlib.nullcontext()
    return storage.exclusive(
        uri.removeprefix(SQLITE) + ".lock", remedy="set another place with --set tracking.uri=URI"
    )


def model_turn(
    client: MlflowClient, uri: str, name: str
) -> contextlib.AbstractContextManager[None]:
    """Hold a registered model that exists, while its versions and aliases are read and changed.

    Not to be nested, nor around what uses `in_turn` itself, such as `make_client`.
    """
    return in_turn(uri) if uri.startswith(SQLITE) else _turn_by_tag(client, name)


@contextlib.contextmanager
def _turn_by_tag(client: MlflowClient, name: str) -> Iterator[None]:
    def holder() -> str | None:
        tag: str | None = client.get_registered_model(name).tags.get(TURN_TAG)
        return tag

    mine = uuid.uuid4().hex
    seen, since = holder(), time.monotonic()
    while seen != mine:
        if seen is None or time.monotonic() - since > LEASE:
            client.set_registered_model_tag(name, TURN_TAG, mine)
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
            client.delete_registered_model_tag(name, TURN_TAG)
