"""Pseudo linear multistep (PLMS), Liu et al. 2022, "Pseudo numerical methods" (PNDM)."""

import torch
from torch import Tensor

from pipeline.diffusion.schedules import Schedule
from pipeline.samplers.multistep import SOURCES, combined_row, eps_of
from pipeline.samplers.plan import H1, H2, H3, X_0, Plan, X

ADAMS_BASHFORTH = (
    (1.0,),
    (3 / 2, -1 / 2),
    (23 / 12, -16 / 12, 5 / 12),
    (55 / 24, -59 / 24, 37 / 24, -9 / 24),
)
"""Weights of the last n ε, the newest first, for levels at even distances."""


def pndm(schedule: Schedule, times: Tensor) -> Plan:
    """DDIM's step with ε replaced by ε' = (55 ε_t - 59 ε_{t+δ} + 37 ε_{t+2δ} - 9 ε_{t+3δ})/24.

    Liu et al. 2022, section 3.3, Eq. 11 (DDIM's step, φ) and 12. The first step is the pseudo
    improved Euler method: φ once more, with the mean of ε at both of its ends, which takes a row of
    its own. The next two have the weights of orders 2 and 3. φ takes ε as constant, so the method
    is of order 2 however many ε it weighs, as the paper proves. The step to the clean image is
    DDIM's own.

    Clipping x̂_0 does not bound x_s: a difference of two ε enters it ∂φ/∂ε times, which is -0.2 in
    the first of 50 steps of the linear schedule, but -630 of the cosine one.

    times: (N+1,) float64, falling; the last one may be -1, the clean image.

    Raises:
        ValueError: the first ᾱ is 0, where x_s does not depend on ε alone.
    """
    alpha_bar = schedule.alpha_bar_at(times)
    if alpha_bar[0] == 0:
        raise ValueError(
            "sampler=pndm cannot start at a signal-to-noise ratio of 0 (zero_terminal_snr): "
            "use ddim"
        )
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    slope = sigma[1:] - alpha[1:] / alpha[:-1] * sigma[:-1]  # ∂φ/∂ε at a fixed x_t
    rows = []
    for i in range(len(times) - 1):
        clean = bool(times[i + 1] < 0)
        eps = eps_of(alpha_bar[i])
        weights = (1.0,) if clean else ADAMS_BASHFORTH[min(i, 3)]
        history = torch.stack([eps, *SOURCES[[H1, H2, H3]]])[: len(weights)]
        eps_prime = torch.tensor(weights, dtype=torch.float64) @ history
        x = alpha[i + 1] * SOURCES[X_0] + sigma[i + 1] * eps + slope[i] * (eps_prime - eps)
        slots = {X: x, H1: eps, H2: SOURCES[H1], H3: SOURCES[H2]}
        rows.append(combined_row(times[i], alpha_bar[i], slots))
        if i == 0 and not clean:
            mean = (eps_of(alpha_bar[1]) + SOURCES[H1]) / 2
            x = SOURCES[X] + slope[0] * (mean - SOURCES[H1])
            rows.append(combined_row(times[1], alpha_bar[1], {X: x, H1: SOURCES[H1]}))
    return Plan(torch.stack(rows))
