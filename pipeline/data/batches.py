"""A rank's view of the batches: pixels and labels of a step.

Which images these are is the business of pipeline/data/order.py. All that is drawn belongs to
(seed, step, row of the global batch), so the number of workers has no part in it.
"""

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from pipeline.data.augment import UNCHANGED, Augmentation, augment
from pipeline.data.order import global_batch, share
from pipeline.seeding import key, uniform


class Shuffle(Protocol):
    """Images in an order."""

    seed: int
    batch_size: int

    def read(self, step: int, rows: range) -> tuple[np.ndarray, np.ndarray]:
        """The images (b, H, W, C) uint8 and labels (b,) int64 of `rows` of global batch `step`."""

    def indices(self, step: int) -> np.ndarray:
        """Which images of the split are in global batch `step`: (B,) int64."""

    def close(self) -> None:
        """Let go of what is held."""


@dataclass
class FullShuffle:
    """Images (n, H, W, C) uint8 and labels (n,) int64 that can be read anywhere at once."""

    images: np.ndarray
    labels: np.ndarray
    seed: int
    batch_size: int

    def read(self, step: int, rows: range) -> tuple[np.ndarray, np.ndarray]:
        mine = self.indices(step)[rows.start : rows.stop]
        return self.images[mine], self.labels[mine]

    def indices(self, step: int) -> np.ndarray:
        return global_batch(self.seed, step, self.batch_size, len(self.images))

    def close(self) -> None:
        """Nothing is held but the arrays."""


@dataclass(frozen=True)
class Batch:
    """A rank's share of a global batch: b rows."""

    step: int
    rows: range
    """Which rows of the global batch these are; noise and timesteps are addressed by them."""
    pixels: Tensor
    """(b, H, W, C) uint8"""
    labels: Tensor
    """(b,) int64, NO_LABEL where there is none"""
    drop_label: Tensor
    """(b,) bool: trained without its label, for classifier-free guidance."""


@dataclass(frozen=True)
class Batches:
    """Rank `rank` of `world_size`'s view of the batches of a set of images."""

    shuffle: Shuffle
    rank: int = 0
    world_size: int = 1
    label_dropout: float = 0.0
    augmentation: Augmentation = UNCHANGED

    def at(self, step: int) -> Batch:
        """The batch of any step, from 0."""
        seed, batch_size = self.shuffle.seed, self.shuffle.batch_size
        rows = share(self.rank, self.world_size, batch_size)
        images, labels = self.shuffle.read(step, rows)
        images = augment(images, self.augmentation, seed, step, batch_size, rows)
        drop_label = drop_labels(seed, step, rows, self.label_dropout)
        return Batch(step, rows, torch.from_numpy(images), torch.from_numpy(labels), drop_label)


def drop_labels(seed: int, step: int, rows: range, label_dropout: float) -> Tensor:
    """Which of these rows are trained without their label: (b,) bool."""
    if not label_dropout:
        return torch.zeros(len(rows), dtype=torch.bool)
    draws = [uniform(key(seed, "label_dropout", step, row)) for row in rows]
    return torch.tensor(draws, dtype=torch.float64) < label_dropout
