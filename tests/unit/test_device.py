"""A device that is not the CPU: whatever runs on one runs on the other, and which of them waits.

Where torch sees a GPU the tests run there, up to rounding; elsewhere on the device of apart.py,
whose arithmetic is the CPU's: there results are equal bit for bit, and copies are counted.
"""

import contextlib
import itertools
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline import storage
from pipeline.data.batches import Batches, FullShuffle
from pipeline.data.shards import NO_LABEL, ImageSet
from pipeline.device import CPU
from pipeline.diffusion.config import DiffusionConfig
from pipeline.diffusion.schedules import make_schedule
from pipeline.evaluation.config import NetworkFile
from pipeline.evaluation.extractor_files import find_by
from pipeline.evaluation.extractors import by_classifier
from pipeline.evaluation.features import train_classifier
from pipeline.evaluation.inception import Inception
from pipeline.evaluation.likelihood import elbo_of, ode_bits_of
from pipeline.evaluation.metrics import holdout_loss
from pipeline.networks.backbone import dropout_keys, set_checkpointing
from pipeline.networks.config import DiTConfig, UNetConfig
from pipeline.samplers.config import SamplingConfig
from pipeline.samplers.model import Model, ModelSpec, build_model
from pipeline.serving import offline
from pipeline.serving.config import Mode
from pipeline.serving.engine import Engine, ImageRequest
from pipeline.training import checkpoint
from pipeline.training.config import TrainingConfig
from pipeline.training.ema import EmaConfig
from pipeline.training.inputs import step_inputs
from pipeline.training.loop import TrainState, make_state, train
from pipeline.training.watch import Watch
from tests.unit import apart
from tests.unit.apart import Traffic

KIND = "cuda" if torch.cuda.is_available() else "apart"
ON_APART = pytest.mark.skipif(KIND != "apart", reason="a GPU counts no copies")
UNET = UNetConfig(base_channels=8, channel_multipliers=[1, 2], attention_at=[4])
DIT = DiTConfig(patch_size=2, width=16, depth=2, heads=2)


@pytest.fixture
def device() -> Iterator[torch.device]:
    """The GPU, else the device of apart.py."""
    if KIND == "apart":
        apart.load()
    with (
        # the threads of autograd are as many as there were devices when it first ran
        torch.autograd.set_multithreading_enabled(KIND == "cuda"),
        sdpa_kernel(SDPBackend.MATH),  # on both sides
    ):
        yield torch.device(KIND, 0)


def assert_same(got: Tensor, want: Tensor) -> None:
    """Equal bit for bit, on a GPU up to rounding."""
    got, want = got.detach().cpu(), want.detach().cpu()
    if KIND == "apart":
        assert torch.equal(got, want)
    else:
        torch.testing.assert_close(got, want, rtol=2e-3, atol=2e-4)


def assert_same_pixels(got: np.ndarray, want: np.ndarray) -> None:
    apart_by = np.abs(got.astype(int) - want.astype(int))
    assert apart_by.max() <= (0 if KIND == "apart" else 2)


@contextlib.contextmanager
def no_waiting() -> Iterator[None]:
    """Fails if the host waits for the device within."""
    if KIND == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
    else:
        before = apart.traffic()
        yield
        assert (apart.traffic() - before).waits == 0


def make_spec(network: UNetConfig | DiTConfig = UNET, **diffusion: object) -> ModelSpec:
    return ModelSpec(
        network=network,
        diffusion=DiffusionConfig.model_validate({"schedule": "cosine", **diffusion}),
        channels=1,
        image_size=8,
        class_names=["a", "b", "c"],
        has_null_label=True,
    )


def weights_of(spec: ModelSpec) -> dict[str, Tensor]:
    """Of a network that was not trained, but whose zero-initialised layers do something."""
    torch.manual_seed(0)
    named = spec.make_network().state_dict().items()
    return {n: t if t.any() else torch.randn(t.shape) * 0.2 for n, t in named}


def make_model(spec: ModelSpec) -> Model:
    return build_model(spec, weights_of(spec), "digest")


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


# --- the engine -----------------------------------------------------------------------------------

SETTINGS = [
    SamplingConfig(sampler="ddim", steps=5),
    SamplingConfig(sampler="ddim", steps=7, eta=0.5, guidance=1.5),
    SamplingConfig(sampler="ancestral", steps=3, guidance=0.3),
    SamplingConfig(sampler="euler", steps=4, churn=2.0, spacing="karras"),
    SamplingConfig(sampler="heun", steps=4, churn=2.0, spacing="karras"),
    SamplingConfig(sampler="dpm_solver_pp", steps=4, order=3, guidance=1.5, guidance_rescale=0.7),
    SamplingConfig(sampler="dpm_solver_pp", steps=4, stochastic=True),
    SamplingConfig(sampler="dpm_solver", steps=2, singlestep=True, spacing="log_snr"),
    SamplingConfig(sampler="unipc", steps=5, guidance=2.0, guidance_interval=(0.2, 4.0)),
    SamplingConfig(sampler="pndm", steps=4, spacing="leading", threshold_quantile=0.9),
    SamplingConfig(sampler="deis", steps=4, order=3, clip_x_0=False),
    SamplingConfig(sampler="euler_maruyama", steps=6, spacing="linspace"),
]
OFFLINE = [
    SamplingConfig(sampler="langevin", steps=3),
    SamplingConfig(sampler="langevin", steps=3, predictor="none", guidance=0.5),
    SamplingConfig(sampler="ode", rtol=1e-2, atol=1e-2, threshold_quantile=0.95),
]


def requests_of(settings: list[SamplingConfig], each: int) -> list[ImageRequest]:
    return [ImageRequest(5, i, i % 3, s) for s in settings for i in range(each)]


@pytest.mark.parametrize("mode", ["exact", "fast"])
@pytest.mark.parametrize("variance", ["fixed_small", "learned_range"])
def test_the_engine_draws_what_it_draws_on_the_cpu(
    device: torch.device, mode: Mode, variance: str
) -> None:
    spec, requests = make_spec(variance=variance), requests_of(SETTINGS, 2)
    want = Engine(make_model(spec), mode).draw(requests)
    assert_same_pixels(Engine(make_model(spec), mode, device=device).draw(requests), want)


def test_frames_are_handed_out_on_the_cpu(device: torch.device) -> None:
    request, spec = requests_of(SETTINGS[2:3], 1)[0], make_spec(DIT)
    found = []
    for place in (CPU, device):
        engine = Engine(make_model(spec), device=place)
        engine.add(request, frames=2)
        found.append([frame for _ in range(3) for frame in engine.step().frames])
    assert len(found[0]) == len(found[1]) == 2
    for want, got in zip(*found, strict=True):
        assert got.x_t.device == got.x_0.device == CPU
        assert_same(got.x_t, want.x_t)
        assert_same(got.x_0, want.x_0)


@pytest.mark.parametrize("sampling", SETTINGS, ids=lambda sampling: sampling.sampler)
def test_a_network_call_brings_back_only_images_that_are_done(
    device: torch.device, sampling: SamplingConfig
) -> None:
    engine = Engine(make_model(make_spec()), device=device)
    engine.add(requests_of([sampling], 1)[0])
    engine.step()
    engine.add(requests_of([sampling], 2)[1])
    steps = 0
    while engine.num_images:
        before = apart.traffic() if KIND == "apart" else None
        finishes = bool((engine._book["remaining"] == engine._book["rows"])[:2].any())
        with contextlib.nullcontext() if finishes else no_waiting():
            step = engine.step()
        assert finishes == bool(step.finished)
        if before is not None:
            crossed = apart.traffic() - before
            assert crossed.to_device <= 3  # plan rows, the order of the rows, noise
            assert crossed.to_host == crossed.waits == finishes
        steps += 1
    assert steps >= 2
    if KIND == "apart":
        before = apart.traffic()
        engine.add(requests_of([sampling], 1)[0])
        assert apart.traffic() - before == Traffic(1, 0, 0)


def test_the_engine_warms_up_on_the_device(device: torch.device) -> None:
    assert Engine(make_model(make_spec()), "fast", 4, device).warm_up() > 0


@pytest.mark.parametrize("sampling", OFFLINE, ids=["langevin", "correctors alone", "ode"])
def test_offline_samplers_draw_what_they_draw_on_the_cpu(
    device: torch.device, sampling: SamplingConfig
) -> None:
    spec, requests = make_spec(variance="learned_range"), requests_of([sampling], 3)
    want = offline.draw(make_model(spec), requests)
    got = offline.draw(make_model(spec), requests, device=device)
    assert_same_pixels(got.pixels, want.pixels)
    if KIND == "apart":
        assert np.array_equal(got.evaluations, want.evaluations)


# --- evaluation -----------------------------------------------------------------------------------


def some_images(n: int, size: int = 8) -> ImageSet:
    rng = np.random.default_rng(1)
    pixels = rng.integers(0, 256, (n, size, size, 1), dtype=np.uint8)
    return ImageSet(pixels, np.arange(n) % 4 - 1)


@pytest.mark.parametrize("variance", ["fixed_large", "learned_range"])
def test_held_out_figures_are_those_of_the_cpu(device: torch.device, variance: str) -> None:
    spec = make_spec(prediction="v", variance=variance, timesteps=40)
    images, positions = some_images(5), np.arange(5)
    want, got = (elbo_of(make_model(spec), images, positions, 2, at) for at in (CPU, device))
    assert_same(got.prior, want.prior)
    assert_same(got.terms, want.terms)
    loss = [holdout_loss(make_model(spec), images, 2, at).loss for at in (CPU, device)]
    assert_same(loss[1], loss[0])


@pytest.mark.parametrize("trace", ["hutchinson", "exact"])
def test_the_likelihood_by_the_ode_is_that_of_the_cpu(device: torch.device, trace: Any) -> None:
    network = UNetConfig(base_channels=4, channel_multipliers=[1])
    spec = make_spec(network, prediction="v", timesteps=40).model_copy(update={"image_size": 2})
    images, positions = some_images(1, 2), np.arange(1)
    want, got = (
        ode_bits_of(make_model(spec), images, positions, 2, trace, device=at)
        for at in (CPU, device)
    )
    assert_same(got.bits, want.bits)
    assert got.evaluations.device == CPU


def test_the_classifier_is_fitted_and_finds_features_on_the_device(device: torch.device) -> None:
    images, few = some_images(64), some_images(16)
    fit = partial(train_classifier, images, few, 3, seed=1, epochs=1)
    found = []
    for place in (CPU, device):
        classifier = fit(device=place)
        assert next(classifier.network.parameters()).device == CPU
        extract = by_classifier("judge", "", classifier, place)
        found.append(extract(few.images))
    want, got = found
    assert got.features.device == CPU
    torch.testing.assert_close(got.features, want.features, rtol=1e-3, atol=1e-3)
    assert got.log_probs is not None and got.log_probs.device == CPU


def test_networks_of_others_find_features_on_the_device(
    device: torch.device, tmp_path: Path
) -> None:
    path = tmp_path / "net.pt"
    network = torch.nn.Sequential(
        torch.nn.Conv2d(3, 4, 3), torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten()
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.trace(network, torch.zeros(1, 3, 16, 16)), path)  # type: ignore[no-untyped-call]
    data = path.read_bytes()
    config = NetworkFile(
        kind="file", file=str(path), sha256=storage.sha256(data), name="mine", image_size=16
    )
    pixels = some_images(3).images
    want, got = (find_by(config, data, at)(pixels)[0] for at in (CPU, device))
    assert got.device == CPU
    assert_same(got, want)
    torch.manual_seed(0)
    inception, x = Inception().eval(), torch.randn(1, 3, 75, 75)
    with torch.inference_mode():
        whole = inception(x)
        for one, other in zip(inception.to(device)(x.to(device)), whole, strict=True):
            assert_same(one, other)
