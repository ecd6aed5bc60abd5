"""Requests in hand: each runs to its end whoever listens, and can be listened to again by its id.

What happens to a request is a list of events, which a listener reads from any place on: that is how
a client that lost its connection goes on, and how one with the same idempotency key gets the same
images. A request that nobody has listened to for a while is given up, and what is done is kept for
a while, so memory is bounded.
"""

import asyncio
import contextlib
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import Context
from typing import Any, Literal, NamedTuple

from pipeline.errors import RequestError, shown

NOBODY_LISTENS = 10.0
"""Seconds after which a request without a listener is given up."""
MOST_KEY = 255
"""Characters of an idempotency key."""
KEPT_SECONDS, KEPT_BYTES = 300.0, 256 * 2**20
"""For which, and of which, requests that are done are kept."""
EVENT_BYTES = 2000
"""Of an event beside its pictures: as much as those, if they are small."""

State = Literal["running", "completed", "failed", "cancelled"]


class Asked(NamedTuple):
    """What a request is, and of whom."""

    body_digest: str
    """So that a key is not used for two things."""
    client: str
    n: int
    """Images."""
    rows: int
    """Of network calls, about."""
    room: int = 0
    """Bytes that its events take, at most."""


class Event(NamedTuple):
    """Something that happened to a request."""

    name: str
    data: dict[str, Any]
    size: int
    """Bytes that it holds, about."""


class Generation:
    """One request in hand."""

    def __init__(self, id: str, asked: Asked) -> None:
        self.id = id
        self.asked = asked
        self.done_images = 0
        self.rows = asked.rows
        """Of network calls that are not done."""
        self.state: State = "running"
        self.created = int(time.time())
        self.events: list[Event] = []
        self.error: Exception | None = None
        self.result: dict[str, Any] | None = None
        self.listeners = 0
        self.last_heard = time.monotonic()
        self.task: asyncio.Task[None] | None = None
        self._news = asyncio.Condition()

    async def tell(self, name: str, data: dict[str, Any], size: int = 0) -> None:
        """Add an event.

        Args:
            size: of its pictures, in bytes.
        """
        self.events.append(Event(name, data, size + EVENT_BYTES))
        async with self._news:
            self._news.notify_all()

    @contextlib.contextmanager
    def listened_to(self) -> Any:
        self.listeners += 1
        try:
            yield
        finally:
            self.listeners -= 1
            self.last_heard = time.monotonic()

    def heard(self, last_event_id: str | None) -> int:
        """How many of its events a listener has had, as that says in the header Last-Event-ID.

        Raises:
            RequestError: it cannot have had that one.
        """
        number = last_event_id or "0"
        if not re.fullmatch("[0-9]{1,9}", number) or int(number) > len(self.events):
            raise RequestError(
                f"Last-Event-ID={shown(number)} is no event of this request, which has had "
                f"{len(self.events)}: give the id of the last event that came, or leave it out",
                "Last-Event-ID",
            )
        return int(number)

    async def listen(self, after: int = 0) -> AsyncIterator[tuple[int, Event]]:
        """Its events from number `after` on, as they come, to its end."""
        with self.listened_to():
            while True:
                while after < len(self.events):
                    after += 1
                    yield after, self.events[after - 1]
                if self.state != "running":
                    return
                async with self._news:
                    while after >= len(self.events) and self.state == "running":
                        await self._news.wait()

    async def done(self) -> None:
        """Until it has ended."""
        async for _ in self.listen(len(self.events)):
            pass

    async def end(self, state: State, error: Exception | None = None) -> None:
        self.state, self.error, self.rows = state, error, 0
        self.last_heard = time.monotonic()
        async with self._news:
            self._news.notify_all()

    @property
    def size(self) -> int:
        """Bytes that it holds, or may come to hold."""
        if self.state == "running":
            return self.asked.room
        return sum(event.size for event in self.events)


class Generations:
    """All requests in hand, and those that were done a short while ago.

    Args:
        note_rows: told each second how many rows there are.
    """

    def __init__(self, note_rows: Callable[[int], None] = lambda rows: None) -> None:
        self._note_rows = note_rows
        self._by_id: dict[str, Generation] = {}
        self._by_key: dict[tuple[str, str], str] = {}
        self._sweeper: asyncio.Task[None] | None = None

    @property
    def rows(self) -> int:
        """Of network calls that are accepted and not done."""
        return sum(generation.rows for generation in self._by_id.values())

    @property
    def all(self) -> list[Generation]:
        return list(self._by_id.values())

    def of(self, client: str) -> list[Generation]:
        return [of for of in self._by_id.values() if of.asked.client == client]

    @property
    def running(self) -> list[Generation]:
        return [of for of in self._by_id.values() if of.state == "running"]

    def get(self, id: str) -> Generation | None:
        return self._by_id.get(id)

    def of_key(self, client: str, key: str | None, body_digest: str) -> Generation | None:
        """The request that came from a client with an idempotency key, unless it failed or was
        given up.

        Raises:
            RequestError: it was another one, or the key cannot be one.
        """
        if key is None:
            return None
        if not 1 <= len(key) <= MOST_KEY:
            raise RequestError(
                f"the Idempotency-Key has {len(key)} characters, it must have 1 to {MOST_KEY}",
                "Idempotency-Key",
            )
        same = self._by_id.get(self._by_key.get((client, key), ""))
        if same is None or same.state in ("failed", "cancelled"):
            return None
        if same.asked.body_digest != body_digest:
            raise RequestError(
                f"the Idempotency-Key {shown(key)} came with another request before", "body"
            )
        return same

    def start(
        self, asked: Asked, key: str | None, run: Callable[[Generation], Awaitable[None]]
    ) -> Generation:
        """Take a request in and run it."""
        generation = Generation(f"gen_{secrets.token_hex(12)}", asked)
        self._by_id[generation.id] = generation
        if key is not None:
            self._by_key[asked.client, key] = generation.id
        # in a context of its own: Ray Serve gives up what was called in the context of a request
        # whose connection is lost
        generation.task = asyncio.create_task(_run(generation, run), context=Context())
        if self._sweeper is None:
            self._sweeper = asyncio.create_task(self._sweep(), context=Context())
        return generation

    async def cancel(self, generation: Generation) -> None:
        """Give a request up; its rows are free within a network call."""
        if generation.task is not None and generation.state == "running":
            generation.task.cancel()
            await asyncio.wait([generation.task])
            if generation.state == "running":  # it was cancelled before it began
                await generation.end("cancelled")

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(1)
            self._note_rows(self.rows)
            now = time.monotonic()
            for generation in self.running:
                if not generation.listeners and now - generation.last_heard > NOBODY_LISTENS:
                    await self.cancel(generation)
            kept = [of for of in self._by_id.values() if of.state != "running" and not of.listeners]
            held = sum(of.size for of in kept)
            for generation in sorted(kept, key=lambda of: of.last_heard):
                if now - generation.last_heard > KEPT_SECONDS or held > KEPT_BYTES:
                    held -= generation.size
                    del self._by_id[generation.id]
            there = self._by_id
            self._by_key = {key: id for key, id in self._by_key.items() if id in there}


async def _run(generation: Generation, run: Callable[[Generation], Awaitable[None]]) -> None:
    try:
        await run(generation)
    except asyncio.CancelledError:
        await generation.end("cancelled")
    except Exception as error:  # whoever listens is told
        await generation.end("failed", error)
    else:
        await generation.end("completed")
