"""Figures of merit of a diffusion model."""

import math
from typing import Annotated, NamedTuple

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from pipeline.data.images import to_unit
from pipeline.data.shards import NO_LABEL, ImageSet
from pipeline.diffusion.gaussian import q_sample
from pipeline.diffusion.losses import simple_loss
from pipeline.diffusion.parameterisation import target
from pipeline.evaluation.estimate import Estimate, mean_of
from pipeline.evaluation.extractor_files import ExtractorConfig
from pipeline.evaluation.likelihood import Trace
from pipeline.samplers.model import Model
from pipeline.samplers.plan import SamplerName, SamplingConfig
from pipeline.seeding import key, normal

MOST_HELD_OUT = 4096
"""Held-out images that the loss is measured of."""


class OverStepsConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """Samplers that are compared by what they make of few steps."""

    samplers: Annotated[tuple[SamplerName, ...], Field(strict=False)]
    steps: Annotated[tuple[int, ...], Field(strict=False)]
    samples: int = Field(default=500, ge=2)
    """Images drawn by each sampler with each number of steps."""

    @model_validator(mode="after")
    def _has_a_point(self) -> "OverStepsConfig":
        if not self.samplers or not self.steps:
            raise ValueError("name at least one of samplers and one of steps")
        return self

    def at(self, sampling: SamplingConfig, sampler: SamplerName, steps: int) -> SamplingConfig:
        """The settings of `sampling` with another sampler and number of steps."""
        values = sampling.model_dump() | {"sampler": sampler, "steps": steps}
        return SamplingConfig.model_validate(values)


class EvaluationConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """How a trained model is measured."""

    samples: int = Field(default=500, ge=1)
    """Images drawn, their labels going round the classes."""
    sigma_rel: float | None = None
    """Of training.ema.kind=power: the width of the average that is measured and registered, any
    that its snapshots can make; by default the first of training.ema.sigma_rel."""
    classifier_epochs: int = Field(default=30, ge=1)
    """Passes over the training images for the classifier that judges the samples."""
    extractor: ExtractorConfig | None = None
    """Of the features that figures compare; by default the classifier."""
    during_training: int = Field(default=0, ge=0)
    """Images drawn of each checkpoint whose figures are logged while training goes on; 0 for none.
    They have the number in their names, since some figures depend on it."""
    over_steps: OverStepsConfig | None = None
    """Draws a curve of quality over evaluations of the network, a point for each of its pairs."""
    elbo_images: int = Field(default=0, ge=0)
    """Held-out images whose variational bound is computed, all timesteps of it; 0 for none."""
    ode_images: int = Field(default=0, ge=0)
    """Held-out images whose likelihood is computed by the probability-flow ODE; 0 for none."""
    ode_trace: Trace = "hutchinson"
    """Of the ODE's divergence: an unbiased estimate, or exact at the cost of all dimensions."""
    ode_draws: int = Field(default=1, ge=1, le=100)
    """Likelihoods of each image, each with its own dequantisation and estimate of the trace."""


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


def holdout_loss(model: Model, images: ImageSet, seed: int, batch: int = 64) -> HoldoutLoss:
    """L_simple of held-out images with fixed noise and evenly spread timesteps.

    It is the loss in the model's own parameterisation, whatever it was weighted by in training.
    """
    n = len(images)
    t = (
        torch.arange(n) * model.schedule.timesteps // n
    )  # stratified: every noise level has its part
    losses = []
    for start in range(0, n, batch):
        rows = slice(start, min(start + batch, n))
        x_0 = to_unit(torch.from_numpy(images.images[rows]))
        labels = torch.from_numpy(images.labels[rows])
        keys = [key(seed, "holdout_loss", i) for i in range(rows.start, rows.stop)]
        eps = normal(keys, tuple(x_0.shape[1:]))
        alpha_bar = model.schedule.alpha_bar[t[rows]]
        x_t = q_sample(x_0, eps, alpha_bar)
        null = labels.masked_fill(labels == NO_LABEL, model.spec.num_classes)
        output, _ = model.output(x_t, t[rows], alpha_bar, null)
        config = model.spec.diffusion
        wanted = target(config.prediction, x_0, eps, alpha_bar, config.sigma_data)
        losses.append(simple_loss(wanted, output))
    return HoldoutLoss(t, torch.cat(losses).double() if n else torch.empty(0).double())
