"""ε, x_0, v, the score and F say the same thing of x_t."""

import itertools

import pytest
import torch
from torch import Tensor

from pipeline.diffusion.config import DiffusionConfig, Prediction
from pipeline.diffusion.gaussian import like, q_sample
from pipeline.diffusion.parameterisation import (
    convert,
    edm_coefficients,
    eps_from,
    network_input,
    target,
    x_0_from,
)
from pipeline.diffusion.schedules import cosine, make_schedule

ALL: list[Prediction] = ["eps", "x_0", "v", "score", "edm"]
ALPHA_BAR = torch.tensor([1 - 1e-5, 0.99, 0.5, 0.1, 1e-3, 1e-6], dtype=torch.float64)


def noised(dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor, Tensor]:
    """(x_0, eps, x_t), x_0 of standard deviation ½ as images have."""
    generator = torch.Generator().manual_seed(0)
    x_0, eps = torch.randn(2, len(ALPHA_BAR), 3, 8, 8, generator=generator, dtype=torch.float64)
    x_t = q_sample(x_0 / 2, eps, ALPHA_BAR)
    return (x_0 / 2).to(dtype), eps.to(dtype), x_t.to(dtype)


@pytest.mark.parametrize(("given", "wanted"), [*itertools.product(ALL, ALL)])
def test_conversions_are_exact(given: Prediction, wanted: Prediction) -> None:
    x_0, eps, x_t = noised()
    got = convert(target(given, x_0, eps, ALPHA_BAR), given, wanted, x_t, ALPHA_BAR)
    want = target(wanted, x_0, eps, ALPHA_BAR)
    # ε from x_0 (and the score from it) divides by √(1-ᾱ), x_0 from ε by √ᾱ
    scale = float(want.abs().amax() / ((1 - ALPHA_BAR) * ALPHA_BAR).min().sqrt())
    assert (got - want).abs().max() < 1e-14 * scale


@pytest.mark.parametrize("given", ["v", "edm"])
def test_neither_end_amplifies_the_error_of_v_or_f(given: Prediction) -> None:
    """Through x_0, ε at ᾱ = 1e-6 would carry 1,000 times the error of the output."""
    x_0, eps, x_t = noised(torch.float32)
    output = target(given, x_0, eps, ALPHA_BAR)
    assert (eps_from(given, output, x_t, ALPHA_BAR) - eps).abs().max() < 3e-6
    assert (x_0_from(given, output, x_t, ALPHA_BAR) - x_0).abs().max() < 3e-6


def test_x_0_from_eps_has_no_more_error_than_the_mathematics_gives_it() -> None:
    """√(1/ᾱ-1) is 20,291 at the end of cosine: float32's 6e-8 becomes about 1e-3, not more."""
    alpha_bar = cosine(1000).alpha_bar[[0, 500, 998, 999]]
    x_0, eps, _ = (x[:4] for x in noised())
    x_t = q_sample(x_0, eps, alpha_bar)
    got = x_0_from("eps", eps.float(), x_t.float(), alpha_bar).double()
    amplification = ((1 - alpha_bar) / alpha_bar).sqrt()
    assert amplification[-1] == pytest.approx(20_291, rel=0.01)
    bound = 4 * 2.0**-24 * (like(amplification, x_0) + 1) * eps.abs().max()
    assert ((got - x_0).abs() < bound).all()


def test_low_precision_outputs_are_converted_in_float32() -> None:
    x_0, eps, x_t = noised(torch.float32)
    output = target("v", x_0, eps, ALPHA_BAR).bfloat16()
    for got in (
        x_0_from("v", output, x_t.bfloat16(), ALPHA_BAR),
        eps_from("v", output, x_t.bfloat16(), ALPHA_BAR),
        convert(output, "v", "x_0", x_t, ALPHA_BAR),
        convert(output, "v", "v", x_t, ALPHA_BAR),
    ):
        assert got.dtype == torch.float32


def test_v_is_the_angular_velocity() -> None:
    """x_φ = cos φ x_0 + sin φ ε, v = dx_φ/dφ (Salimans & Ho 2022, appendix D), by autograd."""
    x_0, eps, _ = noised()
    phi = ALPHA_BAR.sqrt().acos().reshape(-1, 1, 1, 1).expand_as(x_0).clone().requires_grad_()
    dx = torch.autograd.grad((phi.cos() * x_0 + phi.sin() * eps).sum(), phi)[0]
    torch.testing.assert_close(target("v", x_0, eps, ALPHA_BAR), dx, rtol=0, atol=1e-12)


def test_the_score_is_the_gradient_of_the_log_density() -> None:
    """-ε/√(1-ᾱ) = ∇ log q(x_t | x_0), the density by torch.distributions, by autograd."""
    x_0, eps, x_t = noised()
    x_t.requires_grad_()
    mean, std = like(ALPHA_BAR.sqrt(), x_0) * x_0, like((1 - ALPHA_BAR).sqrt(), x_0)
    log_density = torch.distributions.Normal(mean, std).log_prob(x_t).sum()
    score = torch.autograd.grad(log_density, x_t)[0]
    torch.testing.assert_close(target("score", x_0, eps, ALPHA_BAR), score, rtol=1e-9, atol=1e-9)


def test_the_marginal_score_is_the_expected_one_for_a_mixture() -> None:
    """∇ log q(x_t) = -E[ε | x_t]/√(1-ᾱ) for a Gaussian mixture, by autograd of log q(x_t)."""
    means = torch.tensor([-0.8, 0.1, 0.9], dtype=torch.float64)
    weights, std = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64), 0.1
    alpha_bar = torch.tensor(0.3, dtype=torch.float64)
    x_t = torch.linspace(-3, 3, 61, dtype=torch.float64, requires_grad=True)
    marginal = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(weights),
        torch.distributions.Normal(
            alpha_bar.sqrt() * means, (alpha_bar * std**2 + 1 - alpha_bar).sqrt().expand(3)
        ),
    )
    log_density = marginal.log_prob(x_t)
    score = torch.autograd.grad(log_density.sum(), x_t)[0]
    # E[x_0 | x_t] by quadrature over x_0
    x_0 = torch.linspace(-2, 2, 40_001, dtype=torch.float64)[:, None]
    prior = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(weights),
        torch.distributions.Normal(means, std),
    )
    log_joint = prior.log_prob(x_0) + torch.distributions.Normal(
        alpha_bar.sqrt() * x_0, (1 - alpha_bar).sqrt()
    ).log_prob(x_t.detach())
    x_0_hat = (log_joint.softmax(0) * x_0).sum(0)
    got = convert(x_0_hat, "x_0", "score", x_t.detach(), alpha_bar)
    torch.testing.assert_close(got, score, rtol=1e-7, atol=1e-7)


def test_f_is_that_of_karras_et_al() -> None:
    """Eq. 7 and table 1 as printed, in their space of σ: D = c_skip x + c_out F(c_in x)."""
    x_0, eps, x_t = noised()
    sigma = ((1 - ALPHA_BAR) / ALPHA_BAR).sqrt().reshape(-1, 1, 1, 1)
    x, sigma_data = x_0 + sigma * eps, 0.5
    c_skip = sigma_data**2 / (sigma**2 + sigma_data**2)
    c_out = sigma * sigma_data / (sigma**2 + sigma_data**2).sqrt()
    c_in = 1 / (sigma**2 + sigma_data**2).sqrt()
    F = (x_0 - c_skip * x) / c_out
    torch.testing.assert_close(target("edm", x_0, eps, ALPHA_BAR), F, rtol=1e-9, atol=1e-9)
    config = DiffusionConfig(schedule="edm", prediction="edm")
    image, time = network_input(config, x_t, torch.zeros(len(x_t)).double(), ALPHA_BAR)
    torch.testing.assert_close(image, c_in * x, rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(time, sigma.flatten().log() / 4, rtol=1e-9, atol=1e-9)


def test_f_with_unit_data_is_minus_v() -> None:
    x_0, eps, _ = noised()
    F = target("edm", x_0, eps, ALPHA_BAR, sigma_data=1.0)
    torch.testing.assert_close(F, -target("v", x_0, eps, ALPHA_BAR), rtol=0, atol=1e-12)


def test_input_and_target_of_edm_have_unit_variance() -> None:
    """The principle behind the preconditioning, at every noise level (their appendix B.6)."""
    alpha_bar = make_schedule(DiffusionConfig(schedule="edm")).alpha_bar
    _, _, c_in = edm_coefficients(alpha_bar, 0.5)
    variance_of_x_t = alpha_bar * 0.25 + 1 - alpha_bar
    torch.testing.assert_close(c_in**2 * variance_of_x_t, torch.ones_like(c_in))
    # F = a x_0 + b ε with Var x_0 = ¼
    x_0, eps = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 1.0]).double()
    for one in alpha_bar[::100]:
        a, b = target("edm", x_0, eps, one, 0.5)
        assert float(a**2 / 4 + b**2) == pytest.approx(1, rel=1e-9)


@pytest.mark.parametrize("prediction", ["x_0", "v", "edm"])
def test_everything_is_finite_where_nothing_of_the_image_is_left(prediction: Prediction) -> None:
    zero = torch.zeros(1, dtype=torch.float64)
    x_0, eps, _ = (x[:1] for x in noised())
    output = target(prediction, x_0, eps, zero)
    assert x_0_from(prediction, output, eps, zero).isfinite().all()
    torch.testing.assert_close(eps_from(prediction, output, eps, zero), eps, rtol=0, atol=1e-12)
