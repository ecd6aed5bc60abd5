"""Ancestral sampling: x_s ~ p_θ(x_s | x_t), Ho et al. 2020, Algorithm 2, over any pairs."""

from typing import Literal

import torch

from pipeline.diffusion.gaussian import posterior_coefficients
from pipeline.diffusion.schedules import Schedule
from pipeline.samplers.plan import Plan, build_plan, trailing_timesteps


def ancestral(
    schedule: Schedule,
    steps: int,
    variance: Literal["fixed_small", "fixed_large"],
    clip_x_0: bool,
) -> Plan:
    """Each step draws from q(x_s | x_t, x̂_0), with variance β̃ (fixed_small) or β (fixed_large).

    The last step, to the clean image, adds no noise.
    """
    pairs = trailing_timesteps(schedule.timesteps, steps)
    t, s = torch.tensor(pairs).unbind(1)
    alpha_bar_t, alpha_bar_s = schedule.alpha_bar_at(t), schedule.alpha_bar_at(s)
    c_x_0, c_x, posterior_variance = posterior_coefficients(alpha_bar_t, alpha_bar_s)
    beta = 1 - alpha_bar_t / alpha_bar_s
    c_z = (posterior_variance if variance == "fixed_small" else beta).sqrt()
    return build_plan(pairs, alpha_bar_t, (c_x, c_x_0, c_z.where(s >= 0, 0.0)), clip_x_0)
