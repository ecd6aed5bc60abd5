"""The loss of each row of a batch, under the objective of the config.

Shapes: b the rows of this rank, C channels, H×W pixels.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.device import send
from pipeline.diffusion.config import DiffusionConfig
from pipeline.diffusion.elbo import (
    bound_term,
    continuous_term,
    mean_and_fraction,
    prior_term,
    reconstruction_term,
)
from pipeline.diffusion.gaussian import like, q_sample
from pipeline.diffusion.losses import loss_weight, simple_loss
from pipeline.diffusion.parameterisation import eps_from, network_input, target, x_0_from
from pipeline.diffusion.schedules import Schedule
from pipeline.networks.monotone import LearnedSchedule
from pipeline.training.config import TrainingConfig


@dataclass(frozen=True)
class Rows:
    """A rank's rows of one step, on its device."""

    x_0: Tensor
    """(b, C, H, W) float32 in [-1, 1]"""
    eps: Tensor
    """(b, C, H, W) float32, standard normal"""
    t: Tensor
    """(b,) float64; on the CPU, with the schedule"""
    label: Tensor | None
    """(b,) int64"""

    def parts(self, num_parts: int) -> "list[Rows]":
        """So many, which differ by at most one row."""
        if num_parts == 1:
            return [self]
        labels = [None] * num_parts if self.label is None else self.label.tensor_split(num_parts)
        of_all = (tensor.tensor_split(num_parts) for tensor in (self.x_0, self.eps, self.t))
        return [Rows(*part) for part in zip(*of_all, labels, strict=True)]


Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""(image, time, label) -> output"""


def loss(
    network: Network,
    rows: Rows,
    diffusion: DiffusionConfig,
    schedule: Schedule,
    config: TrainingConfig,
) -> Tensor:
    """The loss of each row under `config.objective`: (b,) float32."""
    x_0, eps, t = rows.x_0, rows.eps, rows.t
    kind, sigma_data = diffusion.prediction, diffusion.sigma_data
    alpha_bar = schedule.alpha_bar_at(t)
    x_t = q_sample(x_0, eps, alpha_bar)
    image, time = network_input(diffusion, x_t, t, alpha_bar)
    output, fraction = network(image, time, rows.label), None
    if diffusion.variance == "learned_range":
        output, fraction = mean_and_fraction(output)

    def bound(output: Tensor) -> Tensor:
        """L_t in bits per dimension."""
        x_0_hat = x_0_from(kind, output, x_t, alpha_bar, sigma_data)
        return bound_term(schedule, diffusion.variance, t, x_0, x_0_hat, fraction)

    if config.objective == "vlb":
        return schedule.timesteps * bound(output)
    error = simple_loss(target(kind, x_0, eps, alpha_bar, sigma_data), output)
    weight = loss_weight(
        config.loss_weight,
        kind,
        schedule,
        t,
        sigma_data,
        config.min_snr_gamma,
        config.p2_gamma,
        config.p2_k,
        config.sigmoid_bias,
    )
    error = like(weight, error) * error
    if config.objective == "simple":
        return error
    # of the bound, only the variance learns: it would outweigh the error of the mean
    return error + schedule.timesteps / 1000 * bound(output.detach())


def learned_schedule_loss(
    network: Network, rows: Rows, diffusion: DiffusionConfig, learned: LearnedSchedule
) -> Tensor:
    """The bound in continuous time, in bits per dimension, at the learned schedule: (b,) float32.

    Its mean depends on the schedule by its ends alone. What lies between is free, and learns to
    make the variance of the estimate small: since the mean is constant, that is E[L²], with the
    gradient 2 L dL (Kingma et al. 2021).
    """
    x_0, eps = rows.x_0, rows.eps
    psi, psi_slope = learned.progress(send(rows.t, x_0.device) / (diffusion.timesteps - 1))
    gamma, gamma_slope = learned.gamma(psi, psi_slope)
    alpha_bar = torch.sigmoid(-gamma)
    x_t = q_sample(x_0, eps, alpha_bar)
    image, time = network_input(diffusion, x_t, rows.t, alpha_bar)
    output = network(image, time, rows.label)
    eps_hat = eps_from(diffusion.prediction, output, x_t, alpha_bar)
    bound = continuous_term(gamma_slope, eps, eps_hat)

    double = 2 * bound.detach()  # a hook that held the graph itself would never be freed
    for tensor in (psi, psi_slope):
        tensor.register_hook(lambda gradient: double * gradient)  # type: ignore[no-untyped-call]
    prior = prior_term(x_0, torch.sigmoid(-learned.gamma_1.double()))
    return bound + prior + reconstruction_term(x_0, eps, -learned.gamma_0.double())
