"""The probability-flow ODE, and the adaptive solver that follows it.

A diffusion dx = -½β x dt + √β dw has the same marginals as the ODE  dx/dt = -½β x - ½β s(x)
(Song et al. 2021, "Score-based generative modeling through SDEs", Eq. 13), with the score
s = -ε/σ and σ² = 1-ᾱ. From dᾱ/dt = -β ᾱ follows dλ/dt = -β/σ² for the log-SNR λ = log ᾱ/(1-ᾱ),
and with λ for the time the schedule drops out:

    dx/dλ = ½ (σ² x - σ ε̂(x, λ)) = ½ √ᾱ (x̂_0(x, λ) - √ᾱ x),    ᾱ = S(λ),  S the logistic function

The second form, by x_t = √ᾱ x̂_0 + σ ε̂, divides by nothing at either end.

The solver is the pair of Dormand & Prince 1980 of orders 5 and 4, as in Hairer, Nørsett & Wanner,
"Solving ordinary differential equations I", section II.4. Each row of a batch is a system of its
own, with its own time and step: what becomes of a row does not depend on the others.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.device import send
from pipeline.diffusion.gaussian import like, one_by_one
from pipeline.errors import UserError

MAX_EVALUATIONS = 10_000

NODES = (1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
STAGES = (
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
"""Slopes that lead to each stage. The last stage is the solution of order 5, so that its slope is
the first of the next step."""
ERROR = (71 / 57600, 0.0, -71 / 16695, 71 / 1920, -17253 / 339200, 22 / 525, -1 / 40)
"""Solution of order 5 less that of order 4."""
SAFETY, SHRINK, GROW = 0.9, 0.2, 10.0

Slope = Callable[[Tensor, Tensor], Tensor]
"""(x (B, ...), t (B,) float64) -> dx/dt (B, ...), row i from row i alone."""


class Solution(NamedTuple):
    x: Tensor
    """(B, ...)"""
    evaluations: Tensor
    """Of the slope, of each row until it arrived: (B,) int64."""


def flow(x: Tensor, x_0: Tensor, log_snr: Tensor) -> Tensor:
    """dx/dλ of the probability flow where the model says x̂_0; (B, ...) each, log_snr (B,)."""
    alpha_bar = one_by_one(torch.sigmoid, log_snr)
    return like(alpha_bar.sqrt() / 2, x) * (x_0 - like(alpha_bar.sqrt(), x) * x)


def integrate(
    slope: Slope,
    x: Tensor,
    start: float,
    end: float,
    rtol: float,
    atol: float,
    max_evaluations: int = MAX_EVALUATIONS,
) -> Solution:
    """Follow dx/dt = slope(x, t) from `start` to `end`, either way, each row with its own steps.

    A step is taken if the root mean square of error / (atol + rtol |x|) over the elements of the
    row is below 1. The slope is always asked for the whole batch; a row that has arrived stays.

    Args:
        x: (B, ...) at `start`, in float64 unless the tolerances are coarse.

    Raises:
        UserError: a row needs more evaluations than the cap, or steps too small to add up.
    """
    x, B = x.clone(), len(x)
    k_1 = slope(x, torch.full((B,), start, dtype=torch.float64))
    steps = _first_steps(slope, x, k_1, start, end, rtol, atol)
    t = [start] * B
    evaluations = torch.full((B,), 2)
    rejected = [False] * B
    while any(moving := [t_i != end for t_i in t]):
        for i in range(B):
            too_small = not abs(steps[i]) >= 10 * math.ulp(t[i])  # or not a number
            if moving[i] and (too_small or evaluations[i] >= max_evaluations):
                raise UserError(
                    f"the ODE solver is at λ = {t[i]:.6g} on its way from {start:.6g} to "
                    f"{end:.6g} after {int(evaluations[i])} network evaluations, and "
                    + ("its steps have become too small" if too_small else "that is its limit")
                    + f": raise rtol={rtol:g} and atol={atol:g}"
                )
            left = end - t[i]
            steps[i] = left if abs(left) <= abs(steps[i]) else steps[i]  # 0 where it has arrived
        h = torch.tensor(steps, dtype=torch.float64)
        here = torch.tensor(t, dtype=torch.float64)
        k, following = [k_1], x
        for node, weights in zip(NODES, STAGES, strict=True):
            following = x + like(h, x) * _combined(weights, k)
            k.append(slope(following, here + node * h))
        evaluations += 6 * torch.tensor(moving)
        error = like(h, x) * _combined(ERROR, k)
        errors = _norms(error, torch.maximum(x.abs(), following.abs()), rtol, atol)
        taken = [moving[i] and errors[i] < 1 for i in range(B)]
        mask = send(torch.tensor(taken), x.device).reshape(B, *[1] * (x.ndim - 1))
        x, k_1 = torch.where(mask, following, x), torch.where(mask, k[-1], k_1)
        for i in range(B):
            if not moving[i]:
                continue
            if taken[i]:
                t[i] = end if steps[i] == end - t[i] else t[i] + steps[i]
            factor = _factor(errors[i])
            steps[i] *= min(1.0, factor) if rejected[i] or not taken[i] else factor
            rejected[i] = not taken[i]
    return Solution(x, evaluations)


def _factor(error: float) -> float:
    """By how much to change a step of that error: the error of the pair goes with its 5th power."""
    if error == 0:
        return GROW
    if not math.isfinite(error):
        return SHRINK
    return min(GROW, max(SHRINK, SAFETY / math.pow(error, 1 / 5)))


def _first_steps(
    slope: Slope, x: Tensor, k_1: Tensor, start: float, end: float, rtol: float, atol: float
) -> list[float]:
    """A first step for each row; Hairer, Nørsett & Wanner, section II.4, "Starting step size"."""
    span, sign = abs(end - start), math.copysign(1.0, end - start)
    size, speed = _norms(x, x.abs(), rtol, atol), _norms(k_1, x.abs(), rtol, atol)
    probes = [
        min(span, 1e-6 if d_0 < 1e-5 or d_1 < 1e-5 else 0.01 * d_0 / d_1)
        for d_0, d_1 in zip(size, speed, strict=True)
    ]
    h = sign * torch.tensor(probes, dtype=torch.float64)
    k_2 = slope(x + like(h, x) * k_1, start + h)
    bend = _norms(k_2 - k_1, x.abs(), rtol, atol)
    steps = []
    for h_0, d_1, difference in zip(probes, speed, bend, strict=True):
        d_2 = difference / h_0 if h_0 else 0.0
        largest = max(d_1, d_2)
        h_1 = max(1e-6, 1e-3 * h_0) if largest <= 1e-15 else (0.01 / largest) ** (1 / 5)
        steps.append(sign * min(100 * h_0, h_1, span))
    return steps


def _combined(weights: tuple[float, ...], k: list[Tensor]) -> Tensor:
    total = torch.zeros_like(k[0])
    for weight, k_j in zip(weights, k, strict=True):
        if weight:
            total = total + weight * k_j
    return total


def _norms(x: Tensor, size: Tensor, rtol: float, atol: float) -> list[float]:
    """Of each row, the root mean square of x / (atol + rtol size).

    Row by row: a reduction over a batch may round differently with its size.
    """
    ratio = (x / (atol + rtol * size)).double()
    means = torch.stack([row.square().mean() for row in ratio])
    return [math.sqrt(mean) for mean in means.tolist()]  # a device is waited for once
