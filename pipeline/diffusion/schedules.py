"""Noise schedules: how much of the image is left at t, as float64 tables over t = 0 .. T-1.

Index convention (Ho et al. 2020 count from 1, code counts from 0): t = 0 is one step of noise, and
t = -1 is the clean image, ᾱ_{-1} = 1. Tables stay float64 on the CPU; whoever uses a coefficient
casts it last.

t may be real. A continuous process (`pipeline/diffusion/sde.py`) is a schedule whose ᾱ is known
between the timesteps; of a table it is interpolated, linearly in the log-SNR λ = log ᾱ/(1-ᾱ).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.diffusion.config import BETA_ENDS, BETAS, SIGMA_ENDS, DiffusionConfig
from pipeline.diffusion.sde import VE, VP, Sde, SubVP

BETA_MAX = 0.999  # Nichol & Dhariwal 2021, section 3.2: keeps the last steps of cosine from β = 1


@dataclass(frozen=True, eq=False)
class Schedule:
    """β_t with α_t = 1 - β_t and ᾱ_t = Π_{s<=t} α_s; each (T,) float64."""

    beta: Tensor
    alpha: Tensor
    alpha_bar: Tensor
    sde: Sde | None = None
    """The process that is known between the timesteps, too; t = 0 is its t_min and T-1 its 1."""

    @property
    def timesteps(self) -> int:
        return len(self.beta)

    def alpha_bar_at(self, t: Tensor) -> Tensor:
        """ᾱ_t for integer or real t in 0 .. T-1, of any shape; 1 for t = -1, the clean image."""
        if self.sde is not None:
            return torch.where(t < 0, 1.0, _alpha_bar(self.sde, self.sde_time(t.clamp(min=0))))
        lower = t.clamp(min=0, max=self.timesteps - 1).floor().long()
        upper = (lower + 1).clamp(max=self.timesteps - 1)
        part = t.double() - lower
        log_snr = self.log_snr
        between = torch.lerp(log_snr[lower], log_snr[upper], part).sigmoid()
        return torch.where(t < 0, 1.0, torch.where(part == 0, self.alpha_bar[lower], between))

    @property
    def log_snr(self) -> Tensor:
        """λ_t = log ᾱ_t/(1-ᾱ_t): (T,) float64, strictly falling."""
        return self.alpha_bar.logit()

    def t_at(self, log_snr: Tensor) -> Tensor:
        """The real t with that log-SNR, the inverse of `alpha_bar_at`; clamped to 0 .. T-1."""
        if self.sde is not None:
            low, high = torch.zeros_like(log_snr), torch.full_like(log_snr, self.timesteps - 1)
            for _ in range(60):  # bisection down to the last bit of t
                middle = (low + high) / 2
                noisier = self.alpha_bar_at(middle).logit() < log_snr
                low, high = torch.where(noisier, low, middle), torch.where(noisier, middle, high)
            return (low + high) / 2
        rising = -self.log_snr
        upper = torch.searchsorted(rising, -log_snr).clamp(1, self.timesteps - 1)
        lower = upper - 1
        part = (-log_snr - rising[lower]) / (rising[upper] - rising[lower])
        return lower + part.clamp(0, 1)

    def sde_time(self, t: Tensor) -> Tensor:
        """The time of the SDE, t_min .. 1, at timestep t."""
        assert self.sde is not None
        return self.sde.t_min + (1 - self.sde.t_min) * t.double() / (self.timesteps - 1)


def _alpha_bar(sde: Sde, u: Tensor) -> Tensor:
    mean, std = sde.marginal(u)
    return mean**2 / (mean**2 + std**2)


def schedule_from_betas(beta: Tensor) -> Schedule:
    """The tables of an explicit list of betas: (T,), each strictly between 0 and 1."""
    beta = beta.double()
    if beta.ndim != 1 or not ((beta > 0) & (beta < 1)).all():
        raise ValueError(BETAS)
    alpha = 1.0 - beta
    return Schedule(beta=beta, alpha=alpha, alpha_bar=alpha.cumprod(0))


def schedule_from_alpha_bar(alpha_bar: Tensor, sde: Sde | None = None) -> Schedule:
    """The tables of ᾱ_0 > ... > ᾱ_{T-1} >= 0, (T,) float64."""
    if not ((alpha_bar < 1).all() and (alpha_bar.diff() < 0).all() and alpha_bar[-1] >= 0):
        raise ValueError("ᾱ must fall strictly from below 1 to 0 or above")
    alpha = alpha_bar / torch.cat([alpha_bar.new_ones(1), alpha_bar[:-1]])
    return Schedule(beta=1 - alpha, alpha=alpha, alpha_bar=alpha_bar, sde=sde)


def linear(timesteps: int, beta_start: float = 1e-4, beta_end: float = 0.02) -> Schedule:
    """β from 1e-4 to 0.02 (Ho et al. 2020, section 4), times 1000/T so that ᾱ_T stays the same."""
    scale = 1000 / timesteps
    return schedule_from_betas(
        torch.linspace(scale * beta_start, scale * beta_end, timesteps, dtype=torch.float64)
    )


def quadratic(timesteps: int, beta_start: float, beta_end: float) -> Schedule:
    """√β linear between its ends, times 1000/T: the "quadratic" of Song et al. 2021 (DDIM, D.2).

    With other ends it is the "scaled linear" of latent diffusion.
    """
    root = torch.linspace(beta_start**0.5, beta_end**0.5, timesteps, dtype=torch.float64)
    return schedule_from_betas(1000 / timesteps * root**2)


def cosine(timesteps: int, s: float = 0.008) -> Schedule:
    """ᾱ(u) = cos²((u+s)/(1+s)·π/2) / cos²(s/(1+s)·π/2)  (Nichol & Dhariwal 2021, Eq. 17)."""
    u = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    return _capped(((u + s) / (1 + s) * math.pi / 2).cos() ** 2)


def sigmoid(timesteps: int, start: float = -3.0, end: float = 3.0) -> Schedule:
    """ᾱ(u) = (S(-start-(end-start)u) - S(-end)) / (S(-start) - S(-end)), S the logistic function.

    Jabri et al. 2022, "Scalable adaptive computation for iterative generation", with τ = 1.
    """
    u = torch.arange(timesteps + 1, dtype=torch.float64) / timesteps
    logit = start + (end - start) * u
    return _capped((-logit).sigmoid() - (-logit[-1]).sigmoid())


def laplace(timesteps: int, mu: float = 0.0, b: float = 0.5) -> Schedule:
    """λ(u) = μ + b sgn(u-½) log(1 - 2|u-½|), the falling quantiles of a Laplace distribution.

    Hang & Gu 2024, "Improved noise schedule for diffusion training", table 1. At u = 1 the quantile
    is infinite; 1e-6 within the logarithm cuts it at λ = μ - 13.8 b.
    """
    u = torch.arange(1, timesteps + 1, dtype=torch.float64) / timesteps
    offset = u - 0.5
    log_snr = mu + b * offset.sign() * torch.log(1 - 2 * offset.abs() + 1e-6)
    return schedule_from_alpha_bar(log_snr.sigmoid())


def _capped(signal: Tensor) -> Schedule:
    """The schedule of ᾱ ∝ signal, (T+1,) from u = 0 to 1, with each β at most BETA_MAX."""
    return schedule_from_betas((1 - signal[1:] / signal[:-1]).clamp(max=BETA_MAX))


def from_sde(sde: Sde, timesteps: int) -> Schedule:
    """A continuous process in the variance-preserving frame."""
    u = torch.linspace(sde.t_min, 1, timesteps, dtype=torch.float64)
    return schedule_from_alpha_bar(_alpha_bar(sde, u), sde)


def with_zero_terminal_snr(schedule: Schedule) -> Schedule:
    """√ᾱ shifted to 0 at T-1 and scaled to keep ᾱ_0 (Lin et al. 2023, Algorithm 1)."""
    root = schedule.alpha_bar.sqrt()
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    return schedule_from_alpha_bar(root**2)


def make_schedule(config: DiffusionConfig, log_snr: Tensor | None = None) -> Schedule:
    """The schedule that a config names.

    Args:
        log_snr: (T,) float64, what was learned; of `schedule: learned` alone.
    """
    T, name = config.timesteps, config.schedule
    if name == "learned":
        assert log_snr is not None, "a learned schedule comes with the weights"
        return schedule_from_alpha_bar(log_snr.double().sigmoid())
    if name in ("vp", "subvp"):
        low, high = config.ends(BETA_ENDS)
        kind = VP if name == "vp" else SubVP
        return from_sde(kind(1000 * low, 1000 * high), T)
    if name in ("ve", "edm"):
        return from_sde(VE(*config.ends(SIGMA_ENDS)), T)
    if name == "betas":
        schedule = schedule_from_betas(torch.tensor(config.betas, dtype=torch.float64))
    elif name in BETA_ENDS:
        make = linear if name == "linear" else quadratic
        schedule = make(T, *config.ends(BETA_ENDS))
    else:
        by_name: dict[str, Callable[[int], Schedule]] = {
            "cosine": cosine,
            "sigmoid": sigmoid,
            "laplace": laplace,
        }
        schedule = by_name[name](T)
    return with_zero_terminal_snr(schedule) if config.zero_terminal_snr else schedule
