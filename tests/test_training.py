"""Training: exact after an interruption, the same for any number of workers."""

import socket
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import multiprocessing, nn

from pipeline import storage
from pipeline.data.batches import Batches
from pipeline.data.shards import NO_LABEL, ImageSet
from pipeline.diffusion.schedules import DiffusionConfig, make_schedule
from pipeline.errors import CorruptArtifact
from pipeline.networks.unet import UNetConfig
from pipeline.samplers.model import ModelSpec
from pipeline.training import checkpoint, parallel
from pipeline.training.ema import Ema, ema_decay
from pipeline.training.loop import (
    TrainingConfig,
    TrainState,
    draw,
    learning_rate,
    make_state,
    train,
)

SPEC = ModelSpec(
    network=UNetConfig(base_channels=8, channel_multipliers=[1, 2], attention_at=[4]),
    diffusion=DiffusionConfig(schedule="cosine"),
    channels=1,
    image_size=8,
    class_names=["a", "b"],
    has_null_label=True,
)
CPU = torch.device("cpu")


def config(**values: object) -> TrainingConfig:
    base = {"steps": 8, "batch_size": 8, "lr": 1e-3, "log_every": 1, "warmup_steps": 2}
    return TrainingConfig(**{**base, **values})  # type: ignore[arg-type]


def images() -> ImageSet:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
    labels = np.array([0, 1, NO_LABEL, 1] * 5)
    return ImageSet(pixels, labels, [str(i) for i in range(20)])


def fresh(training: TrainingConfig) -> TrainState:
    torch.manual_seed(0)
    return make_state(SPEC.make_network(), training)


def run(
    state: TrainState, training: TrainingConfig, rank: int = 0, world_size: int = 1
) -> list[float]:
    batches = Batches(images(), training.batch_size, 3, rank, world_size)
    forward = parallel.wrap(state.network, CPU)
    schedule = make_schedule(SPEC.diffusion)
    steps = train(
        state, forward, batches, SPEC.diffusion, schedule, training, SPEC.num_classes, 3, CPU
    )
    return [parallel.mean_over_ranks(record.loss) for record in steps]


def everything(state: TrainState) -> dict[str, torch.Tensor]:
    """All tensors that a run consists of."""
    optimizer = {
        f"{slot}/{name}": value
        for name, parameter in state.network.named_parameters()
        for slot, value in state.optimizer.state[parameter].items()
    }
    return {**state.network.state_dict(), **optimizer} | {
        f"ema/{name}": value for name, value in state.ema.weights.items()
    }


def assert_bit_identical(a: TrainState, b: TrainState) -> None:
    left, right = everything(a), everything(b)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_k_and_k_resumed_steps_equal_2k_steps_bit_for_bit(tmp_path: Path, precision: str) -> None:
    whole = config(precision=precision, lr_schedule="cosine")
    straight = fresh(whole)
    losses = run(straight, whole)

    first = fresh(whole)
    batches = Batches(images(), 8, 3)
    schedule = make_schedule(SPEC.diffusion)
    steps = train(first, first.network, batches, SPEC.diffusion, schedule, whole, 2, 3, CPU)
    head = [float(next(steps).loss) for _ in range(4)]
    checkpoint.save(str(tmp_path), first, SPEC.model_dump(mode="json"), [])

    torch.manual_seed(99)  # another process, with another global random state
    second = make_state(SPEC.make_network(), whole)
    info = checkpoint.latest_sound(str(tmp_path))
    assert info is not None
    checkpoint.load(info, second)
    assert second.step == 4
    tail = run(second, whole)
    assert head + tail == losses
    assert_bit_identical(second, straight)


def _rank_of_two(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    state = fresh(config())
    losses = run(state, config(), rank, 2)
    if rank == 0:
        storage.write_json(f"{folder}/losses.json", losses)
        checkpoint.save(folder, state, SPEC.model_dump(mode="json"), [])
    torch.distributed.destroy_process_group()


def test_two_workers_train_the_model_that_one_trains(tmp_path: Path) -> None:
    """Same global batches, noise and timesteps: the losses agree to float tolerance."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    multiprocessing.spawn(_rank_of_two, (port, str(tmp_path)), nprocs=2)
    alone = fresh(config())
    losses = run(alone, config())
    assert storage.read_json(str(tmp_path / "losses.json")) == pytest.approx(losses, rel=1e-5)
    # weights with no gradient but rounding errors may differ by Adam's step; what they compute, not
    together = fresh(config())
    checkpoint.load(checkpoint.read(str(tmp_path), 8), together)
    x, t, label = (
        torch.randn(4, 1, 8, 8),
        torch.tensor([1, 300, 600, 999]),
        torch.tensor([0, 1, 2, 0]),
    )
    with torch.no_grad():
        torch.testing.assert_close(
            together.network(x, t, label), alone.network(x, t, label), rtol=0, atol=1e-4
        )


@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_workers_draws_the_same_noise_and_timesteps(world_size: int) -> None:
    whole = draw(7, 5, range(8), (1, 2, 2), 1000, 0.5)
    share = 8 // world_size
    parts = [
        draw(7, 5, range(rank * share, (rank + 1) * share), (1, 2, 2), 1000, 0.5)
        for rank in range(world_size)
    ]
    for name in ("t", "eps", "drop_label"):
        assert torch.equal(torch.cat([getattr(part, name) for part in parts]), getattr(whole, name))
    other_step = draw(7, 6, range(8), (1, 2, 2), 1000, 0.5)
    assert not torch.equal(whole.eps, other_step.eps)
    assert not torch.equal(whole.t, other_step.t)


def test_timesteps_and_label_dropout_have_the_stated_frequencies() -> None:
    draws = draw(0, 0, range(20_000), (1,), 10, 0.25)
    counts = torch.bincount(draws.t, minlength=10)
    assert len(counts) == 10
    assert ((counts - 2000).double() ** 2 / 2000).sum() < 33.7  # χ² with 9 degrees, p = 1e-4
    assert draws.drop_label.double().mean().item() == pytest.approx(0.25, abs=0.015)


def test_ema_follows_its_closed_form() -> None:
    network = nn.Linear(1, 1, bias=False).bfloat16()
    with torch.no_grad():
        network.weight.fill_(0.0)
    ema = Ema(network, decay=0.9999)
    want = 0.0
    for step in range(1000):
        with torch.no_grad():
            network.weight.fill_(float(step % 3))
        ema.update(network, step)
        decay = min(0.9999, (1 + step) / (10 + step))
        want = decay * want + (1 - decay) * (step % 3)
    assert ema.weights["weight"].dtype == torch.float32
    assert ema.weights["weight"].item() == pytest.approx(want, rel=1e-4)
    assert ema_decay(10**9, 0.9999) == 0.9999


def test_learning_rate_warms_up_and_falls_to_zero() -> None:
    training = config(steps=102, warmup_steps=2, lr_schedule="cosine", lr=1.0)
    assert [learning_rate(step, training) for step in (0, 1, 2)] == [0.5, 1.0, 1.0]
    assert learning_rate(52, training) == pytest.approx(0.5)
    assert learning_rate(101, training) < 1e-3
    constant = config(steps=102, warmup_steps=0, lr=1.0)
    assert {learning_rate(step, constant) for step in range(102)} == {1.0}


def save_steps(folder: Path, *steps: int) -> TrainState:
    state = fresh(config())
    for step in steps:
        state.step = step
        checkpoint.save(
            str(folder), state, SPEC.model_dump(mode="json"), [{"step": step, "loss": 1.0}]
        )
    return state


def test_a_torn_or_damaged_checkpoint_is_passed_over(tmp_path: Path) -> None:
    save_steps(tmp_path, 10, 20, 30)
    (tmp_path / "step-000000030" / "state.json").unlink()  # killed before it was written
    weights = tmp_path / "step-000000020" / "ema.safetensors"
    data = bytearray(weights.read_bytes())
    data[-1] ^= 1
    weights.write_bytes(bytes(data))
    info = checkpoint.latest_sound(str(tmp_path))
    assert info is not None
    assert info.step == 10
    with pytest.raises(CorruptArtifact, match="ema.safetensors does not match"):
        checkpoint.load(checkpoint.read(str(tmp_path), 20), fresh(config()))
    assert checkpoint.latest_sound(str(tmp_path / "nowhere")) is None


def test_the_last_few_checkpoints_stay(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2, 3, 10)
    checkpoint.prune(str(tmp_path), keep=2)
    assert [info.step for info in checkpoint.complete_checkpoints(str(tmp_path))] == [3, 10]
    assert storage.list_names(str(tmp_path)) == ["step-000000003", "step-000000010"]


def test_a_checkpoint_holds_no_pickle(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    names = storage.list_names(str(tmp_path / "step-000000001"))
    assert names == ["ema.safetensors", "model.safetensors", "optimizer.safetensors", "state.json"]


def test_training_learns() -> None:
    training = config(steps=60, batch_size=20, lr=3e-3)
    losses = run(fresh(training), training)
    assert losses[0] == pytest.approx(1.0, abs=0.15)  # the network starts at ε = 0
    assert np.mean(losses[-10:]) < 0.7


def test_checkpoints_must_fall_on_log_steps() -> None:
    with pytest.raises(ValueError, match="checkpoint_every=30 must be a multiple of log_every=20"):
        config(log_every=20, checkpoint_every=30)
