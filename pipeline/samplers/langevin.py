"""Langevin dynamics: predictor-corrector sampling, and annealed Langevin dynamics.

A corrector moves x_t at its noise level, towards the law that the score s says it should have,

    x ← x + ε s(x) + √(2ε) z,    z ~ N(0, I)

`predictor: ancestral`   at each noise level corrector_steps of these, then a step of the ancestral
                         sampler to the next. Song et al. 2021, "Score-based generative modeling
                         through SDEs", Algorithms 2-5, with ε = 2α (r‖z‖/‖s‖)².
`predictor: none`        correctors alone, with ε = 2r²σ². Song & Ermon 2019, Algorithm 1. x is
                         carried to the next level as it is, in the variance-preserving frame.

r is corrector_snr. The norms are of each image, not of a batch: an image is its recipe. α is 1-β_t
of the model's own chain at that level (Algorithm 5), however many levels are visited; Algorithm 4,
for variance-exploding processes, is the same step without it, seen in another scale. With ‖s‖ near
‖z‖/σ both rules agree but for α. A step that long leaves a variance too large by r² or so: the bias
of Langevin dynamics without a rejection step.

x̂_0 of the last level is the image. The score is read off the thresholded x̂_0.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.diffusion.gaussian import like
from pipeline.diffusion.schedules import Schedule
from pipeline.samplers.config import SamplingConfig
from pipeline.samplers.plan import (
    ALPHA_BAR,
    GUIDANCE,
    Plan,
    T,
    X,
    advance,
    needs_noise,
    scaled_noise,
    start,
    threshold,
)
from pipeline.samplers.probability_flow import Predict

Noise = Callable[..., Tensor]
"""noise(what, *counters) -> z (B, ...), a draw of its own for each address."""


def langevin(
    schedule: Schedule,
    plan: Plan,
    predict: Predict,
    x_T: Tensor,
    noise: Noise,
    sampling: SamplingConfig,
) -> Tensor:
    """The images (B, ...) that start from x_T (B, ...).

    The noise of corrector j at row i of the plan has the address ("corrector", i, j), that of the
    predictor ("sample", i+1), as in the engine.

    Args:
        plan: the ancestral one, of the levels to visit.
    """
    x = x_T
    for i, row in enumerate(plan.table):
        rows = row.expand(len(x), -1)
        for j in range(sampling.corrector_steps):
            z = noise("corrector", i, j)
            score = score_of(x, threshold(predict(x, rows)[0], rows), row[ALPHA_BAR])
            x = corrected(x, score, z, step_sizes(schedule, row, score, z, sampling))
        if sampling.predictor == "none":
            continue
        x_0, fraction = predict(x, rows)
        z = noise("sample", i + 1) if needs_noise(row) else torch.zeros_like(x)
        z = scaled_noise(z, fraction, rows)
        x = advance(start(x), threshold(x_0, rows), z, rows)[:, X]
    if sampling.predictor == "none":
        x = threshold(predict(x, rows)[0], rows)
    return x


def score_of(x: Tensor, x_0: Tensor, alpha_bar: Tensor) -> Tensor:
    """∇ log q(x_t) = -ε̂/σ of an x̂_0, (B, ...)."""
    return (like(alpha_bar.sqrt(), x) * x_0 - x) * like(1 / (1 - alpha_bar), x)


def step_sizes(
    schedule: Schedule, row: Tensor, score: Tensor, z: Tensor, sampling: SamplingConfig
) -> Tensor:
    """ε of a corrector for each image: (B,) float64."""
    r = sampling.corrector_snr
    if sampling.predictor == "none":
        return (2 * r**2 * (1 - row[ALPHA_BAR])).expand(len(z))
    alpha = schedule.alpha[int(row[T].round())]
    # image by image: a reduction over a batch may round differently with its size
    ratios = [
        z_i.double().norm() / score_i.double().norm() for z_i, score_i in zip(z, score, strict=True)
    ]
    return 2 * alpha * (r * torch.stack(ratios)) ** 2


def corrected(x: Tensor, score: Tensor, z: Tensor, step: Tensor) -> Tensor:
    """One step of Langevin dynamics, (B, ...); step: (B,) float64."""
    return x + like(step, x) * score + like((2 * step).sqrt(), x) * z


def count_evaluations(plan: Plan, sampling: SamplingConfig) -> int:
    """Network evaluations an image; a guided one counts twice."""
    each = 1 + (plan.table[:, GUIDANCE] != 0).long()
    if sampling.predictor == "none":
        return int(sampling.corrector_steps * each.sum() + each[-1])
    return int((sampling.corrector_steps + 1) * each.sum())
