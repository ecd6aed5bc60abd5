"""Which noise levels a sampler visits: times t_1 > ... > t_N and then -1, the clean image.

Times are the schedule's own, real where the levels lie between its timesteps. They are explicit:
a fixed stride names the wrong next timestep unless the number of steps divides T, which makes a
sampler converge to something plausible and wrong.
"""

import torch
from torch import Tensor

from pipeline.diffusion.schedules import Schedule
from pipeline.samplers.plan import Spacing

RHO = 7.0
"""ρ of Karras et al. 2022, Eq. 5."""


def make_times(schedule: Schedule, steps: int, spacing: Spacing) -> Tensor:
    """(steps+1,) float64, falling, the last one -1.

        trailing   T-1, then every T/N-th, rounded; the default: x_T is noise there
        leading    every ⌊T/N⌋-th from 0, which starts below T-1 (Ho et al. 2020, Song et al. 2021)
        linspace   from T-1 to 0, evenly, rounded
        karras     σ^(1/ρ) evenly, ρ = 7 (Karras et al. 2022, Eq. 5)
        log_snr    λ evenly (Lu et al. 2022)

    The first three are named as in Lin et al. 2023, table 2.

    Raises:
        ValueError: steps is not in 1 .. T, or the spacing needs a finite log-SNR and there is none.
    """
    T = schedule.timesteps
    if not 1 <= steps <= T:
        raise ValueError(f"steps={steps} must be from 1 to the schedule's {T} timesteps")
    i = torch.arange(steps, dtype=torch.float64)
    if spacing == "trailing":
        times = (T * (steps - i) / steps).round() - 1
    elif spacing == "leading":
        times = (i * (T // steps)).flip(0)
    elif spacing == "linspace":
        times = torch.linspace(T - 1, 0, steps, dtype=torch.float64).round()
    else:
        log_snr = schedule.log_snr
        if log_snr[-1].isinf():
            raise ValueError(
                f"spacing={spacing} cannot start at a signal-to-noise ratio of 0 "
                "(zero_terminal_snr): use trailing"
            )
        part = i / max(1, steps - 1)
        if spacing == "log_snr":
            levels = torch.lerp(log_snr[-1], log_snr[0], part)
        else:
            high, low = (-log_snr[[-1, 0]] / 2 / RHO).exp()  # σ^(1/ρ), σ = e^{-λ/2}
            levels = -2 * RHO * torch.lerp(high, low, part).log()
        times = schedule.t_at(levels)
        times[0] = T - 1  # exactly
    return torch.cat([times, times.new_tensor([-1.0])])
