"""Which replica an image goes to: the one with the least to do.

That is counted in rows of the network that a replica has been given and has not finished.
"""

import time
from collections import Counter, OrderedDict
from typing import Any, NamedTuple

from ray.serve.request_router import FIFOMixin, PendingRequest, ReplicaID, RequestRouter

LONGEST_WAY = 10.0
"""Seconds that an image may be on its way to a replica."""


class _Given(NamedTuple):
    """An image that a replica has, or is meant to get."""

    replica: ReplicaID
    rows: int


class LeastRows(FIFOMixin, RequestRouter):  # type: ignore[misc]  # Ray is untyped
    """To the replica with the fewest rows that it was given and has not finished, first among those
    that have not failed to draw the image.

    An image counts from the moment that it is meant for a replica: many are, before the first of
    them is heard to have arrived. What a choice takes grows with the replicas, not with the images.
    """

    def initialize_state(self, **_: Any) -> None:
        self._given: dict[str, _Given] = {}
        self._rows: Counter[ReplicaID] = Counter()
        self._under_way: OrderedDict[str, float] = OrderedDict()
        """Since when, the first first."""

    async def choose_replicas(
        self, candidate_replicas: list[Any], pending_request: PendingRequest | None = None
    ) -> list[list[Any]]:
        self._forget_the_lost()
        order = pending_request.args[0] if pending_request and pending_request.args else None
        avoid = getattr(order, "avoid", ())

        def rank(replica: Any) -> tuple[bool, int]:
            return replica.replica_id.unique_id in avoid, self._rows.get(replica.replica_id, 0)

        ranked = sorted(candidate_replicas, key=rank)
        if ranked and pending_request is not None:
            self._give(pending_request, ranked[0].replica_id)
            if (id := pending_request.metadata.internal_request_id) in self._given:
                self._under_way[id] = time.monotonic()
        return [[replica] for replica in ranked]

    def on_request_routed(
        self, pending_request: PendingRequest, replica_id: ReplicaID, result: Any
    ) -> None:
        self._give(pending_request, replica_id)

    def on_request_completed(self, replica_id: ReplicaID, internal_request_id: str) -> None:
        self._take(internal_request_id)

    def _give(self, request: PendingRequest, replica: ReplicaID) -> None:
        # a call that draws nothing has no rows, and counts for nothing
        rows = getattr(request.args[0], "rows", 0) if request.args else 0
        self._take(request.metadata.internal_request_id)
        if rows:
            self._given[request.metadata.internal_request_id] = _Given(replica, rows)
            self._rows[replica] += rows

    def _take(self, id: str) -> None:
        self._under_way.pop(id, None)
        if (given := self._given.pop(id, None)) is not None:
            self._rows[given.replica] -= given.rows
            if not self._rows[given.replica]:
                del self._rows[given.replica]

    def _forget_the_lost(self) -> None:
        """An image that was called off on its way is never heard of again."""
        long_ago = time.monotonic() - LONGEST_WAY
        while self._under_way and self._under_way[id := next(iter(self._under_way))] < long_ago:
            self._take(id)
