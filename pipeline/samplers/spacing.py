"""Which noise levels a sampler visits: times t_1 > ... > t_N and then -1, the clean image.

Times are the schedule's own, real where the levels lie between its timesteps. They are explicit:
a fixed stride names the wrong next timestep unless the number of steps divides T, which makes a
sampler converge to something plausible and wrong.
"""

import torch
from torch import Tensor

from pipeline.diffusion.schedules import Schedule
from pipeline.samplers.config import Spacing

RHO = 7.0
"""ρ of Karras et al. 2022, Eq. 5."""


LEAST_LOG_SNR = -10.2
"""λ/2 = -5.1, where Lu et al. 2022 start on the cosine schedule; √ᾱ is 0.006, as linear's last."""


def start_above(schedule: Schedule, log_snr: float = LEAST_LOG_SNR) -> float:
    """T-1, or the real time of that log-SNR where the schedule falls below it.

    A solver that extrapolates ε multiplies an error of x̂_0 by σ_t/σ_s, σ = √((1-ᾱ)/ᾱ), in a step
    from t to s. The cosine schedule ends at σ = 20,291, from where one step loses the image; x_t is
    noise just as well at σ = 164. Where ᾱ is 0 the step is of order 1, and T-1 is the place.
    """
    last = schedule.timesteps - 1
    if schedule.alpha_bar[-1] == 0 or schedule.log_snr[-1] >= log_snr:
        return float(last)
    return float(schedule.t_at(torch.tensor([log_snr], dtype=torch.float64)))


def make_times(
    schedule: Schedule, steps: int, spacing: Spacing, start: float | None = None
) -> Tensor:
    """(steps+1,) float64, falling, the last one -1.

        trailing   T-1, then every T/N-th, rounded; the default: x_T is noise there
        leading    every ⌊T/N⌋-th from 0, which starts below T-1 (Ho et al. 2020, Song et al. 2021)
        linspace   from T-1 to 0, evenly, rounded
        karras     σ^(1/ρ) evenly, ρ = 7 (Karras et al. 2022, Eq. 5)
        log_snr    λ evenly (Lu et al. 2022)

    The first three are named as in Lin et al. 2023, table 2.

    Args:
        start: the first time, for T-1; if it is real, times are not rounded. leading has its own
            where that is below. With more steps than timesteps from there on, trailing and leading
            are linspace.

    Raises:
        ValueError: steps is not in 1 .. T, or the spacing needs a finite log-SNR and there is none.
    """
    T = schedule.timesteps
    if not 1 <= steps <= T:
        raise ValueError(f"steps={steps} must be from 1 to the schedule's {T} timesteps")
    first = float(T - 1) if start is None else start
    whole = torch.round if first == T - 1 else torch.clone  # between timesteps, nothing to round to
    i = torch.arange(steps, dtype=torch.float64)
    evenly = whole(torch.linspace(first, 0, steps, dtype=torch.float64))
    if spacing == "trailing":
        # below 0 there is no timestep but the clean image, where ε has no meaning
        times = whole((first + 1) * (steps - i) / steps) - 1 if steps <= first + 1 else evenly
    elif spacing == "leading":
        times = (i * (T // steps)).flip(0)
        times = times if times[0] <= first else evenly
    elif spacing == "linspace":
        times = evenly
    else:
        low_snr = schedule.alpha_bar_at(torch.tensor(first)).logit()
        high_snr = schedule.log_snr[0]
        if low_snr.isinf():
            raise ValueError(
                f"spacing={spacing} cannot start at a signal-to-noise ratio of 0 "
                "(zero_terminal_snr): use trailing"
            )
        part = i / max(1, steps - 1)
        if spacing == "log_snr":
            levels = torch.lerp(low_snr, high_snr, part)
        else:
            # σ^(1/ρ), σ = e^{-λ/2}
            roots = torch.lerp((-low_snr / 2 / RHO).exp(), (-high_snr / 2 / RHO).exp(), part)
            levels = -2 * RHO * roots.log()
        times = schedule.t_at(levels)
        times[0] = first  # exactly
    return torch.cat([times, times.new_tensor([-1.0])])
