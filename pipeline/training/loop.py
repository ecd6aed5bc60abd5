"""The training loop: a generator that yields after each optimizer step.

All randomness is addressed by (seed, step, row of the global batch), so the state of a run is its
weights, its optimizer and one integer, and the number of workers changes only who computes what.

Shapes: b the rows of this rank, C channels, H×W pixels.
"""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from pipeline.data.augment import Augmentation
from pipeline.data.batches import Batch
from pipeline.data.images import to_unit
from pipeline.data.shards import NO_LABEL
from pipeline.diffusion.elbo import (
    bound_term,
    continuous_term,
    mean_and_fraction,
    prior_term,
    reconstruction_term,
)
from pipeline.diffusion.gaussian import like, q_sample
from pipeline.diffusion.losses import LossWeight, loss_weight, simple_loss
from pipeline.diffusion.parameterisation import eps_from, network_input, target, x_0_from
from pipeline.diffusion.schedules import DiffusionConfig, Schedule
from pipeline.networks.monotone import LearnedSchedule, ScheduledNetwork
from pipeline.seeding import key, normal
from pipeline.training import parallel
from pipeline.training.ema import Ema
from pipeline.training.timesteps import LossHistory, TimestepSampler, draw_timesteps

OWNERS = {
    "min_snr_gamma": ("loss_weight", "min_snr"),
    "p2_gamma": ("loss_weight", "p2"),
    "p2_k": ("loss_weight", "p2"),
    "sigmoid_bias": ("loss_weight", "sigmoid"),
    "log_normal_mean": ("timestep_sampler", "log_normal"),
    "log_normal_std": ("timestep_sampler", "log_normal"),
    "shuffle_window": ("shuffle", "windowed"),
    "shuffle_lanes": ("shuffle", "windowed"),
}
"""Settings that only one weight, sampler or order has."""


class TrainingConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """How the network is fitted.

    Steps are optimizer steps; the batch size is of all workers together.
    """

    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    lr: float = Field(gt=0, allow_inf_nan=False)
    objective: Literal["simple", "hybrid", "vlb"] = "simple"
    """simple: the error of the output. vlb: the variational bound. hybrid: simple, and the bound
    for the learned variance alone (Nichol & Dhariwal 2021, Eq. 16)."""
    loss_weight: LossWeight = "uniform"
    """How much a noise level counts, of simple and hybrid: see pipeline/diffusion/losses.py."""
    min_snr_gamma: float = Field(default=5.0, gt=0, allow_inf_nan=False)
    p2_gamma: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    p2_k: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    sigmoid_bias: float = Field(default=2.0, allow_inf_nan=False)
    timestep_sampler: TimestepSampler = "uniform"
    """Which timesteps are drawn: see pipeline/training/timesteps.py."""
    log_normal_mean: float = Field(default=-1.2, allow_inf_nan=False)
    log_normal_std: float = Field(default=1.2, gt=0, allow_inf_nan=False)
    """Of ln σ."""
    lr_schedule: Literal["constant", "cosine"] = "constant"
    warmup_steps: int = Field(default=0, ge=0)
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    grad_clip: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Largest norm of the gradient; larger ones are scaled down to it."""
    ema_decay: float = Field(default=0.9999, ge=0, lt=1)
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: autocast in the network; weights, EMA, noising and loss stay float32."""
    label_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of the rows trained with the null label, for classifier-free guidance."""
    shuffle: Literal["full", "windowed"] = "full"
    """full: any image may come next, so the decoded images must fit on a node's disk, and better in
    its memory. windowed: images are read by row group and shuffled within windows, so the data may
    have any size."""
    shuffle_window: int = Field(default=16384, ge=1)
    """Images, of all workers together, that a batch is drawn from; the workers together hold about
    twice as many."""
    shuffle_lanes: int = Field(default=8, ge=1)
    """At how many places of the data a batch is read at once. With as many workers or fewer, each
    reads its own part of the data."""
    horizontal_flip: float = Field(default=0.0, ge=0, le=1)
    """Probability that an image is shown left for right."""
    vertical_flip: float = Field(default=0.0, ge=0, le=1)
    """Probability that an image is shown top for bottom."""
    shift: int = Field(default=0, ge=0)
    """By how many pixels an image is moved along each axis at most; its edges are reflected."""
    log_every: int = Field(default=50, ge=1)
    checkpoint_every: int = Field(default=1000, ge=1)
    keep_checkpoints: int = Field(default=3, ge=1)
    """The last few stay, older ones are deleted."""

    @model_validator(mode="after")
    def _checkpoints_fall_on_log_steps(self) -> "TrainingConfig":
        # the logged loss is the mean since the last log: a resumed run must start a new mean
        if self.checkpoint_every % self.log_every:
            raise ValueError(
                f"checkpoint_every={self.checkpoint_every} must be a multiple of "
                f"log_every={self.log_every}"
            )
        return self

    @property
    def augmentation(self) -> Augmentation:
        return Augmentation(self.horizontal_flip, self.vertical_flip, self.shift)

    @model_validator(mode="after")
    def _a_window_holds_a_batch(self) -> "TrainingConfig":
        if self.shuffle == "windowed" and self.shuffle_window < self.batch_size:
            raise ValueError(
                f"shuffle_window={self.shuffle_window} must be at least "
                f"batch_size={self.batch_size}, and better many times as large"
            )
        return self

    @model_validator(mode="after")
    def _settings_have_an_owner(self) -> "TrainingConfig":
        for name, (of, owner) in OWNERS.items():
            value = getattr(self, name)
            if value != type(self).model_fields[name].default and getattr(self, of) != owner:
                raise ValueError(
                    f"{name}={value} has no meaning for {of}={getattr(self, of)}: drop it, or use "
                    f"{of}={owner}"
                )
        return self

    @model_validator(mode="after")
    def _the_bound_is_not_weighted(self) -> "TrainingConfig":
        if self.objective == "vlb" and self.loss_weight != "uniform":
            raise ValueError(
                f"loss_weight={self.loss_weight} with objective=vlb would no longer be the bound, "
                "which has its own weights: drop loss_weight, or use objective=simple"
            )
        if self.objective != "simple" and self.timestep_sampler == "log_normal":
            raise ValueError(
                f"timestep_sampler=log_normal with objective={self.objective} would no longer be "
                "the bound, a mean over even timesteps: use uniform, stratified or "
                "loss_second_moment"
            )
        return self


def check_objective(diffusion: DiffusionConfig, training: TrainingConfig) -> None:
    """Raise ValueError where a process cannot be trained as `training` says."""
    learned = diffusion.schedule == "learned"
    if learned and training.objective != "vlb":
        raise ValueError(
            f"training.objective={training.objective} cannot learn a schedule: with "
            "diffusion.schedule=learned use training.objective=vlb"
        )
    if learned and diffusion.prediction not in ("eps", "v"):
        raise ValueError(
            f"diffusion.prediction={diffusion.prediction} cannot learn a schedule, whose bound is "
            "on the error of ε: with diffusion.schedule=learned use prediction=eps or v"
        )
    no_table = learned or diffusion.is_continuous
    if diffusion.variance == "learned_range":
        if no_table:
            raise ValueError(
                f"diffusion.variance=learned_range with schedule={diffusion.schedule} has no "
                "timesteps to be learned at: use fixed_small, or a discrete schedule such as cosine"
            )
        if training.objective == "simple":
            raise ValueError(
                "diffusion.variance=learned_range with training.objective=simple would leave the "
                "variance untrained: use training.objective=hybrid or vlb"
            )
    elif training.objective == "hybrid":
        raise ValueError(
            f"training.objective=hybrid with diffusion.variance={diffusion.variance} has no "
            "variance to learn: use objective=simple"
            + ("" if no_table else ", or variance=learned_range")
        )
    if training.objective == "vlb" and diffusion.is_continuous:
        raise ValueError(
            f"training.objective=vlb is of discrete timesteps, diffusion.schedule="
            f"{diffusion.schedule} is continuous: objective=simple with loss_weight=likelihood is "
            "its bound"
        )
    if training.timestep_sampler == "loss_second_moment" and no_table:
        raise ValueError(
            "training.timestep_sampler=loss_second_moment keeps the losses of each timestep, and "
            f"diffusion.schedule={diffusion.schedule} has none in training: use uniform or "
            "stratified"
        )


@dataclass
class TrainState:
    """All that survives an interruption. `step` counts finished optimizer steps."""

    network: nn.Module
    ema: Ema
    optimizer: torch.optim.Optimizer
    losses: LossHistory | None = None
    """What `timestep_sampler: loss_second_moment` draws by."""
    step: int = 0


@dataclass(frozen=True)
class StepRecord:
    """One finished step."""

    step: int
    """From 1."""
    loss: Tensor
    """This rank's mean, on its device."""
    lr: float
    waited: float
    """Seconds until there was a batch."""


def make_state(network: nn.Module, config: TrainingConfig, timesteps: int) -> TrainState:
    """The state before the first step, for a process of T = `timesteps`."""
    groups: list[dict[str, Any]] = [{"params": network.parameters()}]
    if isinstance(network, ScheduledNetwork):  # decay would pull its ends to an SNR of 1
        groups = [
            {"params": network.network.parameters()},
            {"params": network.schedule.parameters(), "weight_decay": 0.0},
        ]
    optimizer = torch.optim.AdamW(
        groups, lr=config.lr, weight_decay=config.weight_decay, foreach=True
    )
    by_losses = config.timestep_sampler == "loss_second_moment"
    losses = LossHistory(timesteps) if by_losses else None
    return TrainState(network, Ema(network, config.ema_decay), optimizer, losses)


def learning_rate(step: int, config: TrainingConfig) -> float:
    """The rate of step `step` (from 0): linear warm-up, then constant, or a half cosine to 0."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))


def train(
    state: TrainState,
    forward: nn.Module,
    batches: Iterator[Batch],
    diffusion: DiffusionConfig,
    schedule: Schedule | None,
    config: TrainingConfig,
    num_classes: int,
    seed: int,
    device: torch.device,
) -> Iterator[StepRecord]:
    """Train from state.step to config.steps; after each yield `state` is that of a finished step.

    Args:
        batches: this rank's, from step state.step on.
        forward: what computes the network and reduces gradients over the ranks: state.network
            itself, or its DistributedDataParallel wrapping.
        schedule: None if it is learned, beside the network.
        num_classes: also the null label; 0 for an unconditional network.
    """
    autocast = torch.autocast(device.type, torch.bfloat16, config.precision == "bfloat16")

    def network(image: Tensor, time: Tensor, label: Tensor | None) -> Tensor:
        with autocast:
            out: Tensor = forward(image, time.to(device, non_blocking=True), label)
        return out

    while state.step < config.steps:
        step = state.step
        began = time.monotonic()
        batch = next(batches)
        waited = time.monotonic() - began
        assert batch.step == step
        t, weight = draw_timesteps(
            config.timestep_sampler,
            seed,
            step,
            batch.rows,
            config.batch_size,
            diffusion.timesteps,
            schedule,
            state.losses,
            (config.log_normal_mean, config.log_normal_std),
        )
        rows = _rows(batch, t, num_classes, seed, device)
        if isinstance(state.network, ScheduledNetwork):
            losses = learned_schedule_loss(network, rows, diffusion, state.network.schedule)
        else:
            assert schedule is not None
            losses = loss(network, rows, diffusion, schedule, config)
        if state.losses is not None:
            seen = torch.stack([t.to(device), losses.detach().double()], dim=1)
            state.losses.update(*parallel.all_rows(seen).cpu().unbind(1))
        mean = (like(weight, losses) * losses).mean()

        state.optimizer.zero_grad(set_to_none=True)
        mean.backward()  # type: ignore[no-untyped-call]
        lr = learning_rate(step, config)
        for group in state.optimizer.param_groups:
            nn.utils.clip_grad_norm_(group["params"], config.grad_clip)
            group["lr"] = lr
        state.optimizer.step()
        state.ema.update(state.network, step)
        state.step += 1
        yield StepRecord(state.step, mean.detach(), lr, waited)


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


def _rows(batch: Batch, t: Tensor, num_classes: int, seed: int, device: torch.device) -> Rows:
    _b, H, W, C = batch.pixels.shape
    eps = draw_noise(seed, batch.step, batch.rows, (C, H, W))
    x_0 = to_unit(batch.pixels.to(device, non_blocking=True))
    label = None
    if num_classes:
        null = batch.drop_label | (batch.labels == NO_LABEL)
        label = batch.labels.masked_fill(null, num_classes).to(device, non_blocking=True)
    return Rows(x_0, eps.to(device, non_blocking=True), t, label)


def draw_noise(seed: int, step: int, rows: range, shape: tuple[int, ...]) -> Tensor:
    """The noise (b, *shape) of rows of global batch `step`; the same whichever rank asks for it."""
    return normal([key(seed, "noise", step, row) for row in rows], shape)


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
    psi, psi_slope = learned.progress(rows.t.to(x_0.device) / (diffusion.timesteps - 1))
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
