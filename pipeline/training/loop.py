"""The training loop: a generator that yields after each optimizer step.

All randomness is addressed by (seed, step, row of the global batch), so the state of a run is its
weights, its optimizer and one integer, and the number of workers changes only who computes what.

Shapes: b the rows of this rank, C channels, H×W pixels.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from pipeline.data.batches import Batch
from pipeline.data.images import to_unit
from pipeline.data.shards import NO_LABEL
from pipeline.diffusion.gaussian import like
from pipeline.diffusion.schedules import DiffusionConfig, Schedule
from pipeline.networks.backbone import dropout_keys
from pipeline.networks.monotone import ScheduledNetwork
from pipeline.seeding import key, normal
from pipeline.training import parallel
from pipeline.training.config import HALF, TrainingConfig
from pipeline.training.ema import Ema
from pipeline.training.objective import Rows, learned_schedule_loss, loss
from pipeline.training.optimizer import LossScale, learning_rate, make_optimizer
from pipeline.training.timesteps import LossHistory, draw_timesteps

QUARTILES = 4


@dataclass
class TrainState:
    """All that survives an interruption. `step` counts finished optimizer steps."""

    network: nn.Module
    ema: Ema
    optimizer: torch.optim.Optimizer
    loss_scale: LossScale
    losses: LossHistory | None = None
    """What `timestep_sampler: loss_second_moment` draws by."""
    step: int = 0


@dataclass(frozen=True)
class StepRecord:
    """One finished step; its tensors are on the rank's device, so that nothing waits for it."""

    step: int
    """From 1."""
    loss: Tensor
    """This rank's mean."""
    grad_norm: Tensor
    """Of the mean over all ranks, before it is clipped."""
    quartile_losses: Tensor
    """(4, 2): the sum of this rank's losses, unweighted by how often their timesteps are drawn, and
    their number, by quarter of the timesteps, the least noise first."""
    lr: float
    waited: float
    """Seconds until there was a batch."""


def make_state(network: nn.Module, config: TrainingConfig, timesteps: int) -> TrainState:
    """The state before the first step, for a process of T = `timesteps`."""
    device = next(network.parameters()).device
    # before it is wrapped, which takes the layout as it is; slices have none of their own
    if config.channels_last and not any(map(parallel.is_sliced, network.parameters())):
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    by_losses = config.timestep_sampler == "loss_second_moment"
    return TrainState(
        network,
        Ema(network, config.ema, config.batch_size),
        make_optimizer(network, config),
        LossScale(device, config.precision == "float16"),
        LossHistory(timesteps) if by_losses else None,
    )


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
        forward: what computes the network and reduces gradients over the ranks, see
            `parallel.wrap`.
        schedule: None if it is learned, beside the network.
        num_classes: also the null label; 0 for an unconditional network.

    Raises:
        TrainingDiverged: gradients in float16 overflow whatever the scale of the loss.
    """
    half = HALF.get(config.precision)
    autocast = torch.autocast(device.type, half, half is not None)

    layout = torch.channels_last if config.channels_last else torch.contiguous_format

    def network(image: Tensor, time: Tensor, label: Tensor | None) -> Tensor:
        image = image.contiguous(memory_format=layout)
        with autocast:
            out: Tensor = forward(image, time.to(device, non_blocking=True), label)
        return out

    def row_losses(rows: Rows) -> Tensor:
        if isinstance(state.network, ScheduledNetwork):
            return learned_schedule_loss(network, rows, diffusion, state.network.schedule)
        assert schedule is not None
        return loss(network, rows, diffusion, schedule, config)

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
        state.optimizer.zero_grad(set_to_none=True)
        rows = _rows(batch, t, num_classes, seed, device)
        parts = rows.parts(config.accumulate)
        found = []
        for i, part in enumerate(parts):
            here = slice(i * len(part.t), (i + 1) * len(part.t))
            keys = _dropout_keys(seed, step, batch.rows[here]).to(device, non_blocking=True)
            with (
                parallel.reducing(forward, i == len(parts) - 1),
                dropout_keys(state.network, keys),
            ):
                losses = row_losses(part)
                mean = (like(weight[here], losses) * losses).mean()
                state.loss_scale.backward(mean / len(parts))
            found.append((losses.detach(), mean.detach()))
        losses = torch.cat([of for of, _ in found])
        if state.losses is not None:
            seen = torch.stack([t.to(device), losses.double()], dim=1)
            state.losses.update(*parallel.all_rows(seen).cpu().unbind(1))

        state.loss_scale.scaler.unscale_(state.optimizer)
        lr = learning_rate(step, config)
        norms = []
        for group in state.optimizer.param_groups:
            norm = nn.utils.clip_grad_norm_(group["params"], config.grad_clip)
            norms.append(parallel.whole(norm))
            group["lr"] = lr
        state.loss_scale.step(state.optimizer)
        state.ema.update(state.network, step)
        state.step += 1
        yield StepRecord(
            step=state.step,
            loss=torch.stack([mean for _, mean in found]).mean(),
            grad_norm=torch.stack(norms).norm(),
            quartile_losses=_by_quartile(losses, t / diffusion.timesteps),
            lr=lr,
            waited=waited,
        )


def _rows(batch: Batch, t: Tensor, num_classes: int, seed: int, device: torch.device) -> Rows:
    _b, H, W, C = batch.pixels.shape
    eps = draw_noise(seed, batch.step, batch.rows, (C, H, W))
    x_0 = to_unit(batch.pixels.to(device, non_blocking=True))
    label = None
    if num_classes:
        null = batch.drop_label | (batch.labels == NO_LABEL)
        label = batch.labels.masked_fill(null, num_classes).to(device, non_blocking=True)
    return Rows(x_0, eps.to(device, non_blocking=True), t, label)


def _by_quartile(losses: Tensor, share: Tensor) -> Tensor:
    """(4, 2) sums and numbers of the losses (b,), by the share t/T (b,) of their timesteps."""
    quartile = (QUARTILES * share).long().clamp(max=QUARTILES - 1)
    member = nn.functional.one_hot(quartile, QUARTILES).to(losses.device, losses.dtype)  # (b, 4)
    return torch.stack([losses @ member, member.sum(0)], dim=1)


def _dropout_keys(seed: int, step: int, rows: range) -> Tensor:
    """What the dropout masks of rows of global batch `step` follow from: (b,) int64."""
    keys = np.array([key(seed, "dropout", step, row) for row in rows], np.uint64)
    return torch.from_numpy(keys.view(np.int64))


def draw_noise(seed: int, step: int, rows: range, shape: tuple[int, ...]) -> Tensor:
    """The noise (b, *shape) of rows of global batch `step`; the same whichever rank asks for it."""
    return normal([key(seed, "noise", step, row) for row in rows], shape)
