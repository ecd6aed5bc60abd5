"""A sampler is a table.

Every solver compiles, for a schedule and a number of steps, to a plan: a float64 table with one row
per network evaluation. The state of an image is five images, its slots:

    X        x_t, what the network is evaluated at
    ANCHOR   an x_t kept from an earlier row (Heun, single-step and predictor-corrector solvers)
    H1 H2 H3 outputs kept from earlier rows, as x̂_0 or as ε (multistep solvers)

A row evaluates the network at X, at the timestep T and the noise level ALPHA_BAR, turns its output
into x̂_0, thresholds that, and then maps the state linearly,

    (X, ANCHOR, H1, H2, H3)  ←  MATRIX · (X, ANCHOR, H1, H2, H3, x̂_0, z),    z ~ N(0, I)

Since ε is linear in x_t and x̂_0, that covers every solver of the field with fixed steps, and a
thresholded x̂_0 brings its own consistent ε along. x_t is in the variance-preserving frame, where
x_T ~ N(0, I), whatever the process (see pipeline/diffusion/sde.py).

`advance` is the only executor: `ddpm sample`, evaluation and serving all reach it through the
engine, and each row of a batch may follow its own plan at its own position. `run_plan` is the plain
loop around it, for one plan and a whole batch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.device import send
from pipeline.diffusion.gaussian import like
from pipeline.samplers.config import SamplingConfig

X, ANCHOR, H1, H2, H3 = SLOTS = range(5)
X_0, Z = 5, 6
"""The slots of the state, and what else a row draws on: x̂_0 and fresh noise."""
NUM_SOURCES = 7

T, ALPHA_BAR, GUIDANCE, RESCALE, CLIP, QUANTILE, LOG_RANGE = range(7)
"""Columns of a plan before the matrix.

GUIDANCE: w, 0 for none. RESCALE: φ of guidance rescale. CLIP: the bound on |x̂_0|, inf for none.
QUANTILE: of |x̂_0|, for dynamic thresholding; 0 for none. LOG_RANGE: log β/β̃, by which a learned
variance may exceed the β̃ of the matrix; 0 if the variance is not learned.
"""
MATRIX = slice(7, 7 + len(SLOTS) * NUM_SOURCES)
NUM_COLUMNS = MATRIX.stop


@dataclass(frozen=True)
class Plan:
    """One solver for one schedule: (network evaluations, NUM_COLUMNS) float64."""

    table: Tensor

    def __len__(self) -> int:
        return len(self.table)

    def __getitem__(self, entry: tuple[int, int]) -> Tensor:
        """The matrix entry (slot, source) of every row: (network evaluations,)."""
        slot, source = entry
        return self.table[:, MATRIX.start + slot * NUM_SOURCES + source]


Update = Mapping[tuple[int, int], float]
"""The entries of a row's matrix that are not 0: {(slot, source): coefficient}."""


def make_row(t: float, alpha_bar: float, update: Update) -> Tensor:
    """One row of a plan, without guidance and thresholds: (NUM_COLUMNS,) float64."""
    row = torch.zeros(NUM_COLUMNS, dtype=torch.float64)
    row[T], row[ALPHA_BAR], row[CLIP] = t, alpha_bar, torch.inf
    for (slot, source), coefficient in update.items():
        row[MATRIX.start + slot * NUM_SOURCES + source] = coefficient
    return row


def with_settings(plan: Plan, config: SamplingConfig) -> Plan:
    """The plan with the columns that are the same for every solver: guidance and thresholds."""
    table = plan.table.clone()
    table[:, GUIDANCE] = config.guidance
    if config.guidance_interval is not None:  # Kynkäänniemi et al. 2024
        low, high = config.guidance_interval
        sigma = ((1 - table[:, ALPHA_BAR]) / table[:, ALPHA_BAR]).sqrt()
        table[(sigma < low) | (sigma > high), GUIDANCE] = 0
    table[:, RESCALE] = config.guidance_rescale
    table[:, CLIP] = 1.0 if config.clip_x_0 else torch.inf
    table[:, QUANTILE] = config.threshold_quantile or 0.0
    return Plan(table)


def start(x_T: Tensor) -> Tensor:
    """The state before the first row: (B, 5, ...) from x_T (B, ...)."""
    state = torch.zeros(len(x_T), len(SLOTS), *x_T.shape[1:], dtype=x_T.dtype, device=x_T.device)
    state[:, X] = x_T
    return state


def needs_noise(rows: Tensor) -> Tensor:
    """Which of the rows (..., NUM_COLUMNS) draw on fresh noise: (...) bool."""
    return (rows[..., MATRIX][..., Z::NUM_SOURCES] != 0).any(-1)


def threshold(x_0: Tensor, rows: Tensor, known: Tensor | None = None) -> Tensor:
    """x̂_0 within its bound: clipped, or dynamically thresholded (Saharia et al. 2022, 2.3).

    Args:
        known: the rows on the CPU, where `rows` are on a device that is not to be waited for.
    """
    bound = like(rows[:, CLIP], x_0)
    quantiles = (rows if known is None else known)[:, QUANTILE].tolist()
    if any(quantiles):
        one = torch.ones((), dtype=x_0.dtype, device=x_0.device)
        scales = [
            torch.quantile(x_0_i.float().abs().flatten(), q).clamp(min=1.0).to(x_0.dtype)
            if q
            else one
            for x_0_i, q in zip(x_0, quantiles, strict=True)
        ]
        scale = torch.stack(scales).reshape(-1, *[1] * (x_0.ndim - 1))
        bound = bound * scale
        return x_0.clamp(-bound, bound) / scale
    return x_0.clamp(-bound, bound)


def scaled_noise(z: Tensor, fraction: Tensor | None, rows: Tensor) -> Tensor:
    """z (B, ...) with the standard deviation that a learned variance has above the plan's β̃.

    fraction: (B, ...) between log β̃ (0) and log β (1), None if the variance is not learned.
    """
    if fraction is None:
        return z
    log_std = like(rows[:, LOG_RANGE], z) * fraction / 2
    # image by image: what torch's vectors leave over at the end of a batch rounds differently
    return z * torch.stack([image.exp() for image in log_std])


def advance(
    state: Tensor, x_0: Tensor, z: Tensor, rows: Tensor, known: Tensor | None = None
) -> Tensor:
    """One row of a plan for each row of a batch: the next state.

    state: (B, 5, C, H, W); x_0, z: (B, C, H, W); rows: (B, NUM_COLUMNS) float64, a plan's row for
    each image. The sum is taken term by term in one order, and a term of another image
    adds 0 to this one: the result does not depend on the company.

    Args:
        known: the rows on the CPU, where `rows` are on a device that is not to be waited for.
    """
    matrices = send(rows[:, MATRIX], x_0.device).to(x_0.dtype)
    sources = [*state.unbind(1), x_0, z]
    following = torch.zeros_like(state)
    used = (rows if known is None else known)[:, MATRIX].any(0).nonzero().flatten().tolist()
    for entry in used:
        slot, source = divmod(entry, NUM_SOURCES)
        coefficient = matrices[:, entry].reshape(-1, *[1] * (x_0.ndim - 1))
        following[:, slot] += coefficient * sources[source]
    return following


def run_plan(
    plan: Plan,
    predict_x_0: Callable[[Tensor, Tensor, Tensor], Tensor],
    x_T: Tensor,
    noise: Callable[[int], Tensor],
) -> Tensor:
    """Follow one plan with a whole batch, from x_T (B, ...) to the clean images.

    Args:
        predict_x_0: (x_t, t, ᾱ_t) -> x̂_0, with t and ᾱ_t (B,) float64.
        noise: i -> z for the plan's row i, asked for only where the row adds noise.
    """
    state = start(x_T)
    for i, row in enumerate(plan.table):
        rows = row.expand(len(x_T), -1)
        z = noise(i) if needs_noise(row) else torch.zeros_like(x_T)
        x_0 = threshold(predict_x_0(state[:, X], rows[:, T], rows[:, ALPHA_BAR]), rows)
        state = advance(state, x_0, z, rows)
    return state[:, X]
