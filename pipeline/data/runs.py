"""Cutting a list so that what comes or goes in it changes few of its runs."""

import zlib
from collections.abc import Iterable, Iterator


def runs(keys: Iterable[str], mean: int) -> Iterator[range]:
    """Ranges over `keys`, of `mean` on average, from half to twice as many.

    A run ends at a key whose hash says so, so keys that come or go change the runs they are in,
    and no run far from them.
    """
    least, most = max(1, mean // 2), 2 * mean
    start = stop = 0
    for stop, key in enumerate(keys, start=1):
        length = stop - start
        # beyond the least, the chance of an end is such that the mean length is `mean`
        is_end = zlib.crc32(key.encode()) % (mean - least + 1) == 0
        if length == most or (length >= least and is_end):
            yield range(start, stop)
            start = stop
    if start < stop:
        yield range(start, stop)
