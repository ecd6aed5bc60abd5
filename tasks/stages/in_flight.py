"""Many calls of a Ray task, few of them at once."""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import ray


def results(task: Any, calls: Iterable[tuple[Any, ...]]) -> Iterator[tuple[int, Any]]:
    """Call the remote function with each of the tuples; yields (index, result) as calls end.

    Two a CPU are in flight: enough to hide the driver, few enough to bound memory.

    Raises:
        the error of the first call that fails.
    """
    limit = 2 * max(1, int(ray.cluster_resources().get("CPU", 1)))
    waiting = deque(enumerate(calls))
    running: dict[Any, int] = {}
    ended: deque[Any] = deque()
    while waiting or running:
        while waiting and len(running) < limit:
            i, arguments = waiting.popleft()
            running[task.remote(*arguments)] = i
        if not ended:
            # all of them: a look takes the longer, the more tasks are in flight
            ray.wait(list(running), num_returns=1)
            ended.extend(ray.wait(list(running), num_returns=len(running), timeout=0)[0])
        if ended:
            ref = ended.popleft()
            yield running.pop(ref), ray.get(ref)
