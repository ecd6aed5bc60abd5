"""Denoising diffusion implicit models, Song et al. 2021."""

import torch
from torch import Tensor

from pipeline.diffusion.schedules import Schedule
from pipeline.samplers.plan import X_0, Plan, X, Z, make_row


def ddim(schedule: Schedule, times: Tensor, eta: float) -> Plan:
    """x_s = √ᾱ_s x̂_0 + √(1-ᾱ_s-σ²) ε + σ z  with  σ = η √((1-ᾱ_s)/(1-ᾱ_t)) √(1-ᾱ_t/ᾱ_s).

    Song et al. 2021, Eq. 12 and 16. ε is (x_t - √ᾱ_t x̂_0)/√(1-ᾱ_t), re-derived from the x̂_0 in use.
    """
    alpha_bar = schedule.alpha_bar_at(times)
    alpha_bar_t, alpha_bar_s = alpha_bar[:-1], alpha_bar[1:]
    variance = eta**2 * (1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s)
    c_eps = (1 - alpha_bar_s - variance).clamp(min=0).sqrt()
    c_x = c_eps * (1 - alpha_bar_t).rsqrt()
    c_x_0 = alpha_bar_s.sqrt() - c_x * alpha_bar_t.sqrt()
    sigma = variance.sqrt()
    rows = [
        make_row(
            float(times[i]),
            float(alpha_bar_t[i]),
            {(X, X): float(c_x[i]), (X, X_0): float(c_x_0[i]), (X, Z): float(sigma[i])},
        )
        for i in range(len(times) - 1)
    ]
    return Plan(torch.stack(rows))
