"""Samplers on data whose ε-predictor is known exactly, and the plans they compile to."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.diffusion.config import DiffusionConfig, Variance
from pipeline.diffusion.gaussian import like, predict_eps, predict_x_0
from pipeline.diffusion.schedules import (
    Schedule,
    cosine,
    linear,
    make_schedule,
    schedule_from_betas,
    with_zero_terminal_snr,
)
from pipeline.samplers.ancestral import ancestral
from pipeline.samplers.config import SamplingConfig, Spacing
from pipeline.samplers.ddim import ddim
from pipeline.samplers.heun import heun
from pipeline.samplers.plan import (
    ALPHA_BAR,
    X_0,
    Plan,
    X,
    Z,
    advance,
    make_row,
    needs_noise,
    run_plan,
    with_settings,
)
from pipeline.samplers.pndm import pndm
from pipeline.samplers.spacing import make_times, start_above

MEAN, STD = 0.7, 0.4


def exact_x_0(x: Tensor, t: Tensor, alpha_bar: Tensor) -> Tensor:
    """E[x_0 | x_t] for x_0 ~ N(MEAN, STD²): linear in x_t."""
    variance = alpha_bar * STD**2 + 1 - alpha_bar
    eps = like((1 - alpha_bar).sqrt() / variance, x) * (x - like(alpha_bar.sqrt(), x) * MEAN)
    return predict_x_0(x, eps, alpha_bar)


def noise(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def steps_of(schedule: Schedule, steps: int) -> Tensor:
    return make_times(schedule, steps, "trailing")


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


def mean_and_std_of_plan(plan: Plan) -> tuple[float, float]:
    """The output law of the executor, exactly: it is linear, so probe it with unit inputs."""

    def out(x_T: float, unit_noise_at: int | None) -> float:
        return run_plan(
            plan,
            exact_x_0,
            torch.full((1, 1, 1, 1), x_T, dtype=torch.float64),
            lambda i: torch.full((1, 1, 1, 1), float(i == unit_noise_at), dtype=torch.float64),
        ).item()

    mean = out(0.0, None)
    var = (out(1.0, None) - mean) ** 2
    var += sum((out(0.0, i) - mean) ** 2 for i in range(len(plan)))
    return mean, var**0.5


@pytest.mark.parametrize("schedule", [cosine(10), linear(50)], ids=["cosine-10", "linear-50"])
@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ancestral_follows_the_closed_form(schedule: Schedule, variance: Variance) -> None:
    plan = ancestral(schedule, steps_of(schedule, schedule.timesteps), variance)
    want = mean_and_std_by_recursion(schedule, "ancestral", variance=variance)
    assert mean_and_std_of_plan(plan) == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize("schedule", [cosine(10), linear(50)], ids=["cosine-10", "linear-50"])
@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_ddim_follows_the_closed_form(schedule: Schedule, eta: float) -> None:
    plan = ddim(schedule, steps_of(schedule, schedule.timesteps), eta)
    want = mean_and_std_by_recursion(schedule, "ddim", eta=eta)
    assert mean_and_std_of_plan(plan) == pytest.approx(want, abs=1e-6)


def test_an_off_by_one_in_alpha_bar_would_show() -> None:
    """The power of the tests above: a table shifted by one timestep misses by far more."""
    schedule = cosine(10)
    plan = ddim(schedule, steps_of(schedule, 10), 0.0)
    shifted = plan.table.clone()
    shifted[:-1, ALPHA_BAR] = plan.table[1:, ALPHA_BAR]
    got = mean_and_std_of_plan(Plan(shifted))
    want = mean_and_std_by_recursion(schedule, "ddim")
    assert abs(got[1] - want[1]) > 1e-3


def test_many_samples_have_the_law_of_the_data() -> None:
    schedule = linear(1000)
    generator = torch.Generator().manual_seed(0)

    def normal() -> Tensor:
        return torch.randn(20_000, 1, 1, 1, generator=generator, dtype=torch.float64)

    plan = ancestral(schedule, steps_of(schedule, 1000), "fixed_small")
    x = run_plan(plan, exact_x_0, normal(), lambda i: normal())
    assert x.mean().item() == pytest.approx(MEAN, abs=0.015)  # 5 standard errors
    assert x.std().item() == pytest.approx(STD, abs=0.015)


def test_ddim_with_eta_one_is_ancestral_with_the_posterior_variance() -> None:
    schedule = cosine(1000)
    got = ddim(schedule, steps_of(schedule, 30), 1.0).table
    want = ancestral(schedule, steps_of(schedule, 30), "fixed_small").table
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 7, 10, 13, 30, 50, 64, 999, 1000])
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace", "karras", "log_snr"])
def test_times_fall_from_noise_to_the_clean_image(steps: int, spacing: Spacing) -> None:
    times = make_times(cosine(1000), steps, spacing)
    assert len(times) == steps + 1
    assert times[-1] == -1
    assert (times.diff() < 0).all()
    if spacing != "leading":
        assert times[0] == 999
    if spacing in ("leading", "linspace", "karras", "log_snr") and steps > 1:
        assert times[-2] == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("spacing", ["trailing", "linspace", "karras", "log_snr"])
def test_solvers_that_extrapolate_epsilon_start_where_a_step_can_be_corrected(
    spacing: Spacing,
) -> None:
    """An error of 0.1 % in ε is one of 20 in x̂_0 at the end of cosine, which clipping makes 1.

    From T-1 Heun's correction multiplies that by σ_t/σ_s, about 4,000 here, and the image is lost.
    """
    schedule = cosine(1000)
    x_T = noise(64, 1, 1, 1)

    def predict(x: Tensor, t: Tensor, alpha_bar: Tensor) -> Tensor:
        eps = predict_eps(x, exact_x_0(x, t, alpha_bar), alpha_bar)
        return predict_x_0(x, 0.999 * eps, alpha_bar)

    def error_of(times: Tensor, solver: Callable[[Schedule, Tensor], Plan]) -> float:
        plan = with_settings(solver(schedule, times), SamplingConfig(clip_x_0=True))
        images = run_plan(plan, predict, x_T, lambda i: x_T)
        return (images - (MEAN + STD * x_T).clamp(-1, 1)).abs().max().item()

    start = start_above(schedule)
    assert schedule.alpha_bar_at(torch.tensor(start)).logit().item() == pytest.approx(-10.2)
    times = make_times(schedule, 20, spacing, start)
    assert len(times) == 21
    assert times[0] == start
    assert (times.diff() < 0).all()
    for solver in (heun, pndm):
        assert error_of(times, solver) < 0.3
    if spacing in ("trailing", "linspace"):
        assert error_of(make_times(schedule, 20, spacing), heun) > 0.5


def test_schedules_that_end_in_time_are_visited_from_their_last_timestep() -> None:
    for name in ("linear", "scaled_linear", "vp", "ve", "edm"):
        assert start_above(make_schedule(DiffusionConfig(schedule=name))) == 999
    assert start_above(with_zero_terminal_snr(linear(1000))) == 999


def test_times_of_published_examples() -> None:
    schedule = linear(1000)
    assert make_times(schedule, 50, "leading")[0] == 980
    assert make_times(schedule, 64, "leading")[0] == 945
    assert make_times(schedule, 50, "trailing")[-2] == 19


@pytest.mark.parametrize("steps", [0, -1, 1001])
def test_steps_out_of_range_are_refused(steps: int) -> None:
    with pytest.raises(ValueError, match="from 1 to the schedule's 1000"):
        make_times(cosine(1000), steps, "trailing")


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large", "learned_range"])
def test_the_last_row_returns_x_0_and_adds_no_noise(variance: Variance) -> None:
    schedule = cosine(1000)
    times = steps_of(schedule, 10)
    for plan in (ancestral(schedule, times, variance), ddim(schedule, times, 1.0)):
        last = [plan[X, source][-1].item() for source in (X, X_0, Z)]
        assert last == pytest.approx([0.0, 1.0, 0.0], abs=1e-12)


def test_ddim_without_eta_never_asks_for_noise() -> None:
    assert not needs_noise(ddim(cosine(1000), steps_of(cosine(1000), 50), 0.0).table).any()


def test_clipped_steps_stay_finite_where_x_0_is_amplified_most() -> None:
    """1/√ᾱ is 20,000 at the end of cosine: without clipping float32 noise would explode."""
    plan = ddim(cosine(1000), steps_of(cosine(1000), 50), 0.0)
    assert plan.table[0, ALPHA_BAR] < 1e-8
    x_T = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))

    def predict(x: Tensor, t: Tensor, alpha_bar: Tensor) -> Tensor:
        return predict_x_0(x, 0.9 * x, alpha_bar)

    clipped = with_settings(plan, SamplingConfig(clip_x_0=True))
    assert run_plan(clipped, predict, x_T, lambda i: x_T).abs().max() <= 1.0


def one_step(config: SamplingConfig, x: Tensor, x_0: Tensor) -> Tensor:
    """The first DDIM step of a plan for a network that says x_0."""
    schedule = linear(1000)
    plan = with_settings(ddim(schedule, steps_of(schedule, 10), 0.0), config)
    return run_plan(Plan(plan.table[:1]), lambda *_: x_0, x, lambda i: x)


def ddim_step(x: Tensor, x_0: Tensor) -> Tensor:
    """√ᾱ_s x̂_0 + √(1-ᾱ_s) ε with the ε that x_t and this x̂_0 imply, from 999 to 899."""
    a_t, a_s = linear(1000).alpha_bar[[999, 899]].tolist()
    eps = (x - a_t**0.5 * x_0) / (1 - a_t) ** 0.5
    return a_s**0.5 * x_0 + (1 - a_s) ** 0.5 * eps


def test_a_clipped_x_0_brings_its_own_epsilon() -> None:
    x, x_0 = noise(2, 3, 1, 8, 8)
    clipped = ddim_step(x, (3 * x_0).clamp(-1, 1))
    torch.testing.assert_close(one_step(SamplingConfig(), x, 3 * x_0), clipped)
    torch.testing.assert_close(
        one_step(SamplingConfig(clip_x_0=False), x, 3 * x_0), ddim_step(x, 3 * x_0)
    )


def test_dynamic_thresholding_clips_at_a_quantile_and_scales_back() -> None:
    """Saharia et al. 2022, section 2.3: s is the quantile where above 1; x̂_0 = clip(x̂_0, ±s)/s."""
    x, x_0 = noise(2, 3, 1, 8, 8)
    x_0 = x_0 * torch.tensor([3.0, 0.1, 1.0]).reshape(3, 1, 1, 1)  # the second stays below 1
    s = torch.quantile(x_0.abs().flatten(1), 0.9, dim=1).clamp(min=1).reshape(3, 1, 1, 1)
    assert s[0] > 1
    assert s[1] == 1
    want = ddim_step(x, x_0.clamp(-s, s) / s)
    got = one_step(SamplingConfig(threshold_quantile=0.9), x, x_0)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)  # the quantile is in float32


def test_rows_of_other_plans_do_not_change_a_row() -> None:
    """A step of DDIM beside a step of anything else is the same to the last bit."""
    schedule = linear(1000)
    rows = torch.cat(
        [
            ddim(schedule, steps_of(schedule, 10), 0.0).table[:1],
            ancestral(schedule, steps_of(schedule, 7), "fixed_small").table[:1],
            make_row(0.0, 0.5, {(slot, source): 0.3 for slot in range(5) for source in range(7)})[
                None
            ],
        ]
    )
    state, z = noise(3, 5, 1, 8, 8).float(), noise(3, 1, 8, 8).float()
    x_0 = noise(6, 1, 8, 8)[3:].float()
    together = advance(state, x_0, z, rows)
    for i in range(3):
        part = slice(i, i + 1)
        assert torch.equal(advance(state[part], x_0[part], z[part], rows[part])[0], together[i])


def test_a_schedule_from_explicit_betas_samples_too() -> None:
    schedule = schedule_from_betas(torch.linspace(0.1, 0.9, 10))
    plan = ddim(schedule, steps_of(schedule, 10), 0.0)
    want = mean_and_std_by_recursion(schedule, "ddim")
    assert mean_and_std_of_plan(plan) == pytest.approx(want, abs=1e-6)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"sampler": "ancestral", "eta": 0.5}, "eta=0.5 has no meaning for sampler=ancestral"),
        ({"order": 3}, "order=3 has no meaning for sampler=ddim"),
        ({"churn": 1.0}, "churn=1.0 has no meaning for sampler=ddim: drop it, or use euler or"),
        ({"sampler": "heun", "churn_min": 2.0, "churn_max": 1.0}, "churn_min=2.0 must be at most"),
        ({"guidance_rescale": 0.7}, "guidance_rescale=0.7 needs guidance above 0"),
        ({"guidance_interval": (0.1, 2.0)}, "needs guidance above 0"),
        ({"guidance": 1.0, "guidance_interval": (2.0, 1.0)}, "guidance_interval=[2.0, 1.0] must"),
        ({"clip_x_0": False, "threshold_quantile": 0.9}, "threshold_quantile=0.9 thresholds"),
        ({"sampler": "dpm_solver_pp", "stochastic": True, "order": 3}, "multistep orders 1 and 2"),
        (
            {"sampler": "langevin", "predictor": "none", "corrector_steps": 0},
            "corrector_steps=0 with predictor=none moves nothing",
        ),
    ],
)
def test_settings_that_make_no_sense_are_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        SamplingConfig(**values)
