"""Euler-Maruyama on the reverse-time SDE, Song et al. 2021, "Score-based generative modeling"."""

import torch
from torch import Tensor

from pipeline.diffusion.schedules import Schedule
from pipeline.samplers.plan import X_0, Plan, X, Z, make_row


def euler_maruyama(schedule: Schedule, times: Tensor) -> Plan:
    """dx = (f x - g² ∇log p) dt + g dw̄  (Song et al. 2021, Eq. 6), from t to s = t - Δ; N rows:

        x_s = (1 - fΔ) x_t + g²Δ ∇log p_t(x_t) + g√Δ z,   ∇log p_t(x_t) = (m x̂_0 - x_t)/std²

    with f and g at t, in the frame of the SDE; x_t is √(m²+ std²) times the one of a plan. A table
    of ᾱ is taken for a VP SDE, with g²Δ = ∫β = log ᾱ_s/ᾱ_t. The step to the clean image returns
    x̂_0, the denoising of Jolicoeur-Martineau et al. 2021.

    times: (N+1,) float64, falling; the last one may be -1, the clean image.

    Raises:
        ValueError: the first ᾱ is 0, where the noise to be removed is infinite.
    """
    alpha_bar = schedule.alpha_bar_at(times)
    if alpha_bar[0] == 0:
        raise ValueError(
            "sampler=euler_maruyama cannot start at a signal-to-noise ratio of 0 "
            "(zero_terminal_snr): use ancestral or ddim"
        )
    if schedule.sde is None:
        mean, std = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
        g2 = (alpha_bar[1:] / alpha_bar[:-1]).log()  # times Δ, as f below
        f = -g2 / 2
    else:
        u = schedule.sde_time(times)
        delta = -u.diff()
        mean, std = schedule.sde.marginal(u)
        f = schedule.sde.drift(u[:-1]) * delta
        g2 = schedule.sde.diffusion(u[:-1]) ** 2 * delta
    frame = (mean**2 + std**2).sqrt()
    pull = g2 / std[:-1] ** 2
    c_x = (1 - f - pull) * frame[:-1] / frame[1:]
    c_x_0 = pull * mean[:-1] / frame[1:]
    c_z = g2.sqrt() / frame[1:]
    rows = []
    for i in range(len(times) - 1):
        if float(times[i + 1]) < 0:
            update = {(X, X_0): 1.0}
        else:
            update = {(X, X): float(c_x[i]), (X, X_0): float(c_x_0[i]), (X, Z): float(c_z[i])}
        rows.append(make_row(float(times[i]), float(alpha_bar[i]), update))
    return Plan(torch.stack(rows))
