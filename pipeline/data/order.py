"""The order in which training sees the images: a pure function of (seed, step).

The epochs' orders stand one after another as an endless list of positions, of which global batch s
is the positions s·B .. (s+1)·B - 1. So every image comes once an epoch, the tail of an epoch is not
dropped, any step is reached without replaying the ones before it, and the number of workers has no
part in it: rank r of W takes the r-th of W slices of each global batch.

An image is known by its index among the n of its split, in the order of the parts.
"""

import functools
from bisect import bisect_right
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np

from pipeline.seeding import key, permutation


@functools.lru_cache(maxsize=2)  # a batch may straddle two epochs
def _epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    return permutation(key(seed, "order", epoch), n)


def global_batch(seed: int, step: int, batch_size: int, n: int) -> np.ndarray:
    """The fully shuffled order: the indices of global batch `step` (from 0), (batch_size,) int64.

    The order of an epoch is a permutation of all n, drawn when its first batch is asked for.
    """
    start = step * batch_size
    stop = start + batch_size
    pieces = []
    for epoch in range(start // n, (stop - 1) // n + 1):
        order = _epoch_order(seed, epoch, n)
        pieces.append(order[max(start - epoch * n, 0) : stop - epoch * n])
    return np.concatenate(pieces)


def share(rank: int, world_size: int, batch_size: int) -> range:
    """The rows of each global batch that are this rank's; ranks differ by at most one row."""
    return range(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)


class Window(NamedTuple):
    """Images that are read together, and shuffled among themselves."""

    epoch: int
    lane: int
    number: int
    """From 0, within its lane of its epoch."""


class Piece(NamedTuple):
    """Rows start .. stop - 1 of a window, which follow one another in a batch."""

    window: Window
    start: int
    stop: int


@dataclass(frozen=True)
class _Epoch:
    """How the images of one epoch are laid out, before they are shuffled within windows."""

    groups: np.ndarray
    """(G,) the row groups in the order of this epoch"""
    starts: np.ndarray
    """(G,) where each begins in the epoch's list of images"""
    bounds: list[list[int]]
    """By lane: where its windows begin in that list, and the end of the last."""


@dataclass(frozen=True, eq=False)
class WindowedOrder:
    """An order that reads each part of the data once an epoch, and holds little of it at a time.

    In each epoch the row groups of all parts are shuffled. The list of images that this gives is
    cut into `lanes` segments, one for each lane, and row j of every global batch is the next image
    of lane ⌊j·lanes/B⌋. A segment is as long as its lane has rows in that epoch, so that every
    image comes exactly once. Within its segment a lane draws from one window after the other: whole
    row groups, together about `window / lanes` images, shuffled. So a batch is drawn from about
    `window` images that lie at `lanes` places of the data, and a rank, whose rows are those of a
    few lanes, reads no other data than theirs, but for a row group where a segment begins or ends.

    What a lookup costs depends on the number of row groups and the size of a window, not on the
    step. An epoch's layout is computed once.
    """

    seed: int
    batch_size: int
    group_sizes: np.ndarray
    """(G,) int64: the images of each row group, in the order of the parts."""
    window: int
    """Images, of all lanes together."""
    lanes: int

    @functools.cached_property
    def num_images(self) -> int:
        return int(self.group_sizes.sum())

    @functools.cached_property
    def _group_starts(self) -> np.ndarray:
        starts: np.ndarray = np.cumsum(self.group_sizes) - self.group_sizes
        return starts

    @functools.cached_property
    def _first_rows(self) -> list[int]:
        """(lanes + 1,): lane l has the rows _first_rows[l] .. _first_rows[l + 1] - 1 of a batch."""
        return [-(-lane * self.batch_size // self.lanes) for lane in range(self.lanes + 1)]

    def batch(self, step: int) -> np.ndarray:
        """The indices of global batch `step` (from 0), (batch_size,) int64."""
        pieces = self.pieces(step, range(self.batch_size))
        return np.concatenate([self.indices(p.window)[p.start : p.stop] for p in pieces])

    def indices(self, window: Window) -> np.ndarray:
        """The images of a window in the order in which they are used: (m,) int64."""
        epoch = _layout(self, window.epoch)
        start, stop = epoch.bounds[window.lane][window.number : window.number + 2]
        places = np.arange(start, stop)
        nth = np.searchsorted(epoch.starts, places, side="right") - 1
        unshuffled = self._group_starts[epoch.groups[nth]] + places - epoch.starts[nth]
        shuffled: np.ndarray = unshuffled[
            permutation(key(self.seed, "window", *window), stop - start)
        ]
        return shuffled

    def pieces(self, step: int, rows: range) -> Iterator[Piece]:
        """Where `rows` of global batch `step` are found, in the order of the rows."""
        for lane in range(self.lanes):
            first = max(rows.start, self._first_rows[lane])
            last = min(rows.stop, self._first_rows[lane + 1])
            if first < last:
                base = step * self.batch_size
                yield from self._pieces_of_lane(lane, base + first, base + last)

    def _pieces_of_lane(self, lane: int, position: int, end: int) -> Iterator[Piece]:
        n = self.num_images
        while position < end:
            number = position // n
            count = min(end, (number + 1) * n) - position
            bounds = _layout(self, number).bounds[lane]
            place = bounds[0] + self._before(lane, position) - self._before(lane, number * n)
            position += count
            while count:
                window = bisect_right(bounds, place) - 1
                stop = min(place + count, bounds[window + 1])
                begin = bounds[window]
                yield Piece(Window(number, lane, window), place - begin, stop - begin)
                count -= stop - place
                place = stop

    def following(self, window: Window) -> Window:
        """The window that its lane uses next."""
        epoch, lane, number = window._replace(number=window.number + 1)
        while number + 1 >= len(_layout(self, epoch).bounds[lane]):  # in few images a lane has none
            epoch, number = epoch + 1, 0
        return Window(epoch, lane, number)

    def _before(self, lane: int, position: int) -> int:
        """How many of the positions 0 .. position - 1 of the endless list fall to a lane."""
        first, last = self._first_rows[lane : lane + 2]
        batches, row = divmod(position, self.batch_size)
        return batches * (last - first) + min(max(row - first, 0), last - first)


@functools.lru_cache(maxsize=4)
def _layout(order: WindowedOrder, epoch: int) -> _Epoch:
    n = order.num_images
    groups = permutation(key(order.seed, "order", epoch), len(order.group_sizes))
    sizes = order.group_sizes[groups]
    starts = np.cumsum(sizes) - sizes
    lengths = (
        order._before(lane, (epoch + 1) * n) - order._before(lane, epoch * n)
        for lane in range(order.lanes)
    )
    segments = pairwise(accumulate(lengths, initial=0))
    window = -(-order.window // order.lanes)
    return _Epoch(groups, starts, [_cut(starts, *segment, window) for segment in segments])


def _cut(starts: np.ndarray, start: int, stop: int, window: int) -> list[int]:
    """Cut start .. stop - 1 into windows of about equal size, at the starts of row groups."""
    if start == stop:
        return [start]
    inner = starts[np.searchsorted(starts, start, side="right") : np.searchsorted(starts, stop)]
    cuts = np.concatenate([[start], inner])
    num_windows = -(-(stop - start) // window)
    _, first = np.unique((cuts - start) * num_windows // (stop - start), return_index=True)
    return [*cuts[first].tolist(), stop]
