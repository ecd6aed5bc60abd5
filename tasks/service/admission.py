"""Which requests are taken now, and which are told to come again."""

import math
from collections.abc import Iterable

from pipeline.errors import PipelineError
from pipeline.serving.config import ServingConfig
from tasks.service.generations import Asked, Generation, Generations

LONGEST_RETRY = 60
"""Seconds that a client is told to wait, at most."""
MOST_BYTES = 2**30
"""Of the pictures of requests that are running or being read; of one client, half of it."""


class TooMuch(PipelineError):
    """More than the service takes at a time; `seconds` is when to try again."""

    def __init__(self, seconds: int) -> None:
        super().__init__(seconds)
        self.seconds = seconds


def check_room(
    asked: Asked, generations: Generations, config: ServingConfig, rows_per_second: float
) -> None:
    """Whether a request can be taken now. One that is alone always can.

    Args:
        rows_per_second: of all replicas.

    Raises:
        TooMuch: it has to wait outside.
    """
    own = generations.of(asked.client)
    rows, own_rows = generations.rows, sum(of.rows for of in own)
    # until a request is done, each other one has at most as much drawn as it (turns.py)
    first = sum(min(asked.rows, of.rows) for of in generations.running)
    held, own_held = _held(generations.all), _held(own)
    beyond = [
        rows + asked.rows - config.max_rows if rows else 0,
        own_rows + asked.rows - config.rows_per_client if own_rows else 0,
        first + asked.rows - rows_per_second * config.max_seconds if first else 0,
        # nobody knows when a reader is done: as if one that is running had to be
        rows or 1 if held and held + asked.room > MOST_BYTES else 0,
        own_rows or 1 if own_held and own_held + asked.room > MOST_BYTES // 2 else 0,
    ]
    if max(beyond) > 0:
        seconds = math.ceil(min(max(beyond), rows) / rows_per_second)
        raise TooMuch(min(max(1, seconds), LONGEST_RETRY))


def _held(generations: Iterable[Generation]) -> int:
    """Bytes that cannot be thrown away."""
    return sum(of.size for of in generations if of.state == "running" or of.listeners)
