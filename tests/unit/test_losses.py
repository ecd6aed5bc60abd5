"""Loss weights against their published forms, in every parameterisation."""

import math
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.diffusion.config import DiffusionConfig, LossWeight, Prediction, ScheduleName
from pipeline.diffusion.gaussian import like, q_sample
from pipeline.diffusion.losses import likelihood_weight, loss_weight, simple_loss
from pipeline.diffusion.parameterisation import edm_coefficients, target, x_0_from
from pipeline.diffusion.schedules import (
    Schedule,
    cosine,
    linear,
    make_schedule,
    schedule_from_alpha_bar,
)

PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)
WEIGHTS: tuple[LossWeight, ...] = get_args(LossWeight)


def times(schedule: Schedule) -> Tensor:
    return torch.arange(schedule.timesteps, dtype=torch.float64)


def of_snr(*snr: float) -> Schedule:
    """A schedule that has these signal-to-noise ratios."""
    values = torch.tensor(snr, dtype=torch.float64)
    return schedule_from_alpha_bar(values / (1 + values))


def test_simple_loss_is_the_mean_square_of_each_image() -> None:
    a = torch.zeros(2, 1, 2, 2)
    b = torch.tensor([1.0, 3.0]).reshape(2, 1, 1, 1).expand(2, 1, 2, 2)
    assert simple_loss(a, b.bfloat16()).tolist() == [1.0, 9.0]
    assert simple_loss(a, b.bfloat16()).dtype == torch.float32


@pytest.mark.parametrize(
    ("prediction", "want"),
    [  # γ = 5, at SNR 100, 5, 2, 0.01
        ("eps", [5 / 100, 1.0, 1.0, 1.0]),
        ("v", [5 / 101, 5 / 6, 2 / 3, 0.01 / 1.01]),
        ("x_0", [5.0, 5.0, 2.0, 0.01]),
    ],
)
def test_min_snr_is_the_published_table(prediction: Prediction, want: list[float]) -> None:
    schedule = of_snr(100.0, 5.0, 2.0, 0.01)
    got = loss_weight("min_snr", prediction, schedule, times(schedule))
    assert got.tolist() == pytest.approx(want, rel=1e-12)


def test_weights_on_the_error_of_eps_are_the_papers() -> None:
    schedule = cosine(100)
    t = times(schedule)
    snr = schedule.log_snr.exp()
    for name, want in {
        "snr": torch.ones_like(snr),
        "p2": (0.5 + snr) ** -1.5,
        "sigmoid": 1 / (1 + snr * math.exp(1.0)),
    }.items():
        got = loss_weight(name, "eps", schedule, t, p2_gamma=1.5, p2_k=0.5, sigmoid_bias=-1.0)  # type: ignore[arg-type]
        torch.testing.assert_close(got, want, rtol=1e-9, atol=0)


def test_the_weight_of_edm_is_one_on_f() -> None:
    """λ(σ) c_out² = 1 (Karras et al. 2022, table 1), with σ from 0.002 to 80."""
    schedule = make_schedule(DiffusionConfig(schedule="edm", prediction="edm"))
    t = torch.linspace(0, 999, 200, dtype=torch.float64)
    got = loss_weight("edm", "edm", schedule, t, sigma_data=0.5)
    torch.testing.assert_close(got, torch.ones_like(got), rtol=1e-9, atol=0)
    sigma = (-schedule.alpha_bar_at(t).logit() / 2).exp()
    published = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    on_x_0 = loss_weight("edm", "x_0", schedule, t, sigma_data=0.5)
    torch.testing.assert_close(on_x_0, published, rtol=1e-9, atol=0)
    _, c_out, _ = edm_coefficients(schedule.alpha_bar_at(t), 0.5)
    torch.testing.assert_close(published * c_out**2, got, rtol=1e-9, atol=0)


@pytest.mark.parametrize("name", [name for name in WEIGHTS if name != "uniform"])
def test_a_weight_means_the_same_in_every_parameterisation(name: LossWeight) -> None:
    """Weight times error is one number for one x̂_0, whatever the network says it in."""
    schedule = cosine(50)
    t = times(schedule)
    alpha_bar = schedule.alpha_bar
    generator = torch.Generator().manual_seed(0)
    x_0, eps, wrong = torch.randn(3, 50, 7, generator=generator, dtype=torch.float64)
    x_t = q_sample(x_0, eps, alpha_bar)
    error = (x_0 - x_0_from("eps", eps + wrong, x_t, alpha_bar)).square().mean(1)
    on_x_0 = loss_weight(name, "x_0", schedule, t) * error
    for prediction in PREDICTIONS:
        # the output that implies the same x̂_0
        eps_hat = eps + wrong
        x_0_hat = x_0_from("eps", eps_hat, x_t, alpha_bar)
        output = target(prediction, x_0_hat, eps_hat, alpha_bar)
        right = target(prediction, x_0, eps, alpha_bar)
        on_output = (right - output).square().mean(1) * loss_weight(name, prediction, schedule, t)
        torch.testing.assert_close(on_output, on_x_0, rtol=1e-6, atol=0)


def test_uniform_is_one_on_the_output() -> None:
    for prediction in PREDICTIONS:
        assert loss_weight("uniform", prediction, cosine(10), torch.zeros(3)).tolist() == [1.0] * 3


@pytest.mark.parametrize("name", WEIGHTS)
@pytest.mark.parametrize("schedule", ["linear", "cosine", "laplace", "vp", "ve", "edm", "zero"])
def test_weights_are_finite_at_every_timestep(name: LossWeight, schedule: str) -> None:
    zero = schedule == "zero"
    kind: ScheduleName = "cosine" if zero else schedule  # type: ignore[assignment]
    process = make_schedule(DiffusionConfig(schedule=kind, zero_terminal_snr=zero, prediction="v"))
    for prediction in PREDICTIONS:
        weight = loss_weight(name, prediction, process, times(process))
        assert weight.isfinite().all()
        assert (weight >= 0).all()
    if zero and name == "min_snr":
        assert loss_weight(name, "v", process, times(process))[-1] == pytest.approx(0, abs=1e-12)


# --- likelihood weighting ------------------------------------------------------------------------


def test_the_likelihood_weight_in_discrete_time_is_that_of_ho() -> None:
    """T β²/(2σ²α(1-ᾱ)) on the error of ε, Ho et al. 2020, Eq. 12, with σ² = β̃."""
    schedule = linear(1000)
    beta, alpha, alpha_bar = schedule.beta, schedule.alpha, schedule.alpha_bar
    before = torch.cat([torch.ones(1, dtype=torch.float64), alpha_bar[:-1]])
    variance = beta * (1 - before) / (1 - alpha_bar)
    variance[0] = variance[1]
    want = 1000 * beta**2 / (2 * variance * alpha * (1 - alpha_bar))
    got = loss_weight("likelihood", "eps", schedule, times(schedule))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=0)


@pytest.mark.parametrize("kind", ["vp", "subvp", "ve", "edm"])
def test_the_likelihood_weight_is_score_matching_with_g_squared(kind: ScheduleName) -> None:
    """½ g(u)² ‖s_θ + ε/s‖² in the SDE's own frame, x = x_t m/√ᾱ (Song et al. 2021)."""
    config = DiffusionConfig(schedule=kind, prediction="score")
    schedule = make_schedule(config)
    assert schedule.sde is not None
    t = torch.linspace(0, 999, 40, dtype=torch.float64)
    alpha_bar, u = schedule.alpha_bar_at(t), schedule.sde_time(t)
    mean, std = schedule.sde.marginal(u)
    generator = torch.Generator().manual_seed(1)
    eps, output = torch.randn(2, 40, 3, generator=generator, dtype=torch.float64)
    to_frame = alpha_bar.sqrt() / mean  # x_t = to_frame x, and ∇_x = to_frame ∇_{x_t}
    own_score = like(to_frame, output) * output
    error = (own_score + eps / std[:, None]).square().mean(1)
    # the u that training visits fill all but t_min of the unit interval
    want = (1 - schedule.sde.t_min) * schedule.sde.diffusion(u) ** 2 / 2 * error
    weight = loss_weight("likelihood", "score", schedule, t)
    wanted = target("score", torch.zeros_like(eps), eps, alpha_bar)
    got = weight * (wanted - output).square().mean(1)
    torch.testing.assert_close(got, want, rtol=1e-7, atol=0)


def test_both_likelihood_weights_agree_as_the_timesteps_grow_dense() -> None:
    continuous = make_schedule(DiffusionConfig(schedule="vp", timesteps=100_000))
    discrete = linear(100_000)
    t = torch.tensor([20_000.0, 50_000.0, 90_000.0], dtype=torch.float64)
    torch.testing.assert_close(
        loss_weight("likelihood", "eps", discrete, t),
        loss_weight("likelihood", "eps", continuous, t),
        rtol=5e-3,
        atol=0,
    )


def test_the_minimiser_of_the_weighted_loss_is_the_score_of_the_data() -> None:
    """A linear s(x) fitted in closed form at each t to x_0 ~ N(m, s²): exactly ∇ log q(x_t)."""
    mean, std = 0.7, 0.4
    schedule = make_schedule(DiffusionConfig(schedule="vp"))
    nodes, weights = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(20))
    x_0, eps = (v.flatten() for v in torch.meshgrid(mean + std * nodes, nodes, indexing="ij"))
    mass = torch.outer(weights, weights).flatten()
    for t in (1.0, 300.0, 950.0):
        at = torch.tensor([t], dtype=torch.float64)
        alpha_bar = schedule.alpha_bar_at(at)
        x_t = q_sample(x_0[None], eps[None], alpha_bar)[0]
        wanted = target("score", x_0[None], eps[None], alpha_bar)[0]
        weight = loss_weight("likelihood", "score", schedule, at)
        assert weight.item() > 0
        design = torch.stack([torch.ones_like(x_t), x_t], dim=1) * (mass * weight).sqrt()[:, None]
        solution = torch.linalg.lstsq(design, wanted * (mass * weight).sqrt()).solution
        variance = alpha_bar * std**2 + 1 - alpha_bar
        true = torch.cat([alpha_bar.sqrt() * mean / variance, -1 / variance])
        torch.testing.assert_close(solution, true, rtol=1e-8, atol=1e-8)


def test_the_likelihood_weight_of_ve_is_finite_and_positive_at_both_ends() -> None:
    schedule = make_schedule(DiffusionConfig(schedule="ve"))
    weight = likelihood_weight(schedule, torch.tensor([0.0, 999.0], dtype=torch.float64))
    assert weight.isfinite().all()
    assert (weight > 0).all()
