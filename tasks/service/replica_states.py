"""What the replicas of a service are at, for the people who look at its page."""

import asyncio
import time
from typing import Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

LOOK_AGAIN = 0.25
"""Seconds for which a look at the replicas serves all who want one."""
LONGEST_LOOK = 3.0
"""Seconds that replicas are waited for."""


class ReplicaStates:
    """What the replicas are at. However many pages are open, they are asked a few times a second.

    Args:
        replicas: the handle of the deployment of replicas.
    """

    def __init__(self, replicas: Any) -> None:
        self._replicas = replicas
        self._states: list[dict[str, Any]] = []
        self._taken = -LOOK_AGAIN
        self._one_at_a_time = asyncio.Lock()

    async def all(self) -> list[dict[str, Any]]:
        """The state of each replica that answers; if one hangs, what all said the last time."""
        async with self._one_at_a_time:
            if time.monotonic() - self._taken > LOOK_AGAIN:
                await self._take()
                self._taken = time.monotonic()
        return self._states

    async def _take(self) -> None:
        try:
            answers = await self._replicas.broadcast("state").results_async(
                timeout_s=LONGEST_LOOK, return_exceptions=True
            )
        except TimeoutError:
            return
        except (RayError, RayServeException):
            answers = []
        there = [answer for answer in answers if isinstance(answer, dict)]
        self._states = sorted(there, key=lambda replica: str(replica["replica"]))
