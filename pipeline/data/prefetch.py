"""Making things on threads, ahead of their use."""

from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

K = TypeVar("K")
T = TypeVar("T")


def prefetch(
    make: Callable[[K], T], keys: Iterable[K], depth: int = 4, num_threads: int = 1
) -> Generator[T, None, None]:
    """Yield what `make` makes of each key, in order, up to `depth` of them made ahead on threads.

    What `make` raises is raised here, at its key. The threads are gone when the iterator is at its
    end or closed.
    """
    ahead: deque[Future[T]] = deque()
    with ThreadPoolExecutor(num_threads, "prefetch") as threads:
        try:
            for each in keys:
                ahead.append(threads.submit(make, each))
                if len(ahead) > depth:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()
        finally:
            threads.shutdown(cancel_futures=True)
