"""What a rank trains on in a step, made ahead of the training loop: images, and noise for them.

Only the timesteps are not drawn ahead, since they may depend on the losses of the step before.
"""

from collections.abc import Generator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from pipeline.data.batches import Batch, Batches
from pipeline.data.prefetch import prefetch
from pipeline.data.shards import NO_LABEL
from pipeline.device import is_apart
from pipeline.seeding import key, normal


@dataclass(frozen=True)
class StepInputs:
    """A rank's b rows of a global batch; C channels, H×W pixels."""

    step: int
    rows: range
    """Which rows of the global batch these are; all that is drawn is addressed by them."""
    pixels: Tensor
    """(b, H, W, C) uint8"""
    label: Tensor | None
    """(b,) int64, the null label where it is dropped or there is none; None without classes"""
    eps: Tensor
    """(b, C, H, W) float32, standard normal"""
    dropout: Tensor
    """(b,) int64, what the dropout masks of the rows follow from"""

    def pinned(self) -> "StepInputs":
        """The same in memory from which a device copies while it computes."""
        label = None if self.label is None else self.label.pin_memory()
        pixels, eps, dropout = (t.pin_memory() for t in (self.pixels, self.eps, self.dropout))
        return StepInputs(self.step, self.rows, pixels, label, eps, dropout)


def step_inputs(
    batches: Batches, num_classes: int, start: int, stop: int, device: torch.device
) -> Generator[StepInputs, None, None]:
    """Those of steps start .. stop - 1, made ahead by a thread; close it when done.

    Args:
        num_classes: also the null label; 0 for an unconditional network.
    """

    def make(step: int) -> StepInputs:
        made = draw_inputs(batches.at(step), num_classes, batches.shuffle.seed)
        return made.pinned() if is_apart(device) else made

    return prefetch(make, range(start, stop))


def draw_inputs(batch: Batch, num_classes: int, seed: int) -> StepInputs:
    """A batch with its noise and the keys of its dropout."""
    _b, H, W, C = batch.pixels.shape
    label = None
    if num_classes:
        null = batch.drop_label | (batch.labels == NO_LABEL)
        label = batch.labels.masked_fill(null, num_classes)
    eps = draw_noise(seed, batch.step, batch.rows, (C, H, W))
    dropout = draw_dropout_keys(seed, batch.step, batch.rows)
    return StepInputs(batch.step, batch.rows, batch.pixels, label, eps, dropout)


def draw_noise(seed: int, step: int, rows: range, shape: tuple[int, ...]) -> Tensor:
    """The noise (b, *shape) of rows of global batch `step`; the same whichever rank asks for it."""
    return normal([key(seed, "noise", step, row) for row in rows], shape)


def draw_dropout_keys(seed: int, step: int, rows: range) -> Tensor:
    """What the dropout masks of rows of global batch `step` follow from: (b,) int64."""
    keys = np.array([key(seed, "dropout", step, row) for row in rows], np.uint64)
    return torch.from_numpy(keys.view(np.int64))
