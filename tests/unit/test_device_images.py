"""Engine, samplers and evaluation on a device that is not the CPU: see devices.py."""

import contextlib
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from pipeline import storage
from pipeline.data.shards import ImageSet
from pipeline.device import CPU
from pipeline.evaluation.config import NetworkFile
from pipeline.evaluation.extractor_files import find_by
from pipeline.evaluation.extractors import by_classifier
from pipeline.evaluation.features import train_classifier
from pipeline.evaluation.inception import Inception
from pipeline.evaluation.likelihood import elbo_of, ode_bits_of
from pipeline.evaluation.metrics import holdout_loss
from pipeline.networks.config import UNetConfig
from pipeline.samplers.config import SamplingConfig
from pipeline.serving import offline
from pipeline.serving.config import Mode
from pipeline.serving.engine import Engine, ImageRequest
from tests.unit import apart
from tests.unit.apart import Traffic
from tests.unit.devices import (
    DIT,
    KIND,
    assert_same,
    assert_same_pixels,
    make_model,
    make_spec,
    no_waiting,
)

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
