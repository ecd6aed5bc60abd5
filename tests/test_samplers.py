"""Samplers on data whose ε-predictor is known exactly, and the plans they compile to."""

import itertools
from typing import Literal

import pytest
import torch
from torch import Tensor

from pipeline.diffusion.schedules import Schedule, cosine, linear, schedule_from_betas
from pipeline.samplers.ancestral import ancestral
from pipeline.samplers.ddim import ddim
from pipeline.samplers.plan import (
    ALPHA_BAR,
    C_X,
    C_X_0,
    C_Z,
    Plan,
    SamplingConfig,
    T,
    run_plan,
    trailing_timesteps,
)

MEAN, STD = 0.7, 0.4


def exact_eps(x: Tensor, t: Tensor, schedule: Schedule) -> Tensor:
    """E[ε | x_t] for x_0 ~ N(MEAN, STD²): linear in x_t."""
    alpha_bar = schedule.alpha_bar[t.long()].reshape(-1, *[1] * (x.ndim - 1))
    variance = alpha_bar * STD**2 + 1 - alpha_bar
    return (1 - alpha_bar).sqrt() * (x - alpha_bar.sqrt() * MEAN) / variance


def mean_and_std_by_recursion(
    schedule: Schedule, kind: str, eta: float = 0.0, variance: str = "fixed_small"
) -> tuple[float, float]:
    """The sampler's output law by the papers' scalar formulas, without the table.

    Each step is linear in x for this data, so mean and variance follow from x_T ~ N(0, 1).
    """
    alpha_bar = [1.0, *schedule.alpha_bar.tolist()]  # [t + 1]
    mean, var = 0.0, 1.0
    for t in reversed(range(schedule.timesteps)):
        a_t, a_s = alpha_bar[t + 1], alpha_bar[t]
        slope = (1 - a_t) ** 0.5 / (a_t * STD**2 + 1 - a_t)  # ε = slope (x - √ᾱ m)
        beta = 1 - a_t / a_s
        posterior = beta * (1 - a_s) / (1 - a_t)
        if kind == "ancestral":  # μ = (x - β/√(1-ᾱ) ε)/√α
            c_x, c_eps = 1 / (1 - beta) ** 0.5, -beta / (1 - a_t) ** 0.5 / (1 - beta) ** 0.5
            sigma2 = posterior if variance == "fixed_small" else beta
            sigma2 = sigma2 if t else 0.0
        else:  # √ᾱ_s (x - √(1-ᾱ) ε)/√ᾱ + √(1-ᾱ_s-σ²) ε
            sigma2 = eta**2 * posterior
            c_x = (a_s / a_t) ** 0.5
            c_eps = (1 - a_s - sigma2) ** 0.5 - c_x * (1 - a_t) ** 0.5
        gain = c_x + c_eps * slope
        mean = gain * mean - c_eps * slope * a_t**0.5 * MEAN
        var = gain**2 * var + sigma2
    return mean, var**0.5


def mean_and_std_of_plan(plan: Plan, schedule: Schedule) -> tuple[float, float]:
    """The output law of the executor, exactly: it is linear, so probe it with unit inputs."""

    def out(x_T: float, unit_noise_at: int | None) -> float:
        return run_plan(
            plan,
            lambda x, t: exact_eps(x, t, schedule),
            torch.full((1, 1, 1, 1), x_T, dtype=torch.float64),
            lambda i: torch.full((1, 1, 1, 1), float(i == unit_noise_at), dtype=torch.float64),
        ).item()

    mean = out(0.0, None)
    var = (out(1.0, None) - mean) ** 2
    var += sum((out(0.0, i) - mean) ** 2 for i in range(len(plan)))
    return mean, var**0.5


@pytest.mark.parametrize("schedule", [cosine(10), linear(50)], ids=["cosine-10", "linear-50"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ancestral_follows_the_closed_form(
    schedule: Schedule, variance: Literal["fixed_small", "fixed_large"]
) -> None:
    plan = ancestral(schedule, schedule.timesteps, variance, clip_x_0=False)
    want = mean_and_std_by_recursion(schedule, "ancestral", variance=variance)
    assert mean_and_std_of_plan(plan, schedule) == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("schedule", [cosine(10), linear(50)], ids=["cosine-10", "linear-50"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_follows_the_closed_form(schedule: Schedule, eta: float) -> None:
    plan = ddim(schedule, schedule.timesteps, eta, clip_x_0=False)
    want = mean_and_std_by_recursion(schedule, "ddim", eta=eta)
    assert mean_and_std_of_plan(plan, schedule) == pytest.approx(want, abs=1e-6)


def test_an_off_by_one_in_alpha_bar_would_show() -> None:
    """The power of the tests above: a table shifted by one timestep misses by far more."""
    schedule = cosine(10)
    plan = ddim(schedule, 10, 0.0, clip_x_0=False)
    shifted = plan.table.clone()
    shifted[:-1, T] = plan.table[1:, T]
    got = mean_and_std_of_plan(Plan(shifted), schedule)
    want = mean_and_std_by_recursion(schedule, "ddim")
    assert abs(got[1] - want[1]) > 1e-3


def test_many_samples_have_the_law_of_the_data() -> None:
    schedule = linear(1000)
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(20_000, 1, 1, 1, generator=generator, dtype=torch.float64)

    plan = ancestral(schedule, 1000, "fixed_small", clip_x_0=False)
    x = run_plan(plan, lambda x, t: exact_eps(x, t, schedule), normal(), lambda i: normal())
    assert x.mean().item() == pytest.approx(MEAN, abs=0.015)  # 5 standard errors
    assert x.std().item() == pytest.approx(STD, abs=0.015)


def test_ddim_with_eta_one_is_ancestral_with_the_posterior_variance() -> None:
    schedule = cosine(1000)
    got = ddim(schedule, 30, 1.0, clip_x_0=True).table
    want = ancestral(schedule, 30, "fixed_small", clip_x_0=True).table
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 7, 10, 13, 30, 50, 64, 999, 1000])
def test_pairs_lead_from_the_last_timestep_to_the_clean_image(steps: int) -> None:
    pairs = trailing_timesteps(1000, steps)
    assert len(pairs) == steps
    assert pairs[0][0] == 999
    assert pairs[-1][1] == -1
    assert all(t > s for t, s in pairs)
    assert all(left[1] == right[0] for left, right in itertools.pairwise(pairs))


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_steps_out_of_range_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match="from 1 to the schedule's 1000"):
        trailing_timesteps(1000, steps)


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_the_last_row_returns_x_0_and_adds_no_noise(
    variance: Literal["fixed_small", "fixed_large"],
) -> None:
    for plan in (ancestral(cosine(1000), 10, variance, True), ddim(cosine(1000), 10, 1.0, True)):
        last = plan.table[-1]
        assert last[[C_X, C_X_0, C_Z]].tolist() == pytest.approx([0.0, 1.0, 0.0], abs=1e-12)


def test_ddim_without_eta_never_asks_for_noise() -> None:
    assert (ddim(cosine(1000), 50, 0.0, True).table[:, C_Z] == 0).all()


def test_clipped_steps_stay_finite_where_x_0_is_amplified_most() -> None:
    """1/√ᾱ is 20,000 at the end of cosine: without clipping float32 noise would explode."""
    plan = ddim(cosine(1000), 50, 0.0, True)
    assert plan.table[0, ALPHA_BAR] < 1e-8
    x_T = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    x = run_plan(plan, lambda x, t: 0.9 * x, x_T, lambda i: x_T)
    assert x.abs().max() <= 1.0


def test_a_schedule_from_explicit_betas_samples_too() -> None:
    schedule = schedule_from_betas(torch.linspace(0.1, 0.9, 10))
    plan = ddim(schedule, 10, 0.0, clip_x_0=False)
    want = mean_and_std_by_recursion(schedule, "ddim")
    assert mean_and_std_of_plan(plan, schedule) == pytest.approx(want, abs=1e-6)


def test_eta_belongs_to_ddim() -> None:
    with pytest.raises(ValueError, match="eta=0.5 is DDIM's"):
        SamplingConfig(sampler="ancestral", eta=0.5)
