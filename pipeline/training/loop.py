"""The training loop: a generator that yields after each optimizer step.

All randomness is addressed by (seed, step, row of the global batch), so the state of a run is its
weights, its optimizer and one integer, and the number of workers changes only who computes what.

Shapes: b the rows of this rank, C channels, H×W pixels.
"""

import time
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from pipeline.data.images import to_unit
from pipeline.device import Fetched, is_apart
from pipeline.diffusion.config import DiffusionConfig
from pipeline.diffusion.gaussian import like
from pipeline.diffusion.schedules import Schedule
from pipeline.networks.backbone import dropout_keys
from pipeline.networks.monotone import ScheduledNetwork
from pipeline.training import parallel
from pipeline.training.config import Precision, TrainingConfig
from pipeline.training.ema import Ema
from pipeline.training.inputs import StepInputs
from pipeline.training.objective import Rows, learned_schedule_loss, loss
from pipeline.training.optimizer import LossScale, learning_rate, make_optimizer
from pipeline.training.precision import HALF
from pipeline.training.timesteps import LossHistory, draw_timesteps

QUARTILES = 4


@dataclass
class TrainState:
    """All that survives an interruption. `step` counts finished optimizer steps."""

    network: nn.Module
    ema: Ema
    optimizer: torch.optim.Optimizer
    loss_scale: LossScale
    precision: Precision
    """Of what follows: a run that goes on keeps it."""
    losses: LossHistory | None = None
    """What `timestep_sampler: loss_second_moment` draws by."""
    step: int = 0


@dataclass(frozen=True)
class StepRecord:
    """One finished step; its tensors are on the rank's device, so that nothing waits for it."""

    step: int
    """From 1."""
    loss: Tensor
    """Of this rank's rows; the mean over the ranks is that of the global batch."""
    grad_norm: Tensor
    """Of the mean over all ranks, before it is clipped."""
    quartile_losses: Tensor
    """(4, 2): the sum of this rank's losses, unweighted by how often their timesteps are drawn, and
    their number, by quarter of the timesteps, the least noise first."""
    lr: float
    waited: float
    """Seconds until there was a batch, with its noise."""


def make_state(network: nn.Module, config: TrainingConfig, timesteps: int) -> TrainState:
    """The state before the first step, for a process of T = `timesteps`; `auto` is resolved."""
    assert config.precision != "auto"
    device = next(network.parameters()).device
    # before it is wrapped, which takes the layout as it is; slices have none of their own
    if in_channels_last(config, device) and not any(map(parallel.is_sliced, network.parameters())):
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    by_losses = config.timestep_sampler == "loss_second_moment"
    return TrainState(
        network,
        Ema(network, config.ema, config.batch_size),
        make_optimizer(network, config),
        LossScale(device, config.precision == "float16"),
        config.precision,
        LossHistory(timesteps) if by_losses else None,
    )


def in_channels_last(config: TrainingConfig, device: torch.device) -> bool:
    """Whether images are kept with their channels side by side."""
    if config.channels_last is None:
        return is_apart(device) and config.precision in HALF
    return config.channels_last


def train(
    state: TrainState,
    forward: nn.Module,
    inputs: Iterator[StepInputs],
    diffusion: DiffusionConfig,
    schedule: Schedule | None,
    config: TrainingConfig,
    seed: int,
    device: torch.device,
) -> Iterator[StepRecord]:
    """Train from state.step to config.steps; after each yield `state` is that of a finished step.

    Args:
        inputs: this rank's, from step state.step on.
        forward: what computes the network and reduces gradients over the ranks, see
            `parallel.wrap`.
        schedule: None if it is learned, beside the network.

    Raises:
        TrainingDiverged: gradients in float16 overflow whatever the scale of the loss.
    """
    assert config.precision == state.precision
    half = HALF.get(state.precision)
    autocast = torch.autocast(device.type, half, half is not None)

    side_by_side = in_channels_last(config, device)
    layout = torch.channels_last if side_by_side else torch.contiguous_format
    _, world_size = parallel.rank_and_world_size()

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

    def backward(rows: Rows, weight: Tensor, dropout: Tensor) -> tuple[Tensor, Tensor]:
        """Add up the gradients of all parts; the loss of each row, and `StepRecord.loss`."""
        parts = zip(
            rows.parts(config.accumulate),
            weight.tensor_split(config.accumulate),
            dropout.tensor_split(config.accumulate),
            strict=True,
        )
        found = []
        for i, (part, part_weight, keys) in enumerate(parts):
            with (
                parallel.reducing(forward, i == config.accumulate - 1),
                dropout_keys(state.network, keys),
            ):
                losses = row_losses(part)
                total = (like(part_weight, losses) * losses).sum()
                # the mean over the ranks, which need not have equally many rows, is then that of
                # the global batch
                of_part = total * (world_size / config.batch_size)
                state.loss_scale.backward(of_part)
            found.append((losses.detach(), of_part.detach()))
        return torch.cat([of for of, _ in found]), torch.stack([of for _, of in found]).sum()

    unsettled = parallel.changes_its_layout(forward)
    while state.step < config.steps:
        step = state.step
        began = time.monotonic()
        given = next(inputs)
        waited = time.monotonic() - began
        assert given.step == step
        t, weight = draw_timesteps(
            config.timestep_sampler,
            seed,
            step,
            given.rows,
            config.batch_size,
            diffusion.timesteps,
            schedule,
            state.losses,
            (config.log_normal_mean, config.log_normal_std),
        )
        rows = _on_device(given, t, device)
        dropout = given.dropout.to(device, non_blocking=True)
        if unsettled:  # what this gives is thrown away
            backward(rows, weight, dropout)
            unsettled = False
        state.optimizer.zero_grad(set_to_none=True)
        losses, loss_of_rows = backward(rows, weight, dropout)
        if state.losses is not None:
            seen = torch.stack([like(t, losses.double()), losses.double()], dim=1)
            state.losses.expect(Fetched(parallel.all_rows(seen, config.batch_size)))

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
            loss=loss_of_rows,
            grad_norm=torch.stack(norms).norm(),
            quartile_losses=_by_quartile(losses, t / diffusion.timesteps),
            lr=lr,
            waited=waited,
        )


def _on_device(given: StepInputs, t: Tensor, device: torch.device) -> Rows:
    x_0 = to_unit(given.pixels.to(device, non_blocking=True))
    label = None if given.label is None else given.label.to(device, non_blocking=True)
    return Rows(x_0, given.eps.to(device, non_blocking=True), t, label)


def _by_quartile(losses: Tensor, share: Tensor) -> Tensor:
    """(4, 2) sums and numbers of the losses (b,), by the share t/T (b,) of their timesteps."""
    quartile = (QUARTILES * share).long().clamp(max=QUARTILES - 1)
    member = nn.functional.one_hot(quartile, QUARTILES)  # (b, 4)
    member = member.to(losses.device, losses.dtype, non_blocking=True)
    return torch.stack([losses @ member, member.sum(0)], dim=1)
