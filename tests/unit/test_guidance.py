"""Classifier-free guidance, its rescale and its interval."""

import pytest
import torch

from pipeline.diffusion.config import Prediction
from pipeline.diffusion.guidance import guided, rescaled
from pipeline.diffusion.parameterisation import convert
from pipeline.diffusion.schedules import linear
from pipeline.samplers.config import SamplingConfig
from pipeline.samplers.ddim import ddim
from pipeline.samplers.plan import ALPHA_BAR, GUIDANCE, with_settings
from pipeline.samplers.spacing import make_times


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


def noise(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def test_guidance_extrapolates_and_weight_zero_is_the_plain_model() -> None:
    eps_label, eps_null = torch.tensor([[1.0], [1.0]]), torch.tensor([[0.5], [0.5]])
    steered = guided(eps_label, eps_null, f64(0.0, 2.0))
    assert steered.flatten().tolist() == [1.0, 3 * 1.0 - 2 * 0.5]


@pytest.mark.parametrize("prediction", ["x_0", "v", "score", "edm"])
def test_guiding_any_parameterisation_guides_epsilon(prediction: Prediction) -> None:
    x_t, eps_label, eps_null = noise(3, 2, 1, 4, 4)
    alpha_bar, w = f64(0.9, 0.2), f64(1.5, 4.0)
    label, null = (convert(eps, "eps", prediction, x_t, alpha_bar) for eps in (eps_label, eps_null))
    got = convert(guided(label, null, w), prediction, "eps", x_t, alpha_bar)
    torch.testing.assert_close(got, guided(eps_label, eps_null, w), rtol=0, atol=1e-11)


def test_rescale_restores_the_contrast_of_the_conditional_output() -> None:
    label, null = noise(2, 3, 1, 8, 8)
    steered = guided(label, null, f64(3.0, 3.0, 3.0))
    got = rescaled(steered, label, f64(0.0, 1.0, 0.7))
    std, std_label = steered.flatten(1).std(1), label.flatten(1).std(1)
    want = torch.stack([std[0], std_label[1], 0.7 * std_label[2] + 0.3 * std[2]])
    torch.testing.assert_close(got.flatten(1).std(1), want)
    torch.testing.assert_close(got[0], steered[0])


def test_guidance_has_an_interval_of_noise_levels() -> None:
    schedule = linear(1000)
    plan = ddim(schedule, make_times(schedule, 20, "trailing"), 0.0)
    config = SamplingConfig(steps=20, guidance=2.0, guidance_interval=(0.3, 5.0))
    table = with_settings(plan, config).table
    sigma = ((1 - table[:, ALPHA_BAR]) / table[:, ALPHA_BAR]).sqrt()
    within = (sigma >= 0.3) & (sigma <= 5)
    assert 0 < within.sum() < 20
    assert torch.equal(table[:, GUIDANCE], torch.where(within, 2.0, 0.0).double())
