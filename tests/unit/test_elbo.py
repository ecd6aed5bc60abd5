"""The bound on Gaussian data, for which every term and the likelihood itself are known."""

import math
from itertools import pairwise

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.distributions import Normal, kl_divergence

from pipeline.diffusion.config import DiffusionConfig, Variance
from pipeline.diffusion.elbo import (
    bound_term,
    continuous_term,
    discretised_gaussian_nll,
    elbo,
    log_variances,
    mean_and_fraction,
    prior_term,
    reconstruction_term,
)
from pipeline.diffusion.gaussian import like, q_posterior, q_sample
from pipeline.diffusion.schedules import Schedule, cosine, linear, make_schedule

MEAN, STD = 0.3, 0.4
VALUES = 2 * torch.arange(256, dtype=torch.float64) / 255 - 1
"""The 256 values of a pixel."""


def posterior_variance(alpha_bar: Tensor) -> Tensor:
    """Var(x_0 | x_t) for x_0 ~ N(MEAN, STD²)."""
    return STD**2 * (1 - alpha_bar) / (alpha_bar * STD**2 + 1 - alpha_bar)


def exact_x_0(x_t: Tensor, alpha_bar: Tensor) -> Tensor:
    """E[x_0 | x_t]."""
    gain = alpha_bar.sqrt() * STD**2 / (alpha_bar * STD**2 + 1 - alpha_bar)
    return MEAN + like(gain, x_t) * (x_t - like(alpha_bar.sqrt(), x_t) * MEAN)


def quadrature(n: int) -> tuple[Tensor, Tensor]:
    """Nodes and weights (n,) of an expectation under N(0, 1)."""
    x, w = np.polynomial.hermite_e.hermegauss(n)
    return torch.from_numpy(x), torch.from_numpy(w / w.sum())


def expected_terms(
    schedule: Schedule, variance: Variance, fraction: Tensor | None = None
) -> Tensor:
    """E[L_t] over x_0 and x_t with the optimal predictor, t = 1 .. T-1, in nats: (T-1,).

    The terms are quadratic in both, so that a few nodes are exact. fraction: (T,) or None.
    """
    nodes, weights = quadrature(5)
    x_0, eps = (v.flatten() for v in torch.meshgrid(MEAN + STD * nodes, nodes, indexing="ij"))
    mass = torch.outer(weights, weights).flatten()
    terms = []
    for step in range(1, schedule.timesteps):
        t = torch.full((len(x_0),), float(step), dtype=torch.float64)
        alpha_bar = schedule.alpha_bar_at(t)
        x_t = q_sample(x_0[:, None], eps[:, None], alpha_bar)
        learned = None if fraction is None else fraction[step].expand(len(x_0), 1)
        term = bound_term(schedule, variance, t, x_0[:, None], exact_x_0(x_t, alpha_bar), learned)
        terms.append((mass * term).sum() * math.log(2))
    return torch.stack(terms)


def expected_prior(schedule: Schedule) -> float:
    """E[L_T] over x_0, in nats."""
    nodes, weights = quadrature(5)
    prior = prior_term((MEAN + STD * nodes)[:, None], schedule.alpha_bar[-1])
    return float((weights * prior).sum()) * math.log(2)


# --- terms ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_a_term_is_the_divergence_of_two_gaussians(variance: Variance) -> None:
    schedule = linear(60)
    generator = torch.Generator().manual_seed(0)
    t = torch.arange(1, 60, dtype=torch.float64)
    x_0, x_t, x_0_hat, fraction = torch.randn(
        4, 59, 2, 3, 3, generator=generator, dtype=torch.float64
    )
    alpha_bar_t, alpha_bar_s = schedule.alpha_bar[1:], schedule.alpha_bar[:-1]
    mean, small = q_posterior(x_0, x_t, alpha_bar_t, alpha_bar_s)
    model_mean, _ = q_posterior(x_0_hat, x_t, alpha_bar_t, alpha_bar_s)
    small, large = like(small, x_0), like(schedule.beta[1:], x_0)
    model_variance = {
        "fixed_small": small.expand_as(x_0),
        "fixed_large": large.expand_as(x_0),
        "learned_range": (fraction * large.log() + (1 - fraction) * small.log()).exp(),
    }[variance]
    want = kl_divergence(Normal(mean, small.sqrt()), Normal(model_mean, model_variance.sqrt()))
    got = bound_term(schedule, variance, t, x_0, x_0_hat, fraction)
    torch.testing.assert_close(got, want.mean((1, 2, 3)) / math.log(2), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("schedule", [linear(100), cosine(100)], ids=["linear", "cosine"])
def test_expected_terms_are_half_the_fall_of_the_snr_times_the_error(schedule: Schedule) -> None:
    """E[L_t] = ½ (SNR_{t-1} - SNR_t) Var(x_0 | x_t); Kingma et al. 2021."""
    snr = schedule.log_snr.exp()
    want = (snr[:-1] - snr[1:]) / 2 * posterior_variance(schedule.alpha_bar[1:])
    torch.testing.assert_close(expected_terms(schedule, "fixed_small"), want, rtol=1e-8, atol=0)


def test_the_prior_term_is_the_divergence_from_the_standard_normal() -> None:
    x_0 = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(4, 1, 3)
    for alpha_bar in (cosine(1000).alpha_bar[-1], linear(50).alpha_bar[-1], torch.tensor(0.9)):
        alpha_bar = alpha_bar.double()
        q = Normal(alpha_bar.sqrt() * x_0, (1 - alpha_bar).sqrt().expand_as(x_0))
        want = kl_divergence(q, Normal(torch.zeros_like(x_0), 1.0)).mean((1, 2)) / math.log(2)
        torch.testing.assert_close(prior_term(x_0, alpha_bar), want, rtol=1e-8, atol=1e-12)


def test_the_variance_of_the_first_timestep_is_that_of_the_second() -> None:
    """log β̃_0 is log 0: a clamp at 1e-20 would give -46, and the decoder with it."""
    schedule = linear(1000)
    small, large = log_variances(schedule, torch.tensor([0.0, 1.0, 2.0], dtype=torch.float64))
    beta, alpha_bar = schedule.beta, schedule.alpha_bar
    tilde = (beta[1] * (1 - alpha_bar[0]) / (1 - alpha_bar[1])).log()
    assert small[0] == small[1]
    assert small[1].item() == pytest.approx(tilde.item(), rel=1e-10)
    assert small[0].item() == pytest.approx(-9.82, abs=0.01)
    torch.testing.assert_close(large, beta[:3].log(), rtol=1e-10, atol=0)


def test_where_a_batch_holds_many_timesteps_each_row_gets_its_own_term() -> None:
    schedule = cosine(20)
    generator = torch.Generator().manual_seed(3)
    x_0 = VALUES[torch.randint(0, 256, (6, 1, 2, 2), generator=generator)]
    x_0_hat, fraction = torch.rand(2, 6, 1, 2, 2, generator=generator, dtype=torch.float64)
    t = torch.tensor([0, 7, 0, 19, 1, 0], dtype=torch.float64)
    together = bound_term(schedule, "learned_range", t, x_0, x_0_hat, fraction)
    alone = [
        bound_term(schedule, "learned_range", t[i : i + 1], *(v[i : i + 1] for v in rows))
        for rows in [(x_0, x_0_hat, fraction)]
        for i in range(6)
    ]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-12, atol=0)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_terms_and_gradients_are_finite_in_float32_at_both_ends(variance: Variance) -> None:
    """x̂_0 from a wrong ε is 20,000 at the end of cosine; zero terminal SNR has log-SNR -∞."""
    zero = make_schedule(DiffusionConfig(schedule="cosine", prediction="v", zero_terminal_snr=True))
    for schedule in (cosine(1000), linear(1000), zero):
        t = torch.tensor([0.0, 1.0, 998.0, 999.0], dtype=torch.float64)
        scale = torch.tensor([1.0, 1.0, 600.0, 20_000.0]).reshape(4, 1, 1, 1)
        x_0_hat = (scale * torch.linspace(-1, 1, 8).reshape(1, 1, 2, 4)).requires_grad_()
        fraction = torch.linspace(-0.5, 1.5, 32).reshape(4, 1, 2, 4).requires_grad_()
        term = bound_term(schedule, variance, t, torch.ones(4, 1, 2, 4), x_0_hat, fraction)
        assert term.dtype == torch.float32
        term.sum().backward()
        assert term.isfinite().all()
        assert x_0_hat.grad is not None and x_0_hat.grad.isfinite().all()
        if variance == "learned_range":
            assert fraction.grad is not None and fraction.grad.isfinite().all()


def test_the_halves_of_an_output_are_the_mean_and_the_fraction() -> None:
    output = torch.stack([torch.full((2, 2), v) for v in (0.3, 0.4, -1.0, 1.0)])[None]
    mean, fraction = mean_and_fraction(output)
    assert mean[0, :, 0, 0].tolist() == pytest.approx([0.3, 0.4])
    assert fraction[0, :, 0, 0].tolist() == [0.0, 1.0]


# --- decoder -------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean", [-1.3, -1.0, 0.0, 0.123, 1.0])
@pytest.mark.parametrize("std", [1e-3, 0.007, 0.2, 3.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_masses_of_all_bins_sum_to_one(mean: float, std: float, dtype: torch.dtype) -> None:
    nll = discretised_gaussian_nll(
        VALUES.to(dtype), torch.tensor(mean, dtype=dtype), torch.tensor(2 * math.log(std))
    )
    total = float((-nll.double()).exp().sum())
    assert total == pytest.approx(1.0, abs=1e-12 if dtype == torch.float64 else 2e-5)


def test_the_mass_of_a_bin_is_a_difference_of_distribution_functions() -> None:
    normal = Normal(torch.tensor(0.1, dtype=torch.float64), 0.05)
    want = normal.cdf(VALUES + 1 / 255) - normal.cdf(VALUES - 1 / 255)
    got = discretised_gaussian_nll(VALUES, normal.mean, 2 * normal.stddev.log())
    near = (VALUES - 0.1).abs() < 0.2  # beyond, the difference itself has lost its digits
    torch.testing.assert_close((-got).exp()[near], want[near], rtol=1e-10, atol=0)


def test_a_bin_far_in_the_tail_has_the_logarithm_of_its_density() -> None:
    """At 40 σ the mass is e^-800: a difference of distribution functions would be 0."""
    value = VALUES[200:201]
    std = torch.tensor(0.01, dtype=torch.float64)
    mean = (value - 0.4).requires_grad_()
    nll = discretised_gaussian_nll(value, mean, 2 * std.log())
    # nearly all of the mass lies at the bin's edge that is nearer to the mean
    z = (0.4 - 1 / 255) / 0.01
    want = z**2 / 2 + math.log(z) + math.log(2 * math.pi) / 2
    assert nll.item() == pytest.approx(want, abs=1e-3)
    nll.sum().backward()
    assert mean.grad is not None and mean.grad.item() == pytest.approx(-z / 0.01, rel=2e-3)


# --- the whole bound -----------------------------------------------------------------------------


def excess_over_the_entropy(
    schedule: Schedule, variance: Variance, fraction: Tensor | None = None
) -> float:
    """prior + Σ L_t + H(x_0 | x_t, t = 0) - H(x_0) - KL(q(x_T) ‖ N(0, 1)), in nats.

    With the exact last step in place of the decoder, the bound exceeds the entropy of the data by
    what the start costs, the KL, and by what the reverse steps fall short of the true ones.
    """
    terms = expected_terms(schedule, variance, fraction)
    first, last = schedule.alpha_bar[0], schedule.alpha_bar[-1]
    marginal = Normal(last.sqrt() * MEAN, (last * STD**2 + 1 - last).sqrt())
    start = kl_divergence(marginal, Normal(torch.zeros_like(last), 1.0))
    entropies = (posterior_variance(first) / STD**2).log() / 2
    return expected_prior(schedule) + float(terms.sum() + entropies - start)


@pytest.mark.parametrize("schedule", [linear(80), cosine(10)], ids=["linear-80", "cosine-10"])
def test_with_the_optimal_variance_the_bound_is_tight(schedule: Schedule) -> None:
    """The true reverse steps of Gaussian data are Gaussian, with a variance between β̃ and β."""
    small, large = log_variances(schedule, torch.arange(schedule.timesteps, dtype=torch.float64))
    before, after = schedule.alpha_bar[:-1], schedule.alpha_bar[1:]
    c_x_0 = before.sqrt() * schedule.beta[1:] / (1 - after)
    true = small[1:].exp() + c_x_0**2 * posterior_variance(after)
    fraction = torch.zeros(schedule.timesteps, dtype=torch.float64)
    fraction[1:] = (true.log() - small[1:]) / (large - small)[1:]
    assert ((fraction >= 0) & (fraction <= 1)).all()
    excess = excess_over_the_entropy(schedule, "learned_range", fraction)
    assert excess == pytest.approx(0, abs=1e-9)
    assert excess_over_the_entropy(schedule, "fixed_small") > 0.1  # the power of this test


def test_with_a_fixed_variance_the_bound_approaches_the_entropy_as_one_over_t() -> None:
    excess = [excess_over_the_entropy(linear(T), "fixed_large") for T in (100, 200, 400, 800)]
    assert min(excess) > 0
    ratios = [a / b for a, b in pairwise(excess)]
    assert ratios == pytest.approx([2, 2, 2], rel=0.15), excess


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_the_bound_of_a_pixel_is_above_its_exact_likelihood(variance: Variance) -> None:
    """The chain of a linear predictor is Gaussian up to the decoder, so that the probability of
    each of the 256 values is known."""
    schedule = linear(100)
    T, alpha_bar = 100, schedule.alpha_bar
    small, large = log_variances(schedule, torch.arange(T, dtype=torch.float64))
    sigma2 = (large if variance == "fixed_large" else small).exp()
    sigma2[0] = small[0].exp()
    # x_t's law under the model, from N(0, 1) down
    mean, var = 0.0, 1.0
    for t in reversed(range(T)):
        a_t = float(alpha_bar[t])
        a_s = float(alpha_bar[t - 1]) if t else 1.0
        c_x_0 = a_s**0.5 * (1 - a_t / a_s) / (1 - a_t)
        c_x = (a_t / a_s) ** 0.5 * (1 - a_s) / (1 - a_t)
        gain = a_t**0.5 * STD**2 / (a_t * STD**2 + 1 - a_t)
        slope = c_x + c_x_0 * gain
        mean = slope * mean + c_x_0 * (1 - gain * a_t**0.5) * MEAN
        var = slope**2 * var + float(sigma2[t])
    exact = discretised_gaussian_nll(
        VALUES, torch.tensor(mean, dtype=torch.float64), torch.tensor(math.log(var))
    ) / math.log(2)
    assert float((-exact * math.log(2)).exp().sum()) == pytest.approx(1, abs=1e-9)

    nodes, weights = quadrature(64)
    bound = prior_term(VALUES[:, None], alpha_bar[-1])
    x_0 = VALUES.repeat_interleave(64)[:, None]
    eps = nodes.repeat(256)[:, None]
    for step in range(T):
        t = torch.full((len(x_0),), float(step), dtype=torch.float64)
        a = schedule.alpha_bar_at(t)
        term = bound_term(schedule, variance, t, x_0, exact_x_0(q_sample(x_0, eps, a), a))
        bound = bound + term.reshape(256, 64) @ weights
    excess = bound - exact
    assert (excess > 0).all()


def test_the_evaluation_takes_every_term_once_with_its_own_noise() -> None:
    T = 50  # in calls of 21, 21 and 8 timesteps
    schedule = cosine(T)
    generator = torch.Generator().manual_seed(5)
    x_0 = VALUES[torch.randint(0, 256, (3, 1, 2, 2), generator=generator)]
    noise = torch.randn(T, 3, 1, 2, 2, generator=generator, dtype=torch.float64)

    def predict(x_t: Tensor, t: Tensor, alpha_bar: Tensor) -> tuple[Tensor, Tensor]:
        return exact_x_0(x_t, alpha_bar), like(t / T, x_t).expand_as(x_t)

    got = elbo(x_0, schedule, "learned_range", predict, lambda t: noise[t])
    want = torch.zeros(3, T, dtype=torch.float64)
    for i in range(3):
        for step in range(T):
            t = torch.tensor([step], dtype=torch.float64)
            a = schedule.alpha_bar[step : step + 1]
            x_0_hat, fraction = predict(q_sample(x_0[i : i + 1], noise[step, i : i + 1], a), t, a)
            term = bound_term(schedule, "learned_range", t, x_0[i : i + 1], x_0_hat, fraction)
            want[i, step] = term[0]
    torch.testing.assert_close(got.terms, want, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got.per_timestep, want.mean(0), rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(got.total, want.sum(1) + got.prior, rtol=1e-10, atol=0)
    assert got.spread.item() == pytest.approx(float(got.total.std()))
    again = elbo(x_0, schedule, "learned_range", predict, lambda t: noise[t])
    assert torch.equal(again.total, got.total)


# --- continuous time -----------------------------------------------------------------------------


def test_discrete_terms_converge_to_the_continuous_one() -> None:
    """T L_t → ½ γ'(u) ‖ε - ε̂‖², so that one is the limit of the other."""
    T = 20_000
    schedule = linear(T)
    t = torch.tensor([4000.0, 10_000.0, 19_000.0], dtype=torch.float64)
    alpha_bar = schedule.alpha_bar_at(t)
    generator = torch.Generator().manual_seed(2)
    x_0, eps, eps_hat = torch.randn(3, 3, 5, generator=generator, dtype=torch.float64)
    x_t = q_sample(x_0, eps, alpha_bar)
    x_0_hat = (x_t - like((1 - alpha_bar).sqrt(), x_t) * eps_hat) / like(alpha_bar.sqrt(), x_t)
    gamma_slope = -T * (schedule.log_snr[t.long() + 1] - schedule.log_snr[t.long() - 1]) / 2
    torch.testing.assert_close(
        T * bound_term(schedule, "fixed_small", t, x_0, x_0_hat),
        continuous_term(gamma_slope, eps, eps_hat),
        rtol=2e-3,
        atol=0,
    )


def test_the_reconstruction_is_a_distribution_over_the_values_of_a_pixel() -> None:
    """-log of the mass about x_t/√ᾱ; the masses of all values at one x_t sum to one."""
    log_snr = torch.tensor(9.0, dtype=torch.float64)
    std = math.exp(-4.5)
    seen = 0.31  # x_t/√ᾱ
    eps = ((seen - VALUES) / std)[:, None]
    nats = reconstruction_term(VALUES[:, None], eps, log_snr) * math.log(2)
    assert float((-nats).exp().sum()) == pytest.approx(1.0, abs=1e-10)
