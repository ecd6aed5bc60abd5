"""A sampler is a table.

Every solver compiles, for a schedule and a number of steps, to a plan: a float64 table with one row
per network evaluation. A row holds the timestep to evaluate at and the coefficients of one linear
update of the state,

    x̂_0 = clip((x - √(1-ᾱ) ε_θ(x, t)) / √ᾱ)
    x   ← c_x x + c_x_0 x̂_0 + c_z z,    z ~ N(0, I)

Since ε is linear in x and x̂_0, that covers ancestral sampling and DDIM alike, and a clipped x̂_0
brings its own consistent ε along. `advance` below is the only executor: `ddpm sample`, evaluation
and serving all reach it through the engine, and each row of a batch may follow its own plan at its
own position. `run_plan` is the plain loop around it, for one plan and a whole batch.
"""

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

from pipeline.diffusion.gaussian import like, predict_x_0

T, ALPHA_BAR, C_X, C_X_0, C_Z, CLIP = range(6)
"""Columns of a plan. CLIP is the bound on |x̂_0|, inf for none."""


DEFAULT_STEPS = 50


class SamplingConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """How images are drawn."""

    sampler: Literal["ancestral", "ddim"] = "ddim"
    steps: int = Field(default=DEFAULT_STEPS, ge=1)
    """Network evaluations an image, at most the schedule's timesteps."""
    guidance: float = Field(default=0.0, ge=0.0, le=50.0, allow_inf_nan=False)
    """w of classifier-free guidance, ε = (1+w) ε(c) - w ε(∅); 0 is the plain conditional model."""
    eta: float = Field(default=0.0, ge=0.0, le=1.0, allow_inf_nan=False)
    """DDIM's η: 0 is deterministic, 1 is ancestral with σ² = β̃."""
    clip_x_0: bool = True
    """Clip x̂_0 to the data range [-1, 1] at every step."""

    @model_validator(mode="after")
    def _eta_belongs_to_ddim(self) -> "SamplingConfig":
        if self.eta and self.sampler != "ddim":
            raise ValueError(
                f"eta={self.eta} is DDIM's and has no meaning for {self.sampler}: drop it"
            )
        return self


@dataclass(frozen=True)
class Plan:
    """One solver for one schedule: (network evaluations, 6 columns) float64."""

    table: Tensor

    def __len__(self) -> int:
        return len(self.table)


def trailing_timesteps(timesteps: int, steps: int) -> list[tuple[int, int]]:
    """Explicit pairs (t, s) to step between, from t = T-1 down to s = -1, the clean image.

    "Trailing" spacing (Lin et al. 2023, table 2) always starts at the last timestep, where x_T is
    noise. Pairs are explicit since a fixed stride names the wrong s unless `steps` divides T.

    Raises:
        ValueError: steps is not in 1 .. T.
    """
    if not 1 <= steps <= timesteps:
        raise ValueError(f"steps={steps} must be from 1 to the schedule's {timesteps} timesteps")
    stops = [round(timesteps * (steps - i) / steps) - 1 for i in range(steps + 1)]
    return list(itertools.pairwise(stops))


def build_plan(
    pairs: list[tuple[int, int]],
    alpha_bar_t: Tensor,
    coefficients: tuple[Tensor, Tensor, Tensor],
    clip_x_0: bool,
) -> Plan:
    """The table of the pairs (t, s) from the solver's (c_x, c_x_0, c_z), each (steps,) float64."""
    t = torch.tensor([t for t, _ in pairs], dtype=torch.float64)
    clip = torch.full_like(t, 1.0 if clip_x_0 else torch.inf)
    return Plan(torch.stack([t, alpha_bar_t, *coefficients, clip], dim=1))


def advance(x: Tensor, eps: Tensor, z: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
    """One row of a plan for each row of a batch: (next x, x̂_0).

    x, eps, z: (B, C, H, W); rows: (B, 6) float64, a plan's row for each image, on the CPU.
    """
    bound = like(rows[:, CLIP], x)
    x_0 = predict_x_0(x, eps, rows[:, ALPHA_BAR]).clamp(-bound, bound)
    x = like(rows[:, C_X], x) * x + like(rows[:, C_X_0], x) * x_0 + like(rows[:, C_Z], x) * z
    return x, x_0


def run_plan(
    plan: Plan,
    predict_eps: Callable[[Tensor, Tensor], Tensor],
    x_T: Tensor,
    noise: Callable[[int], Tensor],
) -> Tensor:
    """Follow one plan with a whole batch, from x_T (B, ...) to the clean images.

    Args:
        predict_eps: (x_t, t) -> ε, with t (B,) float64.
        noise: i -> z for the plan's row i, asked for only where the row adds noise.
    """
    x = x_T
    for i, row in enumerate(plan.table):
        rows = row.expand(len(x), -1)
        z = noise(i) if row[C_Z] else torch.zeros_like(x)
        x, _ = advance(x, predict_eps(x, rows[:, T]), z, rows)
    return x
