"""Diffusion exponential integrator sampler, Zhang & Chen 2023: tAB-DEIS in log ρ."""

import torch
from torch import Tensor

from pipeline.diffusion.schedules import Schedule
from pipeline.samplers.multistep import SOURCES, combined_row, eps_of, exponential_weights
from pipeline.samplers.plan import H1, H2, X_0, Plan, X


def deis(schedule: Schedule, times: Tensor, order: int) -> Plan:
    """x_s/√ᾱ_s = x_t/√ᾱ_t + ∫ ε dρ  with  ρ = √((1-ᾱ)/ᾱ)  and ε a polynomial in log ρ.

    Zhang & Chen 2023, Eq. 14-15 and, for ρ, Prop. 3. The polynomial goes through this ε and the
    `order` - 1 before it, and is integrated in closed form. Order 1 is DDIM. The first steps have
    fewer ε behind them; a step to the clean image or from ᾱ = 0 is of order 1, since log ρ is
    infinite there.

    times: (N+1,) float64, falling; the last one may be -1, the clean image.
    order: 1, 2 or 3.
    """
    alpha_bar = schedule.alpha_bar_at(times)
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    half_log_snr = (alpha_bar.logit() / 2).tolist()  # -log ρ
    first = int(alpha_bar[0] == 0)  # the first level that a polynomial can go through
    rows = []
    for i in range(len(times) - 1):
        eps = eps_of(alpha_bar[i])
        x = alpha[i + 1] * SOURCES[X_0] + sigma[i + 1] * eps
        points = 1 if times[i + 1] < 0 else max(1, min(order, i + 1 - first))
        if points > 1:
            h = half_log_snr[i + 1] - half_log_snr[i]
            nodes = [(half_log_snr[i - k] - half_log_snr[i]) / h for k in range(points)]
            scale = -alpha[i + 1] / alpha[i] * sigma[i] * h
            for k, w in enumerate(exponential_weights(h, nodes)[1:]):
                x = x + scale * w * (SOURCES[(H1, H2)[k]] - eps)
        slots = {X: x, H1: eps, H2: SOURCES[H1]}
        rows.append(combined_row(times[i], alpha_bar[i], slots))
    return Plan(torch.stack(rows))
