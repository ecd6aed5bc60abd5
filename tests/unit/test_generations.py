"""Requests in hand, without a service: who hears what, and what an idempotency key gives."""

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from typing import Any

import pytest

from pipeline.errors import RequestError
from tasks.service.generations import Asked, Generation, Generations
from tests.conftest import HANG

ASKED = Asked("digest", "ann", n=1, rows=1)


def on_a_loop(body: Callable[[], Awaitable[Any]]) -> Any:
    """What `body` returns, on an event loop of its own: one that hangs fails the test alone."""
    result: Future[Any] = Future()

    async def run() -> None:
        try:
            result.set_result(await body())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=lambda: asyncio.run(run()), daemon=True).start()
    return result.result(timeout=HANG)


def test_who_starts_beyond_the_last_event_waits_for_the_end_and_stops_nobody() -> None:
    async def body() -> list[Any]:
        generation = Generation("gen_1", ASKED)

        async def hear() -> list[Any]:
            return [number async for number, _ in generation.listen(after=999)]

        listener = asyncio.create_task(hear())
        await asyncio.sleep(0.01)
        await generation.tell("an event", {})
        await generation.end("completed")
        return await listener

    assert on_a_loop(body) == []


@pytest.mark.parametrize("header", ["-1", "1e9", "2", "٢", "²", "x", " 1", "1" * 5000])
def test_an_event_that_was_never_told_cannot_be_the_last_one_heard(header: str) -> None:
    async def body() -> None:
        generation = Generation("gen_1", ASKED)
        await generation.tell("an event", {})
        assert [generation.heard(known) for known in (None, "", "0", "1")] == [0, 0, 0, 1]
        with pytest.raises(RequestError, match="Last-Event-ID=.* is no event of this") as caught:
            generation.heard(header)
        assert len(caught.value.message) < 300

    on_a_loop(body)


async def _succeed(generation: Generation) -> None:
    pass


async def _fail(generation: Generation) -> None:
    raise RuntimeError


async def _hang(generation: Generation) -> None:
    await asyncio.Event().wait()


def test_a_key_gives_what_was_made_and_a_failure_is_tried_again() -> None:
    async def body() -> None:
        generations = Generations()
        for run, state in ((_fail, "failed"), (_hang, "cancelled"), (_succeed, "completed")):
            assert generations.of_key("ann", "key", "digest") is None
            generation = generations.start(ASKED, "key", run)
            assert generations.of_key("ann", "key", "digest") is generation
            if run is _hang:
                await generations.cancel(generation)
            await asyncio.sleep(0.01)
            assert generation.state == state
        assert generations.of_key("ann", "key", "digest") is generation
        assert generations.rows == 0
        assert generations.of_key("bob", "key", "another digest") is None
        with pytest.raises(RequestError, match="came with another request before"):
            generations.of_key("ann", "key", "another digest")

    on_a_loop(body)


@pytest.mark.parametrize("key", ["", "k" * 256])
def test_a_key_has_a_length(key: str) -> None:
    with pytest.raises(RequestError, match=f"has {len(key)} characters, it must have 1 to 255"):
        Generations().of_key("ann", key, "digest")
