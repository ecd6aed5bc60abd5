"""Denoising diffusion implicit models, Song et al. 2021."""

import torch

from pipeline.diffusion.schedules import Schedule
from pipeline.samplers.plan import Plan, build_plan, trailing_timesteps


def ddim(schedule: Schedule, steps: int, eta: float, clip_x_0: bool) -> Plan:
    """x_s = √ᾱ_s x̂_0 + √(1-ᾱ_s-σ²) ε + σ z  with  σ = η √((1-ᾱ_s)/(1-ᾱ_t)) √(1-ᾱ_t/ᾱ_s).

    Song et al. 2021, Eq. 12 and 16. ε is (x_t - √ᾱ_t x̂_0)/√(1-ᾱ_t), re-derived from the x̂_0 in use.
    """
    pairs = trailing_timesteps(schedule.timesteps, steps)
    t, s = torch.tensor(pairs).unbind(1)
    alpha_bar_t, alpha_bar_s = schedule.alpha_bar_at(t), schedule.alpha_bar_at(s)
    variance = eta**2 * (1 - alpha_bar_s) / (1 - alpha_bar_t) * (1 - alpha_bar_t / alpha_bar_s)
    c_eps = (1 - alpha_bar_s - variance).clamp(min=0).sqrt()
    c_x = c_eps * (1 - alpha_bar_t).rsqrt()
    c_x_0 = alpha_bar_s.sqrt() - c_x * alpha_bar_t.sqrt()
    return build_plan(pairs, alpha_bar_t, (c_x, c_x_0, variance.sqrt()), clip_x_0)
