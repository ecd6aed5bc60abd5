"""DPM-Solver (Lu et al. 2022a) and DPM-Solver++ (Lu et al. 2022b): exponential integrators in λ.

With α = √ᾱ, σ = √(1-ᾱ) and λ = log α/σ, half the log-SNR, a step by h = λ_s - λ_t solves the
linear part of the probability flow exactly,

    x_s = α_s/α_t x_t - σ_s ∫_0^h e^{h-τ} ε̂(λ_t+τ) dτ         Lu et al. 2022a, Prop. 3.1
    x_s = σ_s/σ_t x_t + α_s ∫_0^h e^{τ-h} x̂_0(λ_t+τ) dτ       Lu et al. 2022b, Prop. 4.1

and what is left is to extrapolate the output m = ε̂ or x̂_0 under the integral. With m constant both
are DDIM. With k = h, c = σ_s for ε̂, and k = -h, c = α_s for x̂_0, the terms of m' and m'' (in λ) are
the same for both:

    x_s = DDIM - c (e^k-1)/2 m'h                                               order 2
    x_s = DDIM - c φ m'h - c (φ/k - 1/2) m''h²   with  φ = (e^k-1)/k - 1        order 3

The derivatives are differences with the outputs of earlier steps (multistep) or of evaluations
within the step (single-step). Order 2 has (e^k-1)/2 where the integral has φ: the papers' form, of
the same order. With guidance or thresholds use x̂_0, whose steps stay bounded if x̂_0 does.
"""

import itertools
import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from pipeline.diffusion.schedules import Schedule
from pipeline.samplers.multistep import SOURCES, combined_row
from pipeline.samplers.plan import ANCHOR, H1, H2, X_0, Plan, X, Z

Form = Literal["eps", "x_0"]
"""What is extrapolated: ε̂ is DPM-Solver, x̂_0 is DPM-Solver++."""


class Level(NamedTuple):
    """A noise level: t, ᾱ, α = √ᾱ, σ = √(1-ᾱ), λ = log α/σ, which may be infinite."""

    t: Tensor
    alpha_bar: Tensor
    alpha: float
    sigma: float
    lambda_: float


def dpm_solver(
    schedule: Schedule,
    times: Tensor,
    order: int,
    form: Form,
    singlestep: bool = False,
    stochastic: bool = False,
) -> Plan:
    """A step for each pair of times, of one row, or of `order` rows where singlestep.

    The first multistep steps have the order that their history allows. A step to the clean image,
    or from ᾱ = 0, is infinitely long in λ, and of order 1.

    times: (N+1,) float64, falling; the last one may be -1, the clean image.
    order: 1, 2 or 3; 1 is DDIM with η = 0.
    stochastic: SDE-DPM-Solver++, of form x_0 and order 1 or 2, multistep; order 1 is DDIM with
        η = 1.
    """
    assert not stochastic or (form == "x_0" and order < 3 and not singlestep)
    alpha_bar = schedule.alpha_bar_at(times)
    levels = _levels(times, alpha_bar)
    if singlestep:
        part = torch.arange(1, order, dtype=torch.float64) / order
        log_snr = alpha_bar.logit().unsqueeze(1)
        between = log_snr[:-1] + part * log_snr.diff(dim=0)  # (N, order-1); unused if not finite
        within = _levels(schedule.t_at(between).flatten(), between.sigmoid().flatten())
    rows: list[Tensor] = []
    before: list[float] = []  # h of the steps so far, the last one first
    for i, (t, s) in enumerate(itertools.pairwise(levels)):
        h = s.lambda_ - t.lambda_
        if singlestep and order > 1 and math.isfinite(h):
            rows += _single_step(t, within[i * (order - 1) : (i + 1) * (order - 1)], s, form)
        else:
            rows.append(_multistep(t, s, order, form, before, stochastic))
        before.insert(0, h)
    return Plan(torch.stack(rows))


def _multistep(
    t: Level, s: Level, order: int, form: Form, before: list[float], stochastic: bool
) -> Tensor:
    """Lu et al. 2022b, Algorithm 2, and its like of order 3. H1 and H2 are m one and two steps ago.

    At order 3 m'' is twice the second divided difference; published code leaves out that factor of
    two, and converges at order 2.
    """
    h = s.lambda_ - t.lambda_
    k, c = _kernel(form, s, 2 * h if stochastic else h)
    x_s = _sde_step(t, s, h) if stochastic else _ddim(t, s)
    m = _output(form, t)
    order_now = min(order, len(before) + 1) if math.isfinite(h) else 1
    if order_now > 1:
        slope = (m - SOURCES[H1]) * (h / before[0])  # m'h, half a step ago
    if order_now == 2:
        x_s = x_s - c * math.expm1(k) / 2 * slope
    elif order_now == 3:
        earlier = (SOURCES[H1] - SOURCES[H2]) * (h / before[1])
        curve = (slope - earlier) * (2 * h / (before[0] + before[1]))  # m''h²
        slope = slope + before[0] / h / 2 * curve  # m'h, at t
        phi = math.expm1(k) / k - 1
        x_s = x_s - c * phi * slope - c * (phi / k - 0.5) * curve
    history = [{}, {H1: m}, {H1: m, H2: SOURCES[H1]}][order - 1]
    return combined_row(t.t, t.alpha_bar, {X: x_s, **history})


def _single_step(t: Level, within: list[Level], s: Level, form: Form) -> list[Tensor]:
    """Lu et al. 2022a, Algorithms 1 and 2, and their likes for x̂_0 (Lu et al. 2022b, Algorithm 1).

    The levels within the step lie at half of h, or at one and two thirds. x_t and x̂_0 of t itself
    wait in ANCHOR and H1.
    """
    m_t = _output(form, t, ANCHOR, H1)
    first = {X: _ddim(t, within[0]), ANCHOR: SOURCES[X], H1: SOURCES[X_0]}
    rows = [combined_row(t.t, t.alpha_bar, first)]
    for u, v in zip(within, [*within[1:], s], strict=True):
        h_v = v.lambda_ - t.lambda_
        k, c = _kernel(form, v, h_v)
        slope = (_output(form, u) - m_t) * (h_v / (u.lambda_ - t.lambda_))  # m'h_v
        phi = math.expm1(k) / 2 if len(within) == 1 else math.expm1(k) / k - 1
        x_v = _ddim(t, v, ANCHOR, H1) - c * phi * slope
        kept = {} if v is s else {ANCHOR: SOURCES[ANCHOR], H1: SOURCES[H1]}
        rows.append(combined_row(u.t, u.alpha_bar, {X: x_v, **kept}))
    return rows


def _kernel(form: Form, s: Level, h: float) -> tuple[float, float]:
    """(k, c) of a step by h to s; see the top of the file."""
    return (h, s.sigma) if form == "eps" else (-h, s.alpha)


def _ddim(t: Level, s: Level, x: int = X, x_0: int = X_0) -> Tensor:
    """The step of order 1, of either form; finite where h is not."""
    ratio = s.sigma / t.sigma
    return ratio * SOURCES[x] + (s.alpha - ratio * t.alpha) * SOURCES[x_0]


def _sde_step(t: Level, s: Level, h: float) -> Tensor:
    """Of order 1 for the reverse SDE: x_t decays by another e^{-h}, and noise makes up for it."""
    removed = -math.expm1(-2 * h)
    x_s = s.sigma / t.sigma * math.exp(-h) * SOURCES[X] + s.alpha * removed * SOURCES[X_0]
    return x_s + s.sigma * math.sqrt(removed) * SOURCES[Z]


def _output(form: Form, t: Level, x: int = X, x_0: int = X_0) -> Tensor:
    """m at t: x̂_0 itself, or ε̂ = (x_t - α x̂_0)/σ."""
    return SOURCES[x_0] if form == "x_0" else (SOURCES[x] - t.alpha * SOURCES[x_0]) / t.sigma


def _levels(times: Tensor, alpha_bar: Tensor) -> list[Level]:
    alpha, sigma = alpha_bar.sqrt().tolist(), (1 - alpha_bar).sqrt().tolist()
    half_log_snr = (alpha_bar.logit() / 2).tolist()
    return list(map(Level, times, alpha_bar, alpha, sigma, half_log_snr))
