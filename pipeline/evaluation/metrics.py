"""Figures of merit of a diffusion model."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.data.images import to_unit
from pipeline.data.shards import NO_LABEL, ImageSet
from pipeline.device import CPU, send
from pipeline.diffusion.gaussian import q_sample
from pipeline.diffusion.losses import simple_loss
from pipeline.diffusion.parameterisation import target
from pipeline.evaluation.estimate import Estimate, mean_of
from pipeline.samplers.model import Model
from pipeline.seeding import key, normal

MOST_HELD_OUT = 4096
"""Held-out images that the loss is measured of."""


class HoldoutLoss(NamedTuple):
    """L_simple of held-out images, with one timestep each."""

    t: Tensor
    """(N,) int64, rising"""
    loss: Tensor
    """(N,) float64"""

    def estimate(self) -> Estimate:
        """The mean; NaN for an empty set."""
        return mean_of(self.loss)

    def curve(self) -> dict[str, list[float]]:
        """The mean of each twentieth of the timesteps, the error of it, and the middle t."""
        parts = [part for part in torch.tensor_split(torch.arange(len(self.t)), 20) if len(part)]
        means = [mean_of(self.loss[part]) for part in parts]
        return {
            "t": [float(self.t[part].double().mean()) for part in parts],
            "loss": [mean.value for mean in means],
            "error": [mean.error if math.isfinite(mean.error) else 0.0 for mean in means],
        }


def holdout_loss(
    model: Model, images: ImageSet, seed: int, device: torch.device = CPU, batch: int = 64
) -> HoldoutLoss:
    """L_simple of held-out images with fixed noise and evenly spread timesteps.

    It is the loss in the model's own parameterisation, whatever it was weighted by in training.
    """
    model.network.to(device)
    n = len(images)
    t = (
        torch.arange(n) * model.schedule.timesteps // n
    )  # stratified: every noise level has its part
    losses = []
    for start in range(0, n, batch):
        rows = slice(start, min(start + batch, n))
        x_0 = to_unit(send(torch.from_numpy(images.images[rows]), device))
        labels = torch.from_numpy(images.labels[rows])
        keys = [key(seed, "holdout_loss", i) for i in range(rows.start, rows.stop)]
        eps = send(normal(keys, tuple(x_0.shape[1:])), device)
        alpha_bar = model.schedule.alpha_bar[t[rows]]
        x_t = q_sample(x_0, eps, alpha_bar)
        null = labels.masked_fill(labels == NO_LABEL, model.spec.num_classes)
        output, _ = model.output(x_t, t[rows], alpha_bar, null)
        config = model.spec.diffusion
        wanted = target(config.prediction, x_0, eps, alpha_bar, config.sigma_data)
        losses.append(simple_loss(wanted, output))
    return HoldoutLoss(t, torch.cat(losses).double().cpu() if n else torch.empty(0).double())
