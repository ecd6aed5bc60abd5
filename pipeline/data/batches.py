"""The order in which training sees the images: a pure function of (seed, step).

The epochs' permutations stand one after another as an endless list of positions, of which global
batch s is the positions s·B .. (s+1)·B - 1. So every image comes once an epoch, the tail of an
epoch is not dropped, any step is reached without replaying the ones before it, and the number of
workers has no part in it: rank r of W takes the r-th of W equal slices of each global batch.
"""

import functools
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.data.shards import ImageSet
from pipeline.seeding import key, permutation


@functools.lru_cache(maxsize=2)  # a batch may straddle two epochs
def _epoch_order(seed: int, epoch: int, n: int) -> np.ndarray:
    return permutation(key(seed, "order", epoch), n)


def global_batch(seed: int, step: int, batch_size: int, n: int) -> np.ndarray:
    """The indices of the images of global batch `step` (from 0) over a set of n: (batch_size,)."""
    position = step * batch_size + np.arange(batch_size)
    epoch, offset = np.divmod(position, n)
    orders = {e: _epoch_order(seed, int(e), n) for e in np.unique(epoch)}
    return np.array([orders[e][o] for e, o in zip(epoch, offset, strict=True)])


@dataclass(frozen=True)
class Batch:
    """A rank's share of a global batch of b = B/W rows."""

    pixels: Tensor
    """(b, H, W, C) uint8"""
    labels: Tensor
    """(b,) int64, NO_LABEL where there is none"""
    rows: range
    """Which rows of the global batch these are; noise and timesteps are addressed by them."""


@dataclass(frozen=True)
class Batches:
    """Rank `rank` of `world_size`'s view of the batches of an image set."""

    images: ImageSet
    batch_size: int
    seed: int
    rank: int = 0
    world_size: int = 1

    def __post_init__(self) -> None:
        if self.batch_size % self.world_size:
            raise ValueError(
                f"training.batch_size={self.batch_size} must be a multiple of "
                f"cluster.workers={self.world_size}, so that every worker has the same share"
            )

    def at(self, step: int) -> Batch:
        share = self.batch_size // self.world_size
        rows = range(self.rank * share, (self.rank + 1) * share)
        indices = global_batch(self.seed, step, self.batch_size, len(self.images))
        mine = indices[rows.start : rows.stop]
        return Batch(
            torch.from_numpy(self.images.images[mine]),
            torch.from_numpy(self.images.labels[mine]),
            rows,
        )
