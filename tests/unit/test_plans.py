"""Every plan that a config or a request can ask for is one that can be followed."""

import itertools
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from pipeline.diffusion.config import DiffusionConfig
from pipeline.diffusion.schedules import make_schedule
from pipeline.samplers.config import SamplingConfig, Spacing
from pipeline.samplers.model import compile_plan
from pipeline.samplers.plan import ALPHA_BAR, MATRIX, NUM_SOURCES, X_0, Plan, T, X, Z

MEAN, STD = 0.7, 0.4
SPACINGS: tuple[Spacing, ...] = ("trailing", "leading", "linspace", "karras", "log_snr")
FLOW: list[dict[str, Any]] = [
    {"sampler": "ddim"},
    {"sampler": "euler"},
    {"sampler": "heun"},
    {"sampler": "pndm"},
    *[{"sampler": name, "order": 3} for name in ("dpm_solver", "dpm_solver_pp", "unipc", "deis")],
    {"sampler": "dpm_solver", "order": 3, "singlestep": True},
    {"sampler": "dpm_solver_pp", "order": 3, "singlestep": True},
]
"""Samplers that follow the probability flow."""
NOISY: list[dict[str, Any]] = [
    {"sampler": "ancestral"},
    {"sampler": "ddim", "eta": 1.0},
    {"sampler": "euler", "churn": 5.0},
    {"sampler": "heun", "churn": 5.0},
    {"sampler": "euler_maruyama"},
    {"sampler": "dpm_solver_pp", "stochastic": True},
]


def plans(
    name: str, timesteps: int, steps: list[int], samplers: list[dict[str, Any]]
) -> Iterator[tuple[Any, Plan]]:
    """(what was asked for, its plan), in all spacings."""
    config = DiffusionConfig.model_validate({"schedule": name, "timesteps": timesteps})
    schedule = make_schedule(config)
    for number, spacing, sampler in itertools.product(steps, SPACINGS, samplers):
        asked = SamplingConfig(spacing=spacing, steps=number, clip_x_0=False, **sampler)
        yield (number, spacing, sampler), compile_plan(schedule, "fixed_small", asked)


@pytest.mark.parametrize(
    ("name", "timesteps"),
    [
        *itertools.product(["cosine", "sigmoid", "laplace", "vp", "ve"], [2, 25]),
        *itertools.product(["linear", "quadratic"], [25]),  # of fewer a β would be above 1
    ],
)
def test_a_plan_is_finite_and_looks_at_no_time_without_noise(name: str, timesteps: int) -> None:
    steps = sorted({1, 2, timesteps - 1, timesteps})
    for asked, plan in plans(name, timesteps, steps, FLOW + NOISY):
        assert plan.table[:, MATRIX].isfinite().all(), asked
        assert (plan.table[:, T] >= 0).all(), asked
        assert (plan.table[:, ALPHA_BAR] < 1).all(), asked


@pytest.mark.parametrize("name", ["linear", "cosine", "sigmoid"])
def test_as_many_steps_as_there_are_timesteps_end_at_the_law_of_the_data(name: str) -> None:
    """Of normal data, whose E[x_0 | x_t] is linear in x_t: so is the plan, and its law is exact."""
    for asked, plan in plans(name, 60, [58, 59, 60], FLOW):
        mean, variance = law_of(plan)
        assert mean == pytest.approx(MEAN, abs=0.05), asked
        assert variance == pytest.approx(STD**2, rel=0.25), asked


def law_of(plan: Plan) -> tuple[float, float]:
    """Mean and variance of a pixel at the end, from x_T ~ N(0, 1), row by row."""
    mean = torch.zeros(5, dtype=torch.float64)
    covariance = torch.zeros(5, 5, dtype=torch.float64)
    covariance[X, X] = 1.0
    for row in plan.table:
        alpha_bar = float(row[ALPHA_BAR])
        gain = alpha_bar**0.5 * STD**2 / (alpha_bar * STD**2 + 1 - alpha_bar)  # of x̂_0 by x_t
        sources = row[MATRIX].reshape(5, NUM_SOURCES)
        matrix = sources[:, :5].clone()
        matrix[:, X] += sources[:, X_0] * gain
        mean = matrix @ mean + sources[:, X_0] * MEAN * (1 - gain * alpha_bar**0.5)
        covariance = matrix @ covariance @ matrix.T + torch.outer(sources[:, Z], sources[:, Z])
    return float(mean[X]), float(covariance[X, X])
