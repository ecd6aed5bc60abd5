"""Noise schedules: β_t and what follows from it, as float64 tables over t = 0 .. T-1.

Index convention (Ho et al. 2020 count from 1, code counts from 0): t = 0 is one step of noise, and
t = -1 is the clean image, ᾱ_{-1} = 1. Tables stay float64 on the CPU; whoever uses a coefficient
casts it last.
"""

import math
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor

BETA_MAX = 0.999  # Nichol & Dhariwal 2021, section 3.2: keeps the last steps of cosine from β = 1


class DiffusionConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """The forward process and how the reverse one is parameterised."""

    schedule: Literal["linear", "cosine"] = "linear"
    timesteps: int = Field(default=1000, ge=2, le=100_000)
    prediction: Literal["eps"] = "eps"
    variance: Literal["fixed_small", "fixed_large"] = "fixed_small"
    """σ_t² of an ancestral step: the posterior variance β̃_t, or β_t."""

    @model_validator(mode="after")
    def _betas_are_probabilities(self) -> "DiffusionConfig":
        if self.schedule == "linear" and self.timesteps <= 20:
            raise ValueError(
                f"timesteps={self.timesteps} is too few for the linear schedule, whose last β is "
                "20/timesteps and must stay below 1: use at least 21, or schedule=cosine"
            )
        return self


@dataclass(frozen=True)
class Schedule:
    """β_t with α_t = 1 - β_t and ᾱ_t = Π_{s<=t} α_s; each (T,) float64."""

    beta: Tensor
    alpha: Tensor
    alpha_bar: Tensor

    @property
    def timesteps(self) -> int:
        return len(self.beta)

    def alpha_bar_at(self, t: Tensor) -> Tensor:
        """ᾱ_t for integer t of any shape, with ᾱ_{-1} = 1."""
        return torch.where(t < 0, 1.0, self.alpha_bar[t.clamp(min=0)])


def schedule_from_betas(beta: Tensor) -> Schedule:
    """The tables of an explicit list of betas: (T,), each strictly between 0 and 1."""
    beta = beta.double()
    if beta.ndim != 1 or not ((beta > 0) & (beta < 1)).all():
        raise ValueError("betas must be a list of numbers strictly between 0 and 1")
    alpha = 1.0 - beta
    return Schedule(beta=beta, alpha=alpha, alpha_bar=alpha.cumprod(0))


def linear(timesteps: int) -> Schedule:
    """β from 1e-4 to 0.02 (Ho et al. 2020, section 4), times 1000/T so that ᾱ_T stays the same."""
    scale = 1000 / timesteps
    return schedule_from_betas(
        torch.linspace(scale * 1e-4, scale * 0.02, timesteps, dtype=torch.float64)
    )


def cosine(timesteps: int, s: float = 0.008) -> Schedule:
    """ᾱ(u) = cos²((u+s)/(1+s)·π/2) / cos²(s/(1+s)·π/2)  (Nichol & Dhariwal 2021, Eq. 17)."""
    u = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    f = ((u + s) / (1 + s) * math.pi / 2).cos() ** 2
    return schedule_from_betas((1 - f[1:] / f[:-1]).clamp(max=BETA_MAX))


def make_schedule(config: DiffusionConfig) -> Schedule:
    """The schedule that a config names."""
    return {"linear": linear, "cosine": cosine}[config.schedule](config.timesteps)
