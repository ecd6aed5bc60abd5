"""Ancestral sampling: x_s ~ p_θ(x_s | x_t), Ho et al. 2020, Algorithm 2, over any times."""

import torch
from torch import Tensor

from pipeline.diffusion.config import Variance
from pipeline.diffusion.gaussian import posterior_coefficients
from pipeline.diffusion.schedules import Schedule
from pipeline.samplers.plan import LOG_RANGE, X_0, Plan, X, Z, make_row


def ancestral(schedule: Schedule, times: Tensor, variance: Variance) -> Plan:
    """Each step draws from q(x_s | x_t, x̂_0), with variance β̃, β, or one learned between them.

    Nichol & Dhariwal 2021, Eq. 15, for the learned one. The step to the clean image adds no noise.
    """
    alpha_bar = schedule.alpha_bar_at(times)
    alpha_bar_t, alpha_bar_s = alpha_bar[:-1], alpha_bar[1:]
    c_x_0, c_x, posterior_variance = posterior_coefficients(alpha_bar_t, alpha_bar_s)
    beta = 1 - alpha_bar_t / alpha_bar_s
    c_z = (beta if variance == "fixed_large" else posterior_variance).sqrt()
    rows = []
    for i in range(len(times) - 1):
        clean = float(times[i + 1]) < 0
        update = {
            (X, X): float(c_x[i]),
            (X, X_0): float(c_x_0[i]),
            (X, Z): 0.0 if clean else float(c_z[i]),
        }
        row = make_row(float(times[i]), float(alpha_bar_t[i]), update)
        if variance == "learned_range" and not clean:
            row[LOG_RANGE] = (beta[i] / posterior_variance[i]).log()
        rows.append(row)
    return Plan(torch.stack(rows))
