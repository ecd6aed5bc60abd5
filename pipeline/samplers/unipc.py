"""Unified predictor-corrector, Zhao et al. 2023."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from pipeline.diffusion.schedules import Schedule
from pipeline.samplers.multistep import SOURCES, combined_row, exponential_weights
from pipeline.samplers.plan import ANCHOR, H1, H2, H3, X_0, Plan, X


def unipc(schedule: Schedule, times: Tensor, order: int) -> Plan:
    """UniP-p predicts x_s, the next row evaluates there, and UniC-p corrects x_s with that.

    Zhao et al. 2023, Algorithms 1 and 2 for x̂_0, with B(h) = e^h - 1 ("bh2"), p = order. Both
    are quadratures of  x_s = σ_s/σ_t x_t + α_s ∫_0^1 h e^{-h(1-r)} x̂_0(r) dr,  where r runs from t
    to s evenly in λ = log α/σ and h = λ_s - λ_t: UniP through the x̂_0 of t and the p-1 levels
    before it, UniC through that of s (as predicted) as well. ANCHOR holds the corrected x_t. The
    evaluation at the predicted x_s serves the corrector, the next predictor and the history: it is
    the only one of a step.

    p rises with the history, and falls to 1 towards the clean image, where λ is infinite. The
    accuracy is of order p+1.

    times: (N+1,) float64, falling; the last one may be -1, the clean image.
    order: 1, 2 or 3.
    """
    alpha_bar = schedule.alpha_bar_at(times)
    alpha, sigma = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    half_log_snr = (alpha_bar.logit() / 2).tolist()
    first = int(alpha_bar[0] == 0)  # the first level with a finite λ
    steps = len(times) - 1

    def integrate(i: int, x: Tensor, x_0: Sequence[int], corrector: bool) -> Tensor:
        """x at level i+1 from x at level i; x_0: the sources of x̂_0 at i, i-1, ..."""
        p = max(1, min(order, i + 1 - first))
        if times[-1] < 0:
            p = min(p, steps - i)
        h = half_log_snr[i + 1] - half_log_snr[i]
        nodes = [(half_log_snr[i - k] - half_log_snr[i]) / h for k in range(p)]
        sources = list(x_0[:p])
        if corrector:
            nodes.append(1.0)
            sources.append(X_0)
        weights = torch.tensor(_weights(h, nodes), dtype=torch.float64)
        return sigma[i + 1] / sigma[i] * x + alpha[i + 1] * weights @ SOURCES[sources]

    rows = []
    for i in range(steps):
        x = SOURCES[X]
        if i > 0:
            x = integrate(i - 1, SOURCES[ANCHOR], (H1, H2, H3), corrector=True)
        slots = {
            X: integrate(i, x, (X_0, H1, H2), corrector=False),
            ANCHOR: x,
            H1: SOURCES[X_0],
            H2: SOURCES[H1],
            H3: SOURCES[H2],
        }
        rows.append(combined_row(times[i], alpha_bar[i], slots))
    return Plan(torch.stack(rows))


def _weights(h: float, nodes: Sequence[float]) -> list[float]:
    """Weights of ∫_0^1 h e^{-h(1-r)} f(r) dr at the nodes, the first of which is 0.

    As many conditions fix as many weights, whatever B(h) is. Only of two nodes, where that is as
    accurate, the second has the weight B(h)/2 of the paper.
    """
    total = -math.expm1(-h)
    if len(nodes) == 1:
        return [total]
    if len(nodes) == 2:
        second = total / 2 / nodes[1]
        return [total - second, second]
    return [h * w for w in exponential_weights(h, [1 - r for r in nodes])]
