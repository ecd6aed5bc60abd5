"""Figures of merit of a diffusion model."""

import math

import numpy as np
import torch
from pydantic import BaseModel, Field

from pipeline.data.images import to_unit
from pipeline.data.shards import NO_LABEL, ImageSet
from pipeline.diffusion.gaussian import q_sample
from pipeline.diffusion.losses import simple_loss
from pipeline.diffusion.parameterisation import target
from pipeline.evaluation.features import TrainedClassifier, predict
from pipeline.evaluation.likelihood import Trace
from pipeline.samplers.model import Model
from pipeline.seeding import key, normal


class EvaluationConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """How a trained model is measured."""

    samples: int = Field(default=500, ge=1)
    """Images drawn, their labels going round the classes."""
    classifier_epochs: int = Field(default=30, ge=1)
    """Passes over the training images for the classifier that judges the samples."""
    elbo_images: int = Field(default=0, ge=0)
    """Held-out images whose variational bound is computed, all timesteps of it; 0 for none."""
    ode_images: int = Field(default=0, ge=0)
    """Held-out images whose likelihood is computed by the probability-flow ODE; 0 for none."""
    ode_trace: Trace = "hutchinson"
    """Of the ODE's divergence: an unbiased estimate, or exact at the cost of all dimensions."""
    ode_draws: int = Field(default=1, ge=1, le=100)
    """Likelihoods of each image, each with its own dequantisation and estimate of the trace."""


def class_accuracy(
    classifier: TrainedClassifier, pixels: np.ndarray, labels: np.ndarray
) -> tuple[float, float, np.ndarray]:
    """The share of (N, H, W, C) uint8 samples that the classifier takes for their class.

    Returns:
        the share, its standard error √(p(1-p)/N), and the predicted classes (N,).
    """
    predicted = predict(classifier.network, to_unit(torch.from_numpy(pixels))).numpy()
    p = float((predicted == labels).mean())
    return p, math.sqrt(p * (1 - p) / len(labels)), predicted


def holdout_loss(model: Model, images: ImageSet, seed: int, batch: int = 64) -> tuple[float, float]:
    """L_simple of held-out images with fixed noise and evenly spread timesteps.

    It is the loss in the model's own parameterisation, whatever it was weighted by in training.

    Returns:
        the mean over the images and its standard error; NaN for an empty set.
    """
    n = len(images)
    if not n:
        return math.nan, math.nan
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
    loss = torch.cat(losses).double()
    return float(loss.mean()), float(loss.std() / math.sqrt(n)) if n > 1 else math.nan
