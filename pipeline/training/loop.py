"""The training loop: a generator that yields after each optimizer step.

All randomness is addressed by (seed, step, row of the global batch), so the state of a run is its
weights, its optimizer and one integer, and the number of workers changes only who computes what.

Shapes: b the rows of this rank, C channels, H×W pixels.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn

from pipeline.data.batches import Batch, Batches
from pipeline.data.images import to_unit
from pipeline.data.shards import NO_LABEL
from pipeline.diffusion.gaussian import q_sample
from pipeline.diffusion.losses import simple_loss
from pipeline.diffusion.parameterisation import network_input, target
from pipeline.diffusion.schedules import DiffusionConfig, Schedule
from pipeline.seeding import key, normal, uniform
from pipeline.training.ema import Ema


class TrainingConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """How the network is fitted. Steps are optimizer steps; the batch size is of all workers together."""

    steps: int = Field(ge=1)
    batch_size: int = Field(ge=1)
    lr: float = Field(gt=0, allow_inf_nan=False)
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


@dataclass
class TrainState:
    """All that survives an interruption. `step` counts finished optimizer steps."""

    network: nn.Module
    ema: Ema
    optimizer: torch.optim.Optimizer
    step: int = 0


@dataclass(frozen=True)
class StepRecord:
    """One finished step: its number from 1, this rank's mean loss on its device, the rate used."""

    step: int
    loss: Tensor
    lr: float


def make_state(network: nn.Module, config: TrainingConfig) -> TrainState:
    optimizer = torch.optim.AdamW(
        network.parameters(), lr=config.lr, weight_decay=config.weight_decay, foreach=True
    )
    return TrainState(network, Ema(network, config.ema_decay), optimizer)


def learning_rate(step: int, config: TrainingConfig) -> float:
    """The rate of step `step` (from 0): linear warm-up, then constant, or a half cosine to 0."""
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.lr
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))


@dataclass(frozen=True)
class Draws:
    """What is random about a rank's rows at one step."""

    t: Tensor
    """(b,) float64: uniform over the integers 0 .. T-1, or over the reals between them"""
    eps: Tensor
    """(b, C, H, W) float32, standard normal"""
    drop_label: Tensor
    """(b,) bool"""


def draw(
    seed: int,
    step: int,
    rows: range,
    shape: tuple[int, ...],
    timesteps: int,
    label_dropout: float,
    continuous: bool = False,
) -> Draws:
    """The draws of rows of global batch `step`, the same whichever rank asks for them."""
    u = torch.tensor(
        [uniform(key(seed, "timestep", step, row)) for row in rows], dtype=torch.float64
    )
    t = u * (timesteps - 1) if continuous else (u * timesteps).floor()
    drop = [uniform(key(seed, "label_dropout", step, row)) < label_dropout for row in rows]
    eps = normal([key(seed, "noise", step, row) for row in rows], shape)
    return Draws(t, eps, torch.tensor(drop))


def train(
    state: TrainState,
    forward: nn.Module,
    batches: Batches,
    diffusion: DiffusionConfig,
    schedule: Schedule,
    config: TrainingConfig,
    num_classes: int,
    seed: int,
    device: torch.device,
) -> Iterator[StepRecord]:
    """Train from state.step to config.steps; after each yield `state` is that of a finished step.

    Args:
        forward: what computes the network and reduces gradients over the ranks: state.network itself, or
            its DistributedDataParallel wrapping.
        num_classes: also the null label; 0 for an unconditional network.
    """
    parameters = list(state.network.parameters())
    autocast = torch.autocast(device.type, torch.bfloat16, config.precision == "bfloat16")
    while state.step < config.steps:
        step = state.step
        x_0, label, t, eps = _prepare(
            batches.at(step), step, schedule, config, num_classes, seed, device
        )
        alpha_bar = schedule.alpha_bar_at(t)
        image, time = network_input(diffusion, q_sample(x_0, eps, alpha_bar), t, alpha_bar)
        with autocast:
            output = forward(image, time.to(device, non_blocking=True), label)
        wanted = target(diffusion.prediction, x_0, eps, alpha_bar, diffusion.sigma_data)
        loss = simple_loss(wanted, output).mean()

        state.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(parameters, config.grad_clip)
        lr = learning_rate(step, config)
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        state.optimizer.step()
        state.ema.update(state.network, step)
        state.step += 1
        yield StepRecord(state.step, loss.detach(), lr)


def _prepare(
    batch: Batch,
    step: int,
    schedule: Schedule,
    config: TrainingConfig,
    num_classes: int,
    seed: int,
    device: torch.device,
) -> tuple[Tensor, Tensor | None, Tensor, Tensor]:
    """(x_0, label, t, eps) of a rank's rows; t stays on the CPU, with the schedule."""
    _b, H, W, C = batch.pixels.shape
    draws = draw(
        seed,
        step,
        batch.rows,
        (C, H, W),
        schedule.timesteps,
        config.label_dropout,
        continuous=schedule.sde is not None,
    )
    x_0 = to_unit(batch.pixels.to(device, non_blocking=True))
    label = None
    if num_classes:
        null = draws.drop_label | (batch.labels == NO_LABEL)
        label = batch.labels.masked_fill(null, num_classes).to(device, non_blocking=True)
    return x_0, label, draws.t, draws.eps.to(device, non_blocking=True)
