"""Schedules against their definitions, computed a second way in plain Python floats."""

import math

import pytest
import torch
from pydantic import ValidationError

from pipeline.diffusion.schedules import (
    DiffusionConfig,
    cosine,
    linear,
    make_schedule,
    schedule_from_betas,
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


@pytest.mark.parametrize("name", ["linear", "cosine"])
@pytest.mark.parametrize("timesteps", [21, 100, 1000, 4000])
def test_noise_grows_strictly_from_above_zero(name: str, timesteps: int) -> None:
    schedule = make_schedule(DiffusionConfig(schedule=name, timesteps=timesteps))
    assert schedule.alpha_bar.dtype == torch.float64
    for dtype in (torch.float64, torch.float32):
        sigma = (1 - schedule.alpha_bar).sqrt().to(dtype)
        assert sigma[0] > 0
        if dtype == torch.float64:
            assert (sigma.diff() > 0).all()
        assert (sigma.diff() >= 0).all()


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
