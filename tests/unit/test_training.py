"""Training: exact after an interruption, the same for any number of workers."""

import math
import re
import threading
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline import storage
from pipeline.data.batches import Batches, FullShuffle
from pipeline.data.order import share
from pipeline.data.shards import NO_LABEL
from pipeline.diffusion.config import DiffusionConfig, Prediction
from pipeline.diffusion.elbo import bound_term, prior_term, reconstruction_term
from pipeline.diffusion.gaussian import q_sample
from pipeline.diffusion.parameterisation import target, x_0_from
from pipeline.diffusion.schedules import make_schedule
from pipeline.errors import CorruptArtifact, StorageError
from pipeline.networks.backbone import set_checkpointing
from pipeline.networks.config import UNetConfig
from pipeline.networks.monotone import LearnedSchedule
from pipeline.samplers.config import SamplingConfig
from pipeline.samplers.model import ModelSpec, build_model, make_plan
from pipeline.samplers.plan import run_plan
from pipeline.training import checkpoint, parallel
from pipeline.training.config import EmaConfig, TrainingConfig, check_objective
from pipeline.training.inputs import StepInputs, draw_inputs, draw_noise, step_inputs
from pipeline.training.loop import StepRecord, TrainState, make_state, train
from pipeline.training.objective import Rows, learned_schedule_loss, loss

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
    base = {
        "steps": 8,
        "batch_size": 8,
        "lr": 1e-3,
        "log_every": 1,
        "warmup_steps": 2,
        "precision": "float32",
    }
    return TrainingConfig(**{**base, **values})  # type: ignore[arg-type]


def images(batch_size: int) -> FullShuffle:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (20, 8, 8, 1), dtype=np.uint8)
    labels = np.array([0, 1, NO_LABEL, 1] * 5)
    return FullShuffle(pixels, labels, 3, batch_size)


def fresh(training: TrainingConfig, spec: ModelSpec = SPEC) -> TrainState:
    torch.manual_seed(0)
    network = spec.make_network()
    set_checkpointing(network, training.recompute)
    if training.parallel == "fsdp" and parallel.rank_and_world_size()[1] > 1:
        parallel.cut(network, CPU)
    return make_state(network, training, spec.diffusion.timesteps)


def steps(
    state: TrainState,
    training: TrainingConfig,
    rank: int = 0,
    world_size: int = 1,
    spec: ModelSpec = SPEC,
) -> Iterator[StepRecord]:
    shuffle = images(training.batch_size)
    batches = Batches(shuffle, rank, world_size, training.label_dropout, training.augmentation)
    inputs = step_inputs(batches, spec.num_classes, state.step, training.steps, CPU)
    forward = parallel.wrap(state.network, CPU)
    learned = spec.diffusion.schedule == "learned"
    schedule = None if learned else make_schedule(spec.diffusion)
    return train(state, forward, inputs, spec.diffusion, schedule, training, 3, CPU)


def run(
    state: TrainState,
    training: TrainingConfig,
    rank: int = 0,
    world_size: int = 1,
    spec: ModelSpec = SPEC,
) -> list[float]:
    records = steps(state, training, rank, world_size, spec)
    return [float(parallel.sum_over_ranks(record.loss)) / world_size for record in records]


def save(
    folder: Path,
    state: TrainState,
    spec: ModelSpec,
    history: list[dict[str, float]] | None = None,
) -> None:
    with checkpoint.Writer(str(folder), spec.model_dump(mode="json"), keep=9) as writer:
        writer.save(state, history or [])


def with_diffusion(**values: object) -> ModelSpec:
    return SPEC.model_copy(update={"diffusion": DiffusionConfig(**values)})  # type: ignore[arg-type]


def with_dropout(dropout: float) -> ModelSpec:
    return SPEC.model_copy(update={"network": SPEC.network.model_copy(update={"dropout": dropout})})


def everything(state: TrainState) -> dict[str, torch.Tensor]:
    """All tensors that a run consists of."""
    optimizer = {
        f"{slot}/{name}": value
        for name, parameter in state.network.named_parameters()
        for slot, value in state.optimizer.state[parameter].items()
    }
    averages = {
        f"{average}/{name}": value
        for average, weights in state.ema.averages.items()
        for name, value in weights.items()
    }
    losses = state.losses.tensors() if state.losses is not None else {}
    scale = state.loss_scale.tensors()
    return {**state.network.state_dict(), **optimizer, **averages, **losses, **scale}


def assert_bit_identical(a: TrainState, b: TrainState) -> None:
    left, right = everything(a), everything(b)
    assert left.keys() == right.keys()
    assert [name for name in left if not torch.equal(left[name], right[name])] == []


HYBRID = {"objective": "hybrid", "timestep_sampler": "loss_second_moment", "batch_size": 24}
LEARNED = {"objective": "vlb", "timestep_sampler": "stratified"}


@pytest.mark.parametrize(
    ("spec", "values"),
    [
        (SPEC, {"precision": "float32"}),
        (SPEC, {"precision": "bfloat16", "horizontal_flip": 0.5, "shift": 2}),
        # of so few timesteps that their histories are full before the interruption
        (with_diffusion(schedule="cosine", timesteps=3, variance="learned_range"), HYBRID),
        (with_diffusion(schedule="learned", prediction="v"), LEARNED),
        (SPEC, {"precision": "float16"}),
        (SPEC, {"channels_last": True}),
        (SPEC, {"ema": EmaConfig(kind="power")}),
        (with_dropout(0.3), {}),
    ],
    ids=[
        "float32",
        "bfloat16",
        "drawn by the losses",
        "learned schedule",
        "float16",
        "channels last",
        "power averages",
        "dropout",
    ],
)
def test_k_and_k_resumed_steps_equal_2k_steps_bit_for_bit(
    tmp_path: Path, spec: ModelSpec, values: dict[str, object]
) -> None:
    whole = config(lr_schedule="cosine", **values)
    straight = fresh(whole, spec)
    losses = run(straight, whole, spec=spec)

    first = fresh(whole, spec)
    records = steps(first, whole, spec=spec)
    head = [float(next(records).loss) for _ in range(4)]
    save(tmp_path, first, spec)

    torch.manual_seed(99)  # another process, with another global random state
    second = make_state(spec.make_network(), whole, spec.diffusion.timesteps)
    info = checkpoint.latest_sound(str(tmp_path))
    assert info is not None
    checkpoint.load(info, second)
    assert second.step == 4
    if second.losses is not None:
        assert not torch.equal(second.losses.probabilities(), torch.full((3,), 1 / 3).double())
    tail = run(second, whole, spec=spec)
    assert head + tail == losses
    assert_bit_identical(second, straight)


def test_moments_are_loaded_in_the_layout_of_their_weights(tmp_path: Path) -> None:
    """The fused optimizers of a GPU insist on it."""
    training = config(channels_last=True)
    state = fresh(training)
    next(steps(state, training))
    save(tmp_path, state, SPEC)
    again = fresh(training)
    checkpoint.load(checkpoint.read(str(tmp_path), 1), again)
    weights = [weight for weight in again.network.parameters() if weight.ndim == 4]
    assert any(not weight.is_contiguous() for weight in weights)
    for weight in weights:
        assert again.optimizer.state[weight]["exp_avg"].stride() == weight.stride()


TWO_RANKS = {
    "simple": (SPEC, {"horizontal_flip": 0.5, "shift": 2}),
    # of 9 rows one rank has 4, in parts of 2 and 2, the other 5, in parts of 3 and 2
    "in parts, with dropout": (with_dropout(0.3), {"accumulate": 2, "batch_size": 9}),
    "channels last": (SPEC, {"channels_last": True}),
    "cut": (
        with_dropout(0.3),
        {"parallel": "fsdp", "accumulate": 2, "recompute": True, "batch_size": 9},
    ),
    "hybrid": (
        with_diffusion(schedule="cosine", timesteps=3, variance="learned_range"),
        {**HYBRID, "batch_size": 25},
    ),
    "learned": (with_diffusion(schedule="learned"), LEARNED),
}


@pytest.mark.parametrize("world_size", [2, 3, 4])
def test_any_number_of_workers_draws_the_same_noise(world_size: int) -> None:
    eps = draw_noise(7, 5, range(8), (1, 2, 2))
    parts = [draw_noise(7, 5, share(rank, world_size, 8), (1, 2, 2)) for rank in range(world_size)]
    assert torch.equal(torch.cat(parts), eps)
    assert not torch.equal(draw_noise(7, 6, range(8), (1, 2, 2)), eps)


def test_the_loop_says_how_long_it_waited_for_a_batch() -> None:
    training = config(steps=3)
    batches = Batches(images(training.batch_size))

    def slowly() -> Iterator[StepInputs]:
        for step, seconds in enumerate((0.0, 0.05, 0.0)):
            time.sleep(seconds)
            yield draw_inputs(batches.at(step), 2, 3)

    state = fresh(training)
    schedule = make_schedule(SPEC.diffusion)
    waited = [
        record.waited
        for record in train(
            state, state.network, slowly(), SPEC.diffusion, schedule, training, 3, CPU
        )
    ]
    assert len(waited) == 3
    assert waited[1] >= 0.05


def save_steps(folder: Path, *steps: int) -> TrainState:
    state = fresh(config())
    for step in steps:
        state.step = step
        save(folder, state, SPEC, [{"step": step, "loss": 1.0}])
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


def test_a_checkpoint_is_of_its_step_though_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    training, goes_on = config(steps=4), threading.Event()
    state, straight = fresh(training), fresh(training)
    seen: list[int] = []
    write = storage.write_bytes

    def slowly(uri: str, data: bytes) -> storage.FileEntry:
        assert goes_on.wait(60)
        return write(uri, data)

    monkeypatch.setattr(storage, "write_bytes", slowly)
    with checkpoint.Writer(str(tmp_path), {}, 9, lambda info: seen.append(info.step)) as writer:
        for record in steps(state, training):
            if record.step == 2:
                writer.save(state, [])
        assert not seen, "training is over, and the checkpoint not yet written"
        goes_on.set()
    assert seen == [2]
    middle = fresh(training)
    checkpoint.load(checkpoint.read(str(tmp_path), 2), middle)
    for record in steps(straight, training):
        if record.step == 2:
            assert_bit_identical(middle, straight)


def test_a_checkpoint_that_cannot_be_written_stops_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = fresh(config())

    def full(uri: str, data: bytes) -> storage.FileEntry:
        raise StorageError(f"cannot write to {uri}: no space left on device")

    monkeypatch.setattr(storage, "write_bytes", full)
    with (
        pytest.raises(StorageError, match="no space left"),
        checkpoint.Writer(str(tmp_path), {}, 9) as writer,
    ):
        writer.save(state, [])
        writer.save(state, [])
        raise AssertionError("the second must not begin")
    with (
        pytest.raises(StorageError, match="no space left"),
        checkpoint.Writer(str(tmp_path), {}, 9) as writer,
    ):
        writer.save(state, [])


def test_the_last_few_checkpoints_stay(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2, 3, 10)
    checkpoint.prune(str(tmp_path), keep=2)
    assert [info.step for info in checkpoint.complete_checkpoints(str(tmp_path))] == [3, 10]
    assert storage.list_names(str(tmp_path)) == ["step-000000003", "step-000000010"]


def test_the_best_checkpoint_stays_beside_the_last(tmp_path: Path) -> None:
    folder, state = str(tmp_path), fresh(config())
    assert checkpoint.read_best(folder) is None
    losses = {1: 0.5, 2: 0.2, 3: 0.4, 4: 0.3, 5: 0.2}
    with checkpoint.Writer(folder, SPEC.model_dump(mode="json"), keep=2) as writer:
        for step, loss in losses.items():
            state.step = step
            writer.save(state, [])
            writer.wait()
            checkpoint.note_loss(folder, step, loss)
    assert [info.step for info in checkpoint.complete_checkpoints(folder)] == [2, 4, 5]
    assert checkpoint.read_best(folder) == (2, 0.2)
    storage.remove(f"{folder}/step-000000002")
    assert checkpoint.read_best(folder) is None


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


# --- objectives ----------------------------------------------------------------------------------


def rows_of(shape: tuple[int, ...], t: list[float]) -> Rows:
    generator = torch.Generator().manual_seed(4)
    x_0 = 2 * torch.randint(0, 256, shape, generator=generator) / 255 - 1
    eps = torch.randn(shape, generator=generator)
    return Rows(x_0, eps, torch.tensor(t, dtype=torch.float64), None)


def test_hybrid_trains_the_mean_by_the_error_and_the_variance_by_the_bound() -> None:
    diffusion = DiffusionConfig(schedule="cosine", timesteps=500, variance="learned_range")
    schedule = make_schedule(diffusion)
    rows = rows_of((3, 1, 4, 4), [0.0, 100.0, 499.0])
    gradients = {}
    for objective in ("hybrid", "vlb"):
        output = torch.zeros(3, 2, 4, 4, requires_grad=True)
        training = config(objective=objective)
        losses = loss(lambda *_: output, rows, diffusion, schedule, training)  # noqa: B023
        losses.sum().backward()
        gradients[objective] = output.grad
        x_0_hat = x_0_from(
            "eps",
            torch.zeros(3, 1, 4, 4),
            q_sample(rows.x_0, rows.eps, schedule.alpha_bar_at(rows.t)),
            schedule.alpha_bar_at(rows.t),
        )
        term = bound_term(
            schedule, "learned_range", rows.t, rows.x_0, x_0_hat, torch.full((3, 1, 4, 4), 0.5)
        )
        want = 500 * term if objective == "vlb" else rows.eps.square().mean((1, 2, 3)) + term / 2
        torch.testing.assert_close(losses, want)
    simple = -2 * rows.eps / 16  # d/dε̂ of the mean square error at ε̂ = 0
    torch.testing.assert_close(gradients["hybrid"][:, :1], simple)
    # T/1000 of the bound in one, T in the other
    torch.testing.assert_close(gradients["hybrid"][:, 1:] * 1000, gradients["vlb"][:, 1:])
    assert not torch.allclose(gradients["vlb"][:, :1], simple, rtol=0.1)


@pytest.mark.parametrize("prediction", ["eps", "v", "x_0", "score", "edm"])
def test_the_bound_is_one_number_whatever_the_network_predicts(prediction: Prediction) -> None:
    diffusion = DiffusionConfig(schedule="linear", timesteps=100, prediction=prediction)
    schedule = make_schedule(diffusion)
    rows = rows_of((4, 1, 4, 4), [0.0, 10.0, 50.0, 99.0])
    alpha_bar = schedule.alpha_bar_at(rows.t)
    output = target(prediction, 0.5 * rows.x_0, rows.eps, alpha_bar)  # of a wrong x_0, and its x_t
    x_t = q_sample(rows.x_0, rows.eps, alpha_bar)
    want = bound_term(
        schedule,
        "fixed_small",
        rows.t,
        rows.x_0,
        x_0_from(prediction, output, x_t, alpha_bar),
    )
    got = loss(lambda *_: output, rows, diffusion, schedule, config(objective="vlb"))
    torch.testing.assert_close(got, 100 * want)


def test_a_weighted_loss_is_the_weight_times_the_error() -> None:
    diffusion = DiffusionConfig(schedule="cosine", prediction="v")
    schedule = make_schedule(diffusion)
    rows = rows_of((3, 1, 4, 4), [0.0, 100.0, 999.0])
    plain, weighted = (
        loss(lambda *_: torch.zeros(3, 1, 4, 4), rows, diffusion, schedule, training)
        for training in (config(), config(loss_weight="min_snr", min_snr_gamma=2.0))
    )
    snr = schedule.log_snr.exp()[[0, 100, 999]]
    torch.testing.assert_close(weighted / plain, (snr.clamp(max=2) / (snr + 1)).float())


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"min_snr_gamma": 3.0}, "min_snr_gamma=3.0 has no meaning for loss_weight=uniform"),
        ({"p2_k": 2.0, "loss_weight": "snr"}, "p2_k=2.0 has no meaning for loss_weight=snr"),
        ({"log_normal_mean": 0.0}, "has no meaning for timestep_sampler=uniform: drop it, or use"),
        ({"shuffle_window": 64}, "shuffle_window=64 has no meaning for shuffle=full"),
        (
            {"compile": "reduce-overhead", "accumulate": 2},
            "compile=reduce-overhead with accumulate=2 would overwrite the gradients",
        ),
        (
            {"shuffle": "windowed", "shuffle_window": 7},
            "shuffle_window=7 must be at least batch_size=8",
        ),
        ({"objective": "vlb", "loss_weight": "snr"}, "loss_weight=snr with objective=vlb"),
        (
            {"objective": "hybrid", "timestep_sampler": "log_normal"},
            "timestep_sampler=log_normal with objective=hybrid would no longer be the bound",
        ),
    ],
)
def test_settings_without_a_meaning_are_refused(values: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        config(**values)


@pytest.mark.parametrize(
    ("process", "values", "sentence"),
    [
        (
            {"variance": "learned_range"},
            {},
            "variance=learned_range with training.objective=simple would leave the variance",
        ),
        ({}, {"objective": "hybrid"}, "objective=hybrid with diffusion.variance=fixed_small"),
        ({"schedule": "vp"}, {"objective": "vlb"}, "loss_weight=likelihood is its bound"),
        (
            {"schedule": "ve", "variance": "learned_range"},
            {"objective": "hybrid"},
            "variance=learned_range with schedule=ve has no timesteps",
        ),
        (
            {"schedule": "edm"},
            {"timestep_sampler": "loss_second_moment"},
            "loss_second_moment keeps the losses of each timestep",
        ),
        ({"schedule": "learned"}, {}, "training.objective=simple cannot learn a schedule"),
        (
            {"schedule": "learned", "prediction": "x_0"},
            {"objective": "vlb"},
            "diffusion.prediction=x_0 cannot learn a schedule",
        ),
        (
            {"schedule": "learned", "variance": "learned_range"},
            {"objective": "vlb"},
            "use fixed_small, or a discrete schedule",
        ),
    ],
)
def test_objectives_that_a_process_cannot_have_are_refused(
    process: dict[str, object], values: dict[str, object], sentence: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        check_objective(DiffusionConfig(**process), config(**values))  # type: ignore[arg-type]
    check_objective(DiffusionConfig(), config())


# --- a learned schedule --------------------------------------------------------------------------


def bent() -> LearnedSchedule:
    """A schedule far from the straight line."""
    learned = LearnedSchedule(hidden=32)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for raw in (learned.raw_1, learned.raw_2, learned.raw_3, learned.bias_2):
            raw.add_(torch.randn(raw.shape, generator=generator))
    return learned


def test_a_learned_schedule_rises_between_its_ends() -> None:
    u = torch.linspace(0, 1, 2001, dtype=torch.float64, requires_grad=True)
    for learned in (LearnedSchedule(), bent()):
        psi, slope = learned.progress(u)
        assert (slope > 0).all()
        assert (psi.diff() > 0).all()
        gamma, gamma_slope = learned.gamma(psi, slope)
        assert gamma[0].item() == pytest.approx(-13.3, abs=1e-6)
        assert gamma[-1].item() == pytest.approx(5.0, abs=1e-6)
        (derivative,) = torch.autograd.grad(gamma.sum(), u)
        torch.testing.assert_close(gamma_slope, derivative, rtol=1e-9, atol=0)
    straight = torch.lerp(u.new_tensor(-13.3), u.new_tensor(5.0), u)
    gamma, _ = LearnedSchedule().gamma(*LearnedSchedule().progress(u))
    assert (gamma - straight).abs().max() < 0.1


def test_the_interior_of_a_learned_schedule_gets_the_gradient_of_the_variance() -> None:
    """Against autograd through mean(L²) itself; the ends get that of the bound."""
    diffusion = DiffusionConfig(schedule="learned")
    rows = rows_of((6, 1, 4, 4), [0.0, 120.0, 400.0, 600.0, 850.0, 999.0])
    learned = bent()

    def gradients(of: Tensor) -> dict[str, Tensor]:
        parameters = dict(learned.named_parameters())
        found = torch.autograd.grad(of, list(parameters.values()), retain_graph=True)
        return dict(zip(parameters, found, strict=True))

    losses = learned_schedule_loss(denoise, rows, diffusion, learned)
    got = gradients(losses.mean())

    # the same a second way, in plain steps and without a hook
    gamma, slope = learned.gamma(*learned.progress(rows.t / 999))
    log_snr = -gamma[:, None, None, None].float()
    x_t = log_snr.sigmoid().sqrt() * rows.x_0 + (-log_snr).sigmoid().sqrt() * rows.eps
    error = (rows.eps - denoise(x_t, 25 * (20 + gamma), None)).square().mean((1, 2, 3))
    bound = slope.float() / 2 * error / math.log(2)
    ends = prior_term(rows.x_0, torch.sigmoid(-learned.gamma_1.double())) + reconstruction_term(
        rows.x_0, rows.eps, -learned.gamma_0.double()
    )
    torch.testing.assert_close(losses, bound + ends)
    of_the_variance = gradients((bound.square() + 0 * ends).mean())
    of_the_bound = gradients((bound + ends).mean())
    for name in ("raw_1", "raw_2", "raw_3", "bias_2"):
        torch.testing.assert_close(got[name], of_the_variance[name], rtol=1e-3, atol=1e-5)
        assert not torch.allclose(got[name], of_the_bound[name], rtol=0.1)
    for name in ("gamma_0", "log_span"):
        torch.testing.assert_close(got[name], of_the_bound[name], rtol=1e-3, atol=1e-5)


def denoise(image: Tensor, time: Tensor, label: Tensor | None) -> Tensor:
    """The best ε̂ for pixels that are N(0, ½²), from the network's time 25 (20 - λ)."""
    log_snr = (20 - time / 25).reshape(-1, 1, 1, 1).float()
    alpha_bar = log_snr.sigmoid()
    return (1 - alpha_bar).sqrt() / (alpha_bar / 4 + 1 - alpha_bar) * image


def test_learning_the_schedule_reduces_the_variance_of_the_loss() -> None:
    """With the best denoiser of Gaussian pixels and fixed ends, so that the mean cannot change."""
    diffusion = DiffusionConfig(schedule="learned")
    learned = LearnedSchedule(hidden=128)
    interior = [learned.raw_1, learned.raw_2, learned.raw_3, learned.bias_2]
    optimizer = torch.optim.Adam(interior, lr=0.02)
    generator = torch.Generator().manual_seed(0)

    def diffusion_loss(u: Tensor) -> Tensor:
        shape = (len(u), 1, 4, 4)
        x_0, eps = torch.randn(2, *shape, generator=generator)
        rows = Rows(x_0 / 2, eps, 999 * u, None)
        whole = learned_schedule_loss(denoise, rows, diffusion, learned)
        ends = prior_term(rows.x_0, torch.sigmoid(-learned.gamma_1.double()))
        return whole - ends - reconstruction_term(rows.x_0, eps, -learned.gamma_0.double())

    even = torch.linspace(0, 1, 4096, dtype=torch.float64)
    start = diffusion_loss(even).detach()
    for _ in range(200):
        u = torch.rand(64, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        diffusion_loss(u).mean().backward()
        optimizer.step()
    end = diffusion_loss(even).detach()
    assert end.var() < 0.6 * start.var()
    assert end.mean().item() == pytest.approx(float(start.mean()), rel=0.05)


def test_a_model_with_a_learned_schedule_is_stored_and_samples(tmp_path: Path) -> None:
    spec = with_diffusion(schedule="learned", timesteps=100)
    training = config(objective="vlb", timestep_sampler="stratified", lr=1e-2)
    state = fresh(training, spec)
    initial = make_state(spec.make_network(), training, 100).network.log_snr(100)
    run(state, training, spec=spec)
    save(tmp_path, state, spec)
    info = checkpoint.read(str(tmp_path), state.step)

    weights = checkpoint.read_tensors(info, "ema.safetensors")
    model = build_model(ModelSpec.model_validate(info.state["spec"]), weights, "")
    averaged = spec.make_network()
    averaged.load_state_dict(state.ema.weights)
    torch.testing.assert_close(model.schedule.log_snr, averaged.log_snr(100), rtol=1e-9, atol=0)
    assert not torch.allclose(model.schedule.log_snr, initial, atol=1e-3)  # it has learned

    plan = make_plan(model, SamplingConfig(sampler="ancestral", steps=10))
    x_T = torch.randn(2, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    label = torch.tensor([0, 1])
    x_0 = run_plan(plan, partial(model.predict_x_0, label=label), x_T, lambda i: x_T)
    assert x_0.isfinite().all()
    assert x_0.std() > 0.1
