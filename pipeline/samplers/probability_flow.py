"""The probability-flow ODE as a sampler: deterministic, with the steps that its tolerances need.

Song et al. 2021, "Score-based generative modeling through SDEs", section 4.3. The ODE is followed
from the log-SNR of T-1 up to that of t = 0, and x̂_0 of that last level is the image. Its network
evaluations differ from image to image. `steps` and `spacing` have no part in it.

Guidance and thresholds work as in a plan. To clip x̂_0 (`clip_x_0`, the default) puts kinks into the
ODE, at which the solver must slow down, and the flow is then no longer the model's own; with
`clip_x_0=false` it is, up to the tolerances.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.diffusion.gaussian import one_by_one
from pipeline.diffusion.ode import Solution, flow, integrate
from pipeline.diffusion.schedules import Schedule
from pipeline.samplers.config import SamplingConfig
from pipeline.samplers.plan import Plan, make_row, threshold, with_settings

Predict = Callable[[Tensor, Tensor], tuple[Tensor, Tensor | None]]
"""(x_t (B, ...), a plan's row of each (B, NUM_COLUMNS)) -> x̂_0 (B, ...) before its threshold, and
the fraction of a learned variance (B, ...) if there is one."""


def probability_flow(
    schedule: Schedule, predict: Predict, x_T: Tensor, sampling: SamplingConfig
) -> Solution:
    """The images that x_T (B, ...), float64, flows to, and the network evaluations of each (B,).

    Raises:
        UserError: the tolerances cannot be met, see `integrate`.
    """

    def x_0_at(x: Tensor, log_snr: Tensor) -> Tensor:
        t, alpha_bar = one_by_one(schedule.t_at, log_snr), one_by_one(torch.sigmoid, log_snr)
        levels = zip(t.tolist(), alpha_bar.tolist(), strict=True)
        bare = Plan(torch.stack([make_row(*level, {}) for level in levels]))
        rows = with_settings(bare, sampling).table
        return threshold(predict(x, rows)[0], rows).to(x.dtype)

    noise, data = schedule.log_snr[[-1, 0]].tolist()
    x, evaluations = integrate(
        lambda x, log_snr: flow(x, x_0_at(x, log_snr), log_snr),
        x_T,
        noise,
        data,
        sampling.rtol,
        sampling.atol,
    )
    level = torch.full((len(x),), data, dtype=torch.float64)
    return Solution(x_0_at(x, level), evaluations + 1)
