"""Networks and training on a device that is not the CPU: see devices.py."""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.data.batches import Batches, FullShuffle
from pipeline.data.shards import NO_LABEL
from pipeline.device import CPU
from pipeline.diffusion.schedules import make_schedule
from pipeline.networks.backbone import dropout_keys, set_checkpointing
from pipeline.networks.config import UNetConfig
from pipeline.samplers.model import ModelSpec
from pipeline.training import checkpoint
from pipeline.training.config import TrainingConfig
from pipeline.training.ema import EmaConfig
from pipeline.training.inputs import step_inputs
from pipeline.training.loop import TrainState, make_state, train
from pipeline.training.watch import Watch
from tests.unit import apart
from tests.unit.apart import Traffic
from tests.unit.devices import (
    DIT,
    KIND,
    ON_APART,
    UNET,
    assert_same,
    make_spec,
    no_waiting,
    weights_of,
)

# --- the device of the tests ----------------------------------------------------------------------


@ON_APART
def test_tensors_of_both_sides_do_not_mix_but_for_numbers(device: torch.device) -> None:
    here, there = torch.ones(3, 3), torch.ones(3, 3, device=device)
    number = torch.tensor(2.0)
    mixed: list[Callable[[], Any]] = [
        lambda: there + here,
        lambda: here.add_(there),
        lambda: number.add_(there[0, 0]),
        lambda: torch.cat([there, here]),
        lambda: there @ here,
        lambda: torch.where(here > 0, there, there),
        lambda: torch.nn.functional.conv2d(there[None, None], here[None, None]),
        lambda: there.index_select(0, torch.tensor([0])),
        lambda: torch._foreach_add_([there], [here]),
    ]
    for operation in mixed:
        with pytest.raises(RuntimeError, match="same device"):
            operation()
    assert_same(there * number, 2 * here)


@ON_APART
def test_views_and_outputs_are_of_the_memory_that_they_are_said_to_be_of(
    device: torch.device,
) -> None:
    there = torch.zeros(4, 6, device=device)
    there.t()[1:3].unfold(1, 2, 2).add_(1)
    there.view(2, 12)[0, ::4].fill_(5)
    want = torch.zeros(4, 6)
    want.t()[1:3].unfold(1, 2, 2).add_(1)
    want.view(2, 12)[0, ::4].fill_(5)
    assert_same(there, want)
    out = torch.empty(0, device=device)
    assert torch.add(there, there, out=out) is out
    assert_same(out, 2 * want)


@ON_APART
def test_copies_and_waits_are_counted(device: torch.device) -> None:
    there, pinned = torch.ones(3, device=device), torch.ones(3).pin_memory()
    for operation, want in (
        (lambda: torch.ones(3).to(device), Traffic(1, 0, 1)),
        (lambda: pinned.to(device, non_blocking=True), Traffic(1, 0, 0)),
        (lambda: there.to("cpu", non_blocking=True), Traffic(0, 1, 0)),
        (lambda: there.cpu(), Traffic(0, 1, 1)),
        (lambda: float(there[0]), Traffic(0, 1, 1)),
        (lambda: there.tolist(), Traffic(0, 1, 1)),
        (lambda: there[there > 0], Traffic(0, 0, 1)),
        (lambda: there * 2 + there.sum(), Traffic(0, 0, 0)),
        (lambda: torch.tensor([1.0], device=device), Traffic(1, 0, 1)),
    ):
        before = apart.traffic()
        operation()
        assert apart.traffic() - before == want


def test_generators_streams_and_events_of_the_device_work(device: torch.device) -> None:
    generator = torch.Generator(device)
    drawn = [torch.randn(3, generator=generator.manual_seed(4), device=device) for _ in range(2)]
    assert torch.equal(*drawn)
    event = torch.Event(device=device)
    event.record(torch.accelerator.current_stream(device))
    event.synchronize()
    assert event.query()


# --- networks -------------------------------------------------------------------------------------

NETWORKS = {
    "unet": make_spec(),
    "unet with all options": make_spec(
        UNetConfig(
            base_channels=8,
            channel_multipliers=[1, 2],
            attention_at=[8, 4],
            head_channels=4,
            conditioning="add",
            halving_padding="after",
            sines_first=True,
            frequency_shift=1,
            norm_groups=2,
            dropout=0.2,
        ),
        prediction="edm",
    ),
    "unet that resamples by blocks": make_spec(
        UNET.model_copy(update={"resample": "block", "dropout": 0.1}), variance="learned_range"
    ),
    "dit": make_spec(DIT.model_copy(update={"dropout": 0.1})),
    "learned schedule": make_spec(schedule="learned"),
}


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_a_network_gives_what_it_gives_on_the_cpu_forwards_and_backwards(
    device: torch.device, name: str, recompute: bool
) -> None:
    torch.manual_seed(1)
    x, t, label = torch.randn(3, 1, 8, 8), torch.tensor([0.0, 400, 999]), torch.tensor([0, 3, 1])
    keys = torch.tensor([3, 1, 4])
    found = []
    for place in (CPU, device):
        network = NETWORKS[name].make_network()
        network.load_state_dict(weights_of(NETWORKS[name]))
        network.to(place)
        set_checkpointing(network, recompute)
        image = x.to(place, copy=True).requires_grad_()
        with dropout_keys(network, keys.to(place)):
            output = network(image, t.to(place), label.to(place))
        output.square().sum().backward()
        gradients = [p.grad for p in network.parameters() if p.grad is not None]
        found.append([output, image.grad, *gradients])
    for want, got in zip(*found, strict=True):
        assert_same(got, want)


# --- training -------------------------------------------------------------------------------------

HYBRID = make_spec(variance="learned_range")
TRAININGS: dict[str, tuple[ModelSpec, dict[str, Any]]] = {
    "float32": (make_spec(), {}),
    "accumulate": (make_spec(), {"accumulate": 3}),
    "recompute": (make_spec(DIT), {"recompute": True}),
    "dropout": (make_spec(UNET.model_copy(update={"dropout": 0.1})), {}),
    "channels last": (make_spec(), {"channels_last": True}),
    "half life": (make_spec(), {"ema": EmaConfig(kind="half_life", half_life=100)}),
    "power": (make_spec(), {"ema": EmaConfig(kind="power"), "loss_weight": "min_snr"}),
    "second moment": (HYBRID, {"objective": "hybrid", "timestep_sampler": "loss_second_moment"}),
    "bound": (make_spec(prediction="v"), {"objective": "vlb", "timestep_sampler": "stratified"}),
    "learned schedule": (make_spec(schedule="learned"), {"objective": "vlb"}),
    "edm": (make_spec(prediction="edm"), {"timestep_sampler": "log_normal", "loss_weight": "edm"}),
    "bfloat16": (make_spec(), {"precision": "bfloat16"}),
    "float16": (make_spec(), {"precision": "float16"}),
}
HALF = ("bfloat16", "float16")
ROUNDED = {"bfloat16": 0.05, "float16": 0.05, "channels last": 1e-4}
"""By how much losses may differ: autocast rounds in other places there, and layouts add up the
numbers of a gradient in another order."""
STEPS = 20


def fresh(place: torch.device, spec: ModelSpec, training: TrainingConfig) -> TrainState:
    torch.manual_seed(0)
    network = spec.make_network().to(place)
    set_checkpointing(network, training.recompute)
    state = make_state(network, training, spec.diffusion.timesteps)
    if place == CPU:  # on a device all weights take a step at once, in another order of operations
        names = ("params", "lr", "weight_decay")
        groups = [{name: group[name] for name in names} for group in state.optimizer.param_groups]
        state.optimizer = torch.optim.AdamW(groups, fused=True)
    return state


def run(
    place: torch.device, spec: ModelSpec, training: TrainingConfig, state: TrainState
) -> Iterator[Tensor]:
    """Trains; yields the loss of each step, on the device."""
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
    shuffle = FullShuffle(pixels, np.array([0, 1, NO_LABEL, 2] * 5), 3, training.batch_size)
    batches = Batches(shuffle, 0, 1, training.label_dropout, training.augmentation)
    inputs = step_inputs(batches, spec.num_classes, state.step, training.steps, place)
    schedule = None
    if spec.diffusion.schedule != "learned":
        schedule = make_schedule(spec.diffusion)
    with contextlib.closing(inputs):
        records = train(state, state.network, inputs, spec.diffusion, schedule, training, 3, place)
        for record in records:
            yield record.loss


def setting(name: str, **values: Any) -> tuple[ModelSpec, TrainingConfig]:
    spec, own = TRAININGS[name]
    base = {"steps": STEPS, "batch_size": 6, "lr": 1e-3, "log_every": 1, "warmup_steps": 2}
    base["precision"] = "float32"
    return spec, TrainingConfig(**{**base, **own, **values})  # type: ignore[arg-type]


def everything(state: TrainState) -> dict[str, Tensor]:
    """All tensors that a run consists of, by file and name."""
    return {
        f"{file}/{name}": tensor.detach().cpu()
        for file, part in checkpoint.kept(state).items()
        for name, tensor in part.tensors.items()
    }


@pytest.mark.parametrize("name", TRAININGS)
def test_training_gives_what_it_gives_on_the_cpu(device: torch.device, name: str) -> None:
    spec, training = setting(name)
    found = []
    for place in (CPU, device):
        state = fresh(place, spec, training)
        losses = torch.stack(list(run(place, spec, training, state)))
        assert losses.isfinite().all()
        found.append({"losses": losses, **everything(state)})
    want, got = found
    assert got.keys() == want.keys()
    if name in ROUNDED:
        torch.testing.assert_close(got["losses"].cpu(), want["losses"], rtol=ROUNDED[name], atol=0)
        return
    for key in want:
        assert_same(got[key], want[key])


@pytest.mark.parametrize("name", ["float32", "power", "second moment", "learned schedule", *HALF])
def test_a_checkpoint_goes_from_the_device_to_the_cpu_and_back(
    device: torch.device, name: str, tmp_path: Path
) -> None:
    spec, training = setting(name, steps=8, channels_last=False)

    def save(folder: str, state: TrainState) -> checkpoint.CheckpointInfo:
        place = str(tmp_path / folder)
        with checkpoint.Writer(place, spec.model_dump(mode="json"), keep=9) as writer:
            writer.save(state, [])
        return checkpoint.read(place, state.step)

    undisturbed = fresh(device, spec, training)
    list(run(device, spec, training, undisturbed))
    state = fresh(device, spec, training)
    list(itertools.islice(run(device, spec, training, state), 4))
    on_cpu = fresh(CPU, spec, training)
    checkpoint.load(save("device", state), on_cpu)
    there, here = everything(state), everything(on_cpu)
    assert here.keys() == there.keys()
    assert [key for key in there if not torch.equal(here[key], there[key])] == []
    again = fresh(device, spec, training)
    checkpoint.load(save("cpu", on_cpu), again)
    list(run(device, spec, training, again))
    want, got = everything(undisturbed), everything(again)
    for key in want:
        assert_same(got[key], want[key])


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_step_that_logs_nothing_waits_for_nothing(
    device: torch.device, name: str
) -> None:
    spec, training = setting(name, steps=6)
    state = fresh(device, spec, training)
    steps = run(device, spec, training, state)
    next(steps)
    next(steps)  # the optimizer has its state
    before = apart.traffic() if KIND == "apart" else None
    with no_waiting():
        for _ in range(2):
            next(steps)
    if before is not None:
        crossed = apart.traffic() - before
        sampled = name == "second moment"  # by the losses of the step before
        assert crossed.to_host == (2 if sampled else 0)
        assert crossed.to_device <= 2 * MOST_SENT
    steps.close()  # type: ignore[attr-defined]


MOST_SENT = 29
"""Copies to the device in a step: images, labels, noise, and coefficients of the schedule."""


def test_a_logged_step_waits_once(device: torch.device) -> None:
    spec, training = setting("float32", steps=4)
    state = fresh(device, spec, training)
    watch = Watch(training.batch_size, 1.0, 1.0, may_overflow=False)
    shuffle = FullShuffle(np.zeros((8, 8, 8, 1), np.uint8), np.zeros(8, int), 3, 6)
    batches = Batches(shuffle, 0, 1, 0.1, training.augmentation)
    inputs = step_inputs(batches, 3, 0, 4, device)
    schedule = make_schedule(spec.diffusion)
    with contextlib.closing(inputs):
        for record in train(
            state, state.network, inputs, spec.diffusion, schedule, training, 3, device
        ):
            watch.add(record)
    before = apart.traffic() if KIND == "apart" else None
    figures, bad = watch.take()
    if before is not None:
        assert apart.traffic() - before == Traffic(0, 1, 1)
    assert bad is None and figures["loss"] > 0
