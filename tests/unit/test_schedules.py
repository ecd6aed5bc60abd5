"""Schedules against their definitions, computed a second way in plain Python floats."""

import math
import re

import pytest
import torch
from pydantic import ValidationError

from pipeline.diffusion.config import DiffusionConfig, ScheduleName
from pipeline.diffusion.gaussian import q_sample
from pipeline.diffusion.schedules import (
    cosine,
    laplace,
    linear,
    make_schedule,
    schedule_from_betas,
    sigmoid,
    with_zero_terminal_snr,
)


def test_linear_is_hos_schedule() -> None:
    schedule = linear(1000)
    assert schedule.beta[0].item() == pytest.approx(1e-4, rel=1e-15)
    assert schedule.beta[-1].item() == pytest.approx(0.02, rel=1e-15)
    alpha_bar = 1.0
    for t in range(1000):
        alpha_bar *= 1 - (1e-4 + t / 999 * (0.02 - 1e-4))
    assert schedule.alpha_bar[-1].item() == pytest.approx(alpha_bar, rel=1e-11)
    assert alpha_bar == pytest.approx(4.0e-5, rel=0.02)  # the published terminal ᾱ


def test_linear_of_fewer_steps_ends_at_about_the_same_noise() -> None:
    assert linear(250).alpha_bar[-1].item() == pytest.approx(
        linear(1000).alpha_bar[-1].item(), rel=0.2
    )


def test_cosine_follows_its_formula_until_beta_is_capped() -> None:
    def f(u: float) -> float:
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    schedule = cosine(1000)
    for t in (0, 1, 499, 900):
        assert schedule.alpha_bar[t].item() == pytest.approx(f((t + 1) / 1000) / f(0), rel=1e-12)
    assert schedule.beta.max().item() == 0.999
    assert schedule.alpha_bar[-1].item() == pytest.approx(2.4e-9, rel=0.05)


def test_scaled_linear_and_quadratic_are_linear_in_the_root_of_beta() -> None:
    """Stable Diffusion's ends give a terminal √ᾱ of 0.068, its well-known brightness leak."""
    for name, low, high in (("scaled_linear", 8.5e-4, 0.012), ("quadratic", 1e-4, 0.02)):
        schedule = make_schedule(DiffusionConfig(schedule=name))
        alpha_bar = 1.0
        for t in range(1000):
            alpha_bar *= 1 - (low**0.5 + t / 999 * (high**0.5 - low**0.5)) ** 2
        assert schedule.alpha_bar[-1].item() == pytest.approx(alpha_bar, rel=1e-11)
        if name == "scaled_linear":
            assert alpha_bar**0.5 == pytest.approx(0.068, abs=5e-4)


def test_sigmoid_follows_its_formula() -> None:
    def f(u: float) -> float:
        return 1 / (1 + math.exp(-3 + 6 * u))

    schedule = sigmoid(1000)
    for t in (0, 1, 499, 900):
        want = (f((t + 1) / 1000) - f(1)) / (f(0) - f(1))
        assert schedule.alpha_bar[t].item() == pytest.approx(want, rel=1e-12)
    assert schedule.beta.max().item() <= 0.999


def test_laplace_has_the_quantiles_of_its_distribution() -> None:
    """P(λ > λ_t) = (t+1)/T, by the distribution's own CDF."""
    law = torch.distributions.Laplace(torch.tensor(0.0).double(), torch.tensor(0.5).double())
    log_snr = laplace(1000).log_snr
    u = (torch.arange(1000, dtype=torch.float64) + 1) / 1000
    torch.testing.assert_close((1 - law.cdf(log_snr))[:-1], u[:-1], rtol=0, atol=1e-6)
    assert log_snr[-1].item() == pytest.approx(0.5 * math.log(1e-6), rel=1e-9)


def test_an_explicit_list_of_betas_is_taken_as_it_is() -> None:
    betas = (0.1, 0.3, 0.2)
    config = DiffusionConfig(schedule="betas", timesteps=3, betas=betas)
    assert make_schedule(config).beta.tolist() == list(betas)
    assert make_schedule(config).alpha_bar[-1].item() == pytest.approx(0.9 * 0.7 * 0.8)


def test_zero_terminal_snr_shifts_the_end_to_zero_and_keeps_the_start() -> None:
    before = make_schedule(DiffusionConfig(schedule="scaled_linear"))
    after = with_zero_terminal_snr(before)
    assert after.alpha_bar[-1] == 0
    assert after.beta[-1] == 1
    assert after.alpha_bar[0].item() == pytest.approx(before.alpha_bar[0].item(), rel=1e-15)
    # Algorithm 1: √ᾱ is mapped linearly, so ratios of its differences stay
    a, b = before.alpha_bar.sqrt(), after.alpha_bar.sqrt()
    torch.testing.assert_close(a.diff() / a.diff()[0], b.diff() / b.diff()[0], rtol=1e-9, atol=0)


DISCRETE = ["linear", "scaled_linear", "quadratic", "cosine", "sigmoid", "laplace"]


@pytest.mark.parametrize("name", [*DISCRETE, "vp", "subvp", "ve", "edm"])
@pytest.mark.parametrize("timesteps", [21, 100, 1000, 4000])
def test_noise_grows_strictly_from_above_zero(name: ScheduleName, timesteps: int) -> None:
    schedule = make_schedule(DiffusionConfig(schedule=name, timesteps=timesteps))
    assert schedule.alpha_bar.dtype == torch.float64
    sigma = (1 - schedule.alpha_bar).sqrt()
    assert sigma[0] > 0
    assert (sigma.diff() > 0).all()
    assert (schedule.log_snr.diff() < 0).all()
    assert schedule.log_snr.isfinite().all()


@pytest.mark.parametrize("name", [*DISCRETE, "vp", "subvp", "ve", "edm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_noise_stays_above_zero_and_never_falls_in_the_type_of_the_computation(
    name: ScheduleName, dtype: torch.dtype
) -> None:
    """σ is cast after its root. In float32, which noising always uses, it rises at every step.

    bfloat16 has 128 numbers an octave, fewer than a schedule has timesteps there, so that no
    rounding can rise at every step; what is asked of it is that no step has the noise of a clean
    image, that the order stays, and that each value is the nearest one.
    """
    alpha_bar = make_schedule(DiffusionConfig(schedule=name)).alpha_bar
    exact = (1 - alpha_bar).sqrt()
    one = torch.ones(1000, dtype=dtype)
    sigma = q_sample(torch.zeros(1000, dtype=dtype), one, alpha_bar)  # what noising multiplies by
    assert (sigma > 0).all()
    assert (sigma.diff() >= 0).all()
    error = ((sigma.double() - exact) / exact).abs().max().item()
    assert (
        error <= {torch.float32: 2**-24, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype] * 1.01
    )
    if dtype == torch.float32:
        strictly = (exact < 1 - 2**-23) if name == "cosine" else torch.ones(1000, dtype=torch.bool)
        assert (sigma.diff()[strictly[1:]] > 0).all()


def test_the_cast_before_the_difference_would_lose_the_first_timesteps() -> None:
    """The trap that the one above is for: 10 of linear's 1,000 timesteps would have no noise."""
    alpha_bar = linear(1000).alpha_bar
    assert int((1 - alpha_bar.bfloat16() == 0).sum()) == 10


@pytest.mark.parametrize("name", [*DISCRETE, "vp", "subvp", "ve", "edm"])
def test_real_times_and_log_snrs_are_inverse(name: ScheduleName) -> None:
    schedule = make_schedule(DiffusionConfig(schedule=name))
    t = torch.tensor([0.0, 0.3, 17.25, 500.0, 998.5, 999.0], dtype=torch.float64)
    log_snr = schedule.alpha_bar_at(t).logit()
    assert (log_snr.diff() < 0).all()
    # sub-VP starts at 1 - ᾱ = 1e-8, which leaves 8 digits of a float64
    torch.testing.assert_close(schedule.t_at(log_snr), t, rtol=0, atol=1e-7)
    whole = torch.arange(1000)
    torch.testing.assert_close(schedule.alpha_bar_at(whole), schedule.alpha_bar, rtol=1e-12, atol=0)


def test_between_timesteps_a_table_is_linear_in_the_log_snr() -> None:
    schedule = cosine(1000)
    t = torch.tensor([41.25], dtype=torch.float64)
    want = 0.75 * schedule.log_snr[41] + 0.25 * schedule.log_snr[42]
    assert schedule.alpha_bar_at(t).logit().item() == pytest.approx(want.item(), rel=1e-9)


def test_minus_one_is_the_clean_image() -> None:
    schedule = linear(100)
    got = schedule.alpha_bar_at(torch.tensor([-1, 0, 99]))
    assert got.tolist() == [1.0, schedule.alpha_bar[0].item(), schedule.alpha_bar[99].item()]


def test_a_linear_schedule_too_short_for_its_betas_is_refused() -> None:
    with pytest.raises(ValidationError, match="too few for the linear schedule"):
        DiffusionConfig(schedule="linear", timesteps=20)
    assert make_schedule(DiffusionConfig(schedule="linear", timesteps=21)).beta[-1] < 1
    assert make_schedule(DiffusionConfig(schedule="cosine", timesteps=10)).timesteps == 10


@pytest.mark.parametrize("betas", [[0.1, 1.0], [0.0, 0.5], [0.1, float("nan")], [[0.1]]])
def test_betas_that_are_not_probabilities_are_refused(betas: list[float]) -> None:
    with pytest.raises(ValueError, match="strictly between 0 and 1"):
        schedule_from_betas(torch.tensor(betas))


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"zero_terminal_snr": True}, "with prediction=eps cannot work: at the last timestep"),
        ({"zero_terminal_snr": True, "prediction": "score"}, "prediction=score cannot work"),
        (
            {"zero_terminal_snr": True, "prediction": "v", "schedule": "vp"},
            "zero_terminal_snr has no meaning for schedule=vp",
        ),
        ({"schedule": "betas"}, "schedule=betas needs betas"),
        ({"betas": [0.1, 0.2], "timesteps": 2}, "betas has no meaning for schedule=linear"),
        ({"schedule": "betas", "betas": [0.1], "timesteps": 2}, "betas has 1 numbers"),
        ({"schedule": "betas", "betas": [0.1, 1.0], "timesteps": 2}, "strictly between 0 and 1"),
        (
            {"schedule": "cosine", "beta_end": 0.1},
            "beta_end=0.1 has no meaning for schedule=cosine",
        ),
        ({"schedule": "vp", "sigma_max": 9.0}, "sigma_max=9.0 has no meaning for schedule=vp"),
        ({"schedule": "ve", "sigma_min": 60.0}, "sigma_min=60.0 must be below sigma_max=50.0"),
        ({"beta_start": 0.03}, "beta_start=0.03 must be below beta_end=0.02"),
    ],
)
def test_settings_that_make_no_sense_are_refused(values: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(sentence)):
        DiffusionConfig.model_validate(values)
