"""Heun's method in the σ-space of Karras et al. 2022, with churn; see euler.py beside it."""

import torch
from torch import Tensor

from pipeline.diffusion.schedules import Schedule
from pipeline.samplers.euler import raised_levels
from pipeline.samplers.plan import H1, X_0, Plan, X, Z, make_row


def heun(
    schedule: Schedule,
    times: Tensor,
    churn: float = 0.0,
    churn_min: float = 0.0,
    churn_max: float | None = None,
    churn_noise: float = 1.0,
) -> Plan:
    """Karras et al. 2022, Algorithm 2: a step of Euler, then its correction; 2N-1 rows.

    The correction averages the slopes at both ends, x̃_s = x̃_t + (σ_s - σ_t) (ε_t + ε_s)/2. Euler
    ended at u = √ᾱ_s (x̂_0 + σ_s ε_t), so ε_s - ε_t = (x̂_0 - x̂_0')/σ_s for the new x̂_0' at u, and

        x_s = u + √ᾱ_s/2 (σ_t/σ_s - 1) (x̂_0' - x̂_0)

    which takes no difference of large numbers. A step from σ = ∞, or to σ = 0, is Euler's.

    times: (N+1,) float64, falling; the last one may be -1, the clean image.
    churn, churn_min, churn_max, churn_noise: S_churn, S_tmin, S_tmax (None: no bound), S_noise.
    """
    alpha_bar = schedule.alpha_bar_at(times)
    t_hat, alpha_bar_hat = raised_levels(schedule, times, churn, churn_min, churn_max)
    sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
    sigma_hat = ((1 - alpha_bar_hat) / alpha_bar_hat).sqrt()
    keep = (alpha_bar_hat[1:] / alpha_bar[1:]).sqrt()
    c_z = churn_noise * (1 - keep**2).sqrt()
    c_x = ((1 - alpha_bar[1:]) / (1 - alpha_bar_hat[:-1])).sqrt()
    c_x_0 = alpha_bar[1:].sqrt() - c_x * alpha_bar_hat[:-1].sqrt()
    correction = alpha_bar[1:].sqrt() / 2 * (sigma_hat[:-1] / sigma[1:] - 1)  # inf: Euler's step
    rows = []
    for i in range(len(times) - 1):
        is_corrected = bool(correction[i].isfinite())
        k = 1.0 if is_corrected else float(keep[i])
        first = {(X, X): k * float(c_x[i]), (X, X_0): k * float(c_x_0[i])}
        if not is_corrected:
            first[X, Z] = float(c_z[i])
            rows.append(make_row(float(t_hat[i]), float(alpha_bar_hat[i]), first))
            continue
        rows.append(make_row(float(t_hat[i]), float(alpha_bar_hat[i]), {**first, (H1, X_0): 1.0}))
        c = float(keep[i] * correction[i])
        second = {(X, X): float(keep[i]), (X, X_0): c, (X, H1): -c, (X, Z): float(c_z[i])}
        rows.append(make_row(float(times[i + 1]), float(alpha_bar[i + 1]), second))
    return Plan(torch.stack(rows))
