"""Which replica the next image goes to."""

import asyncio
import time
from collections import Counter
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID
from ray.serve._private.common import RequestMetadata as Metadata
from ray.serve.request_router import PendingRequest

from tasks.service import router
from tasks.service.router import LeastRows

DEPLOYMENT = DeploymentID(name="Replica")


class Routed:
    """A router before some replicas."""

    def __init__(self, num_replicas: int) -> None:
        self.router = LeastRows(DEPLOYMENT, DeploymentHandleSource.REPLICA)
        self.router.initialize_state()
        names = [f"{i:04d}" for i in range(num_replicas)]
        self.replicas = [SimpleNamespace(replica_id=ReplicaID(name, DEPLOYMENT)) for name in names]

    async def choose(
        self, name: str, rows: int, avoid: frozenset[str] = frozenset()
    ) -> tuple[PendingRequest, list[int]]:
        """The request of an image, and the replicas in the order in which they are preferred."""
        order = SimpleNamespace(rows=rows, avoid=avoid)
        pending = PendingRequest([order], {}, Metadata(name, name))
        ranks = await self.router.choose_replicas(self.replicas, pending)
        return pending, [self.replicas.index(replica) for (replica,) in ranks]

    def arrive(self, pending: PendingRequest, number: int) -> None:
        self.router.on_request_routed(pending, self.replicas[number].replica_id, None)

    def complete(self, name: str, number: int) -> None:
        self.router.on_request_completed(self.replicas[number].replica_id, name)


class NotGoneThrough(dict[str, Any]):
    def __iter__(self) -> Any:
        raise AssertionError("a choice looks at all images")

    items = values = keys = __iter__


def test_an_image_goes_where_the_fewest_rows_are_in_hand() -> None:
    """Against all that was given, counted anew, while images come, arrive elsewhere and end."""

    async def come_and_go() -> None:
        it, rng = Routed(5), np.random.default_rng(0)
        it.router._given = NotGoneThrough()
        in_hand: dict[str, tuple[int, int]] = {}
        for i in range(400):
            rows = Counter[int]()
            for number, count in in_hand.values():
                rows[number] += count
            pending, ranked = await it.choose(str(i), int(rng.integers(1, 50)))
            assert ranked == sorted(range(5), key=lambda number: rows[number])
            number = ranked[0]
            if rng.random() < 0.7:  # the others are still on their way
                number = ranked[int(rng.integers(2))]
                it.arrive(pending, number)
            in_hand[str(i)] = number, pending.args[0].rows
            while in_hand and rng.random() < 0.55:
                name = str(rng.choice(list(in_hand)))
                it.complete(name, in_hand.pop(name)[0])
        for name, (number, _) in in_hand.items():
            it.complete(name, number)
        assert not len(it.router._given) and not it.router._rows and not it.router._under_way

    asyncio.run(come_and_go())


def test_an_image_that_never_arrives_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    async def lose() -> None:
        it = Routed(2)
        assert (await it.choose("lost", 100))[1] == [0, 1]
        pending, ranked = await it.choose("here", 200)
        assert ranked == [1, 0]
        it.arrive(pending, 1)
        assert (await it.choose("late", 1))[1] == [0, 1]
        now = time.monotonic() + router.LONGEST_WAY + 1
        monkeypatch.setattr(router.time, "monotonic", lambda: now)
        assert (await it.choose("next", 1))[1] == [0, 1]
        assert it.router._rows == {
            it.replicas[0].replica_id: 1,
            it.replicas[1].replica_id: 200,
        }

    asyncio.run(lose())


def test_a_replica_that_failed_to_draw_an_image_is_the_last_to_get_it_again() -> None:
    async def fail() -> None:
        it = Routed(3)
        await it.choose("a", 100)
        await it.choose("b", 50)  # 2 has nothing to do
        assert (await it.choose("c", 1, frozenset({"0002"})))[1] == [1, 0, 2]
        assert (await it.choose("d", 1, frozenset({"0002", "0001"})))[1] == [0, 2, 1]

    asyncio.run(fail())


def test_what_is_not_an_image_counts_for_nothing() -> None:
    async def ask() -> None:
        it = Routed(2)
        pending = PendingRequest([], {}, Metadata("a", "a"))
        await it.router.choose_replicas(it.replicas, pending)
        it.arrive(pending, 0)
        assert not it.router._given and not it.router._rows
        assert await it.router.choose_replicas([], pending) == []

    asyncio.run(ask())
