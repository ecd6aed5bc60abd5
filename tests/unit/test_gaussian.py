"""The equations of DDPM, held to numbers worked by hand and to each other."""

import pytest
import torch

from pipeline.diffusion.gaussian import (
    p_mean,
    predict_eps,
    predict_x_0,
    q_posterior,
    q_sample,
)
from pipeline.diffusion.losses import simple_loss


def f64(*values: float) -> torch.Tensor:
    return torch.tensor(values if len(values) > 1 else values[0], dtype=torch.float64)


def test_q_sample_of_worked_numbers() -> None:
    x_t = q_sample(f64(2.0), f64(-0.5), f64(0.81))
    assert x_t.item() == pytest.approx(1.582055, abs=1e-6)
    x_t = q_sample(f64(3.0, 0.0), f64(-1.0, 2.0), f64(0.64))
    assert x_t.tolist() == pytest.approx([1.8, 1.2], abs=1e-12)


def test_predict_x_0_of_worked_numbers() -> None:
    x_0 = predict_x_0(f64(1.2, -0.3), f64(0.5, -1.0), f64(0.36))
    assert x_0.tolist() == pytest.approx([4 / 3, 5 / 6], abs=1e-12)


def test_p_mean_of_worked_numbers() -> None:
    mu = p_mean(f64(0.7), f64(0.2), alpha_t=f64(0.9), alpha_bar_t=f64(0.5))
    assert mu.item() == pytest.approx(0.7081, abs=5e-5)


def test_q_tends_to_a_standard_normal_as_alpha_bar_tends_to_zero() -> None:
    x_0, eps = f64(5.0, -7.0), f64(0.3, 1.1)
    for alpha_bar in (1e-4, 1e-8, 1e-12):
        distance = (q_sample(x_0, eps, f64(alpha_bar)) - eps).abs().max().item()
        assert distance < 8 * alpha_bar**0.5
    assert torch.equal(q_sample(x_0, eps, f64(0.0)), eps)


def test_x_0_and_eps_are_inverse_views_of_x_t() -> None:
    generator = torch.Generator().manual_seed(0)
    x_0, eps = torch.randn(2, 4, 3, 8, 8, generator=generator, dtype=torch.float64)
    alpha_bar = f64(0.99, 0.5, 0.1, 1e-3)
    x_t = q_sample(x_0, eps, alpha_bar)
    torch.testing.assert_close(predict_x_0(x_t, eps, alpha_bar), x_0, rtol=0, atol=1e-12)
    torch.testing.assert_close(predict_eps(x_t, x_0, alpha_bar), eps, rtol=0, atol=1e-12)


def test_mean_from_eps_is_the_posterior_mean_at_the_x_0_it_implies() -> None:
    """Eq. 11 is Eq. 7 with x̂_0 of Eq. 15 put in."""
    alpha_bar_s, alpha_t = f64(0.6), f64(0.9)
    alpha_bar_t = alpha_bar_s * alpha_t
    x_t, eps = f64(0.4, -1.3), f64(0.7, 0.2)
    mean, _ = q_posterior(predict_x_0(x_t, eps, alpha_bar_t), x_t, alpha_bar_t, alpha_bar_s)
    torch.testing.assert_close(mean, p_mean(x_t, eps, alpha_t, alpha_bar_t), rtol=0, atol=1e-14)


def test_q_posterior_agrees_with_bayes_rule_by_quadrature() -> None:
    """q(x_s | x_t, x_0) ∝ q(x_t | x_s) q(x_s | x_0), integrated numerically over x_s."""
    alpha_bar_s, alpha_bar_t, x_0, x_t = 0.7, 0.45, 1.3, -0.4
    alpha = alpha_bar_t / alpha_bar_s
    x_s = torch.linspace(-12, 12, 400_001, dtype=torch.float64)
    log_density = -((x_t - alpha**0.5 * x_s) ** 2) / (2 * (1 - alpha))
    log_density = log_density - (x_s - alpha_bar_s**0.5 * x_0) ** 2 / (2 * (1 - alpha_bar_s))
    weight = log_density.softmax(0)
    mean = (weight * x_s).sum()
    variance = (weight * (x_s - mean) ** 2).sum()
    got_mean, got_variance = q_posterior(f64(x_0), f64(x_t), f64(alpha_bar_t), f64(alpha_bar_s))
    assert got_mean.item() == pytest.approx(mean.item(), abs=1e-9)
    assert got_variance.item() == pytest.approx(variance.item(), abs=1e-9)


def test_the_posterior_of_the_last_step_is_the_clean_image() -> None:
    mean, variance = q_posterior(f64(1.5), f64(-0.2), f64(0.99), f64(1.0))
    assert mean.item() == 1.5
    assert variance.item() == 0.0


def test_noising_in_bfloat16_still_adds_noise_at_the_first_timestep() -> None:
    """1 - ᾱ is taken before the cast: 1 - bfloat16(0.9999) would be 0."""
    x_0 = torch.zeros(1, 4, dtype=torch.bfloat16)
    x_t = q_sample(x_0, torch.ones_like(x_0), f64(0.9999).reshape(1))
    assert x_t.float().flatten().tolist() == pytest.approx([0.01] * 4, rel=1e-2)


def test_simple_loss_is_the_mean_square_of_each_image() -> None:
    eps = torch.zeros(2, 1, 2, 2)
    eps_hat = torch.tensor([[[[1.0, 1.0], [1.0, 1.0]]], [[[0.0, 0.0], [0.0, 4.0]]]])
    assert simple_loss(eps, eps_hat).tolist() == [1.0, 4.0]
