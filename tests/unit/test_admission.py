"""Which requests are taken, without a service."""

import asyncio

import pytest

from pipeline.serving.config import ServingConfig
from tasks.service.admission import MOST_BYTES, TooMuch, check_room
from tasks.service.generations import Asked, Generation, Generations

CONFIG = ServingConfig(max_rows=1000, max_rows_per_client=600, max_seconds=10)
PACE = 100.0


async def _hang(generation: Generation) -> None:
    await asyncio.Event().wait()


async def _succeed(generation: Generation) -> None:
    await generation.tell("an event", {}, MOST_BYTES // 2)


def asked(client: str = "ann", rows: int = 100, room: int = 0) -> Asked:
    return Asked("digest", client, 1, rows, room)


def retry_after(running: list[Asked], new: Asked) -> int:
    """The seconds that a client is told to wait; 0: it is served."""

    async def body() -> int:
        generations = Generations()
        for one in running:
            generations.start(one, None, _hang)
        try:
            check_room(new, generations, CONFIG, PACE)
        except TooMuch as error:
            return error.seconds
        return 0

    return asyncio.run(body())


@pytest.mark.parametrize(
    ("running", "new", "seconds"),
    [
        ([], asked(rows=10**6, room=10**12), 0),
        ([asked()] * 5, asked(), 0),
        ([asked()] * 6, asked(), 1),
        ([asked(rows=500)], asked(rows=400), 3),
        ([asked()] * 6, asked("bob"), 0),
        ([asked("bob"), asked("cid", 900)], asked(), 1),
        ([asked("bob", 500), asked("cid", 500)], asked(rows=900), 9),
        # as much of each before it as of itself, at most: 5 * 100 + 100 rows in 10 s
        ([asked(f"{i}", 190) for i in range(5)], asked(rows=50), 0),
        ([asked("bob", room=MOST_BYTES - 1)], asked(room=1), 0),
        ([asked("bob", room=MOST_BYTES - 1)], asked(room=2), 1),
        ([asked(room=MOST_BYTES // 2)], asked(room=1), 1),
        ([asked(room=MOST_BYTES // 2)], asked("bob", room=1), 0),
    ],
)
def test_a_request_is_taken_where_there_is_room(
    running: list[Asked], new: Asked, seconds: int
) -> None:
    assert retry_after(running, new) == seconds


def test_what_would_take_too_long_behind_the_others_is_not_taken() -> None:
    slow = ServingConfig(max_rows=10**6, max_seconds=10)

    async def body() -> None:
        generations = Generations()
        for client in "bcdef":
            generations.start(asked(client, 190), None, _hang)
        check_room(asked(rows=160), generations, slow, PACE)  # 5 * 160 + 160 rows, 9.6 s
        with pytest.raises(TooMuch):
            check_room(asked(rows=180), generations, slow, PACE)

    asyncio.run(body())


def test_the_room_of_a_request_is_free_when_nobody_reads_it_any_more() -> None:
    async def body() -> None:
        generations = Generations()
        done = generations.start(asked(room=MOST_BYTES), None, _succeed)
        await asyncio.sleep(0.01)
        assert done.state == "completed"
        new = asked(room=MOST_BYTES // 2)
        check_room(new, generations, CONFIG, PACE)
        with done.listened_to(), pytest.raises(TooMuch):
            check_room(new, generations, CONFIG, PACE)

    asyncio.run(body())
