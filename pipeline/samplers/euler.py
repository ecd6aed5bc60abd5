"""Euler's method in the σ-space of Karras et al. 2022, "Elucidating the design space", with churn.

In x̃ = x/√ᾱ with σ = √((1-ᾱ)/ᾱ) the probability flow is dx̃/dσ = (x̃ - x̂_0)/σ (Eq. 1 and 3): the
slope is ε. A step of Euler, x̃ + (σ_s - σ_t) ε, is one of DDIM with η = 0.

Churn raises the noise level from σ to σ̂ = (1+γ) σ before a step. That is the forward process,
x_t̂ ~ q(x_t̂ | x_t), and stands at the end of the preceding row of a plan. Before the first row
nothing is needed: x_T ~ N(0, I) holds at σ̂, too.
"""

import math

import torch
from torch import Tensor

from pipeline.diffusion.schedules import Schedule
from pipeline.samplers.plan import X_0, Plan, X, Z, make_row


def euler(
    schedule: Schedule,
    times: Tensor,
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float | None = None,
    churn_noise: float = 1.0,
) -> Plan:
    """Karras et al. 2022, Algorithm 2 without its correction (lines 7-8); N rows.

    times: (N+1,) float64, falling; the last one may be -1, the clean image.
    churn, churn_min, churn_max, churn_noise: S_churn, S_tmin, S_tmax (None: no bound), S_noise.
    """
    alpha_bar = schedule.alpha_bar_at(times)
    t_hat, alpha_bar_hat = raised_levels(schedule, times, churn, churn_min, churn_max)
    keep = (alpha_bar_hat[1:] / alpha_bar[1:]).sqrt()
    c_z = churn_noise * (1 - keep**2).sqrt()
    c_x = ((1 - alpha_bar[1:]) / (1 - alpha_bar_hat[:-1])).sqrt()
    c_x_0 = alpha_bar[1:].sqrt() - c_x * alpha_bar_hat[:-1].sqrt()
    rows = [
        make_row(
            float(t_hat[i]),
            float(alpha_bar_hat[i]),
            {
                (X, X): float(keep[i] * c_x[i]),
                (X, X_0): float(keep[i] * c_x_0[i]),
                (X, Z): float(c_z[i]),
            },
        )
        for i in range(len(times) - 1)
    ]
    return Plan(torch.stack(rows))


def raised_levels(
    schedule: Schedule, times: Tensor, churn: float, churn_min: float, churn_max: float | None
) -> tuple[Tensor, Tensor]:
    """(t̂, ᾱ̂) at σ̂ = (1+γ) σ, from where each step starts; (N+1,) each, the last as it was.

    γ = min(S_churn/N, √2-1) for σ within [S_tmin, S_tmax], else 0 (Karras et al. 2022, Algorithm 2,
    line 4). Above the schedule's noisiest level t̂ is T-1, the nearest that a network knows.
    """
    alpha_bar = schedule.alpha_bar_at(times)
    sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
    gamma = min(churn / (len(times) - 1), math.sqrt(2) - 1)
    churned = (sigma >= churn_min) & sigma.isfinite()
    if churn_max is not None:
        churned &= sigma <= churn_max
    churned[-1] = False
    if gamma == 0 or not churned.any():
        return times, alpha_bar
    t_hat, alpha_bar_hat = times.clone(), alpha_bar.clone()
    log_snr = -2 * ((1 + gamma) * sigma[churned]).log()
    t_hat[churned], alpha_bar_hat[churned] = schedule.t_at(log_snr), log_snr.sigmoid()
    return t_hat, alpha_bar_hat
