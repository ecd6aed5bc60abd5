"""Data that does not fit on a node: read by row group as training comes to it, on threads.

Memory: a lane holds the window in use and the one that follows; in a batch that passes from one
window to another, those. With g images in a row group, L lanes and batches of B these are at most
2·(⌈shuffle_window/L⌉ + g) + ⌈B/L⌉ images a lane. A rank of W has the lanes of its rows, L/W of them
where W divides L: all ranks together hold about twice `shuffle_window`. Beside that each thread
holds a row group, as it is stored and decoded.
"""

from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from pipeline.data.order import Window, WindowedOrder
from pipeline.data.parts import Parts

READ_AT_ONCE = 4
"""Windows: enough to hide an object store's latency, and for decoding to use some cores."""


class _Held(NamedTuple):
    """A window in memory."""

    images: np.ndarray
    """(m, H, W, C) uint8, as they lie in the parts"""
    labels: np.ndarray
    """(m,) int64"""
    places: np.ndarray
    """(m,) int64: where in these the first image to be used stands, the second ..."""


class WindowedShuffle:
    """The images of `parts` in a windowed order; close it when done."""

    def __init__(self, parts: Parts, seed: int, batch_size: int, window: int, lanes: int) -> None:
        self._parts, sizes = parts, parts.group_sizes
        self._starts = np.cumsum(sizes) - sizes
        self.order = WindowedOrder(seed, batch_size, sizes, window, lanes)
        self.seed, self.batch_size = seed, batch_size
        self._pool = ThreadPoolExecutor(READ_AT_ONCE, "windows")
        self._held: dict[Window, Future[_Held]] = {}

    def read(self, step: int, rows: range) -> tuple[np.ndarray, np.ndarray]:
        """The images (b, H, W, C) uint8 and labels (b,) int64 of `rows` of global batch `step`.

        Raises:
            CorruptArtifact: a part is missing or damaged.
            StorageError: a part cannot be read.
        """
        pieces = list(self.order.pieces(step, rows))
        self._hold([piece.window for piece in pieces])
        held = [self._held[piece.window].result() for piece in pieces]
        images = np.empty((len(rows), *held[0].images.shape[1:]), np.uint8)
        labels = np.empty(len(rows), np.int64)
        done = 0
        for window, (_, start, stop) in zip(held, pieces, strict=True):
            here, places = slice(done, done + stop - start), window.places[start:stop]
            # with mode="raise" it would copy twice
            np.take(window.images, places, axis=0, out=images[here], mode="clip")
            labels[here] = window.labels[places]
            done = here.stop
        return images, labels

    def indices(self, step: int) -> np.ndarray:
        """Which images of the split are in global batch `step`: (B,) int64."""
        return self.order.batch(step)

    def close(self) -> None:
        """Wait for what is being read, and let go of all of it."""
        self._pool.shutdown(cancel_futures=True)
        self._held.clear()

    def _hold(self, needed: list[Window]) -> None:
        """Have the windows of a batch and those that follow, and no others."""
        passing = {a.lane for a, b in pairwise(needed) if a.lane == b.lane}
        ahead = [self.order.following(window) for window in needed if window.lane not in passing]
        wanted = [*needed, *ahead]
        for window in self._held.keys() - set(wanted):
            self._held.pop(window).cancel()
        for window in wanted:  # those of this batch first
            if window not in self._held:
                self._held[window] = self._pool.submit(self._load, window)

    def _load(self, window: Window) -> _Held:
        used = self.order.indices(window)
        indices = np.sort(used)
        images, labels = np.empty(0), np.empty(len(indices), np.int64)
        groups, firsts = np.unique(
            np.searchsorted(self._starts, indices, side="right") - 1, return_index=True
        )
        for group, first, stop in zip(groups, firsts, [*firsts[1:], len(indices)], strict=True):
            group_images, group_labels = self._parts.read_group(int(group))
            if not images.size:
                images = np.empty((len(indices), *group_images.shape[1:]), np.uint8)
            of_group = indices[first:stop] - self._starts[group]  # neighbours
            there = slice(of_group[0], of_group[-1] + 1)
            images[first:stop], labels[first:stop] = group_images[there], group_labels[there]
        return _Held(images, labels, np.searchsorted(indices, used))
