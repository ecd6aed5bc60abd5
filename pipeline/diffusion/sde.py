"""Continuous-time forward processes: VP, sub-VP and VE (Song et al. 2021, "Score-based generative
modeling through SDEs", sections 3.4 and B).

    dx = f(t) x dt + g(t) dw,    x_t | x_0 ~ N(m(t) x_0, s(t)² I),    t in [t_min, 1]

Times are float64 tensors of any shape, and so is what comes back. Every such process is the same
process in another scale: with ᾱ = m²/(m² + s²), the image √ᾱ/m · x_t is a variance-preserving one.
The rest of the project works in that frame; `Schedule` carries an SDE over into it.
"""

import math
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor


class Sde(Protocol):
    """A forward process with a linear drift."""

    @property
    def t_min(self) -> float:
        """The first time: at 0 the score of the data need not exist."""

    def drift(self, t: Tensor) -> Tensor:
        """f(t), of the drift f(t) x."""

    def diffusion(self, t: Tensor) -> Tensor:
        """g(t)."""

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """(m(t), s(t)): the factor of the mean of x_t | x_0, and its standard deviation."""


@dataclass(frozen=True)
class VP:
    """Variance preserving, β(t) linear: the continuous limit of DDPM's schedule (Eq. 32-33)."""

    beta_min: float = 0.1
    beta_max: float = 20.0
    t_min: float = 1e-3

    def beta(self, t: Tensor) -> Tensor:
        return self.beta_min + (self.beta_max - self.beta_min) * t

    def integral(self, t: Tensor) -> Tensor:
        """B(t) = ∫_0^t β."""
        return self.beta_min * t + (self.beta_max - self.beta_min) * t**2 / 2

    def drift(self, t: Tensor) -> Tensor:
        return -self.beta(t) / 2

    def diffusion(self, t: Tensor) -> Tensor:
        return self.beta(t).sqrt()

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        B = self.integral(t)
        # 1 - exp(-B) would lose half its digits near t_min
        return (-B / 2).exp(), (-torch.expm1(-B)).sqrt()


@dataclass(frozen=True)
class SubVP(VP):
    """VP's mean with a smaller variance, s = 1 - e^{-B} (Eq. 29)."""

    def diffusion(self, t: Tensor) -> Tensor:
        return (self.beta(t) * -torch.expm1(-2 * self.integral(t))).sqrt()

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        B = self.integral(t)
        return (-B / 2).exp(), -torch.expm1(-B)


@dataclass(frozen=True)
class VE:
    """Variance exploding: x_t = x_0 + σ(t) ε, σ geometric in t (Eq. 30-31).

    Karras et al. 2022 work in the same space of σ, from 0.002 to 80.
    """

    sigma_min: float = 0.01
    sigma_max: float = 50.0
    t_min: float = 0.0

    def sigma(self, t: Tensor) -> Tensor:
        return self.sigma_min * (self.sigma_max / self.sigma_min) ** t

    def drift(self, t: Tensor) -> Tensor:
        return torch.zeros_like(t)

    def diffusion(self, t: Tensor) -> Tensor:
        return self.sigma(t) * math.sqrt(2 * math.log(self.sigma_max / self.sigma_min))

    def marginal(self, t: Tensor) -> tuple[Tensor, Tensor]:
        return torch.ones_like(t), self.sigma(t)
