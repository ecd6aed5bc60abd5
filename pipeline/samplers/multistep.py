"""What multistep solvers share: a row written as linear combinations, and exponential quadrature.

Such a solver reads most easily as its paper writes it, x_s = ... x_t + ... ε_t + ... ε_{t+1}, where
each symbol is a linear combination of what a row of a plan draws on: a vector (NUM_SOURCES,).
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pipeline.samplers.plan import NUM_SOURCES, X_0, X, make_row

SOURCES = torch.eye(NUM_SOURCES, dtype=torch.float64)
"""SOURCES[X] is the image in slot X, SOURCES[X_0] the x̂_0 of the row, and so on."""


def eps_of(alpha_bar: Tensor) -> Tensor:
    """ε = (x_t - √ᾱ x̂_0)/√(1-ᾱ) of a row at ᾱ, as a combination: (NUM_SOURCES,)."""
    return (SOURCES[X] - alpha_bar.sqrt() * SOURCES[X_0]) * (1 - alpha_bar).rsqrt()


def combined_row(t: Tensor, alpha_bar: Tensor, slots: Mapping[int, Tensor]) -> Tensor:
    """The row of a plan that fills each slot with its combination of the sources."""
    update = {
        (slot, source): coefficient
        for slot, combination in slots.items()
        for source, coefficient in enumerate(combination.tolist())
        if coefficient != 0
    }
    return make_row(float(t), float(alpha_bar), update)


def exponential_weights(h: float, nodes: Sequence[float]) -> list[float]:
    """w with  ∫_0^1 e^{-hu} f(u) du = Σ_k w_k f(u_k)  for every polynomial f of degree < n.

    That is the integral of f's Lagrange interpolant through the n nodes, in closed form (Hochbruck
    & Ostermann 2010, "Exponential integrators", section 2.5). h is finite and positive.
    """
    moments = [_moment(h, n) for n in range(len(nodes))]
    powers = [[u**n for u in nodes] for n in range(len(nodes))]
    right = torch.tensor(moments, dtype=torch.float64)
    weights: list[float] = torch.linalg.solve(
        torch.tensor(powers, dtype=torch.float64), right
    ).tolist()
    return weights


def _moment(h: float, n: int) -> float:
    """∫_0^1 e^{-hu} u^n du, by parts, or by its series where that would cancel."""
    if h < 1:
        return sum((-h) ** k / math.factorial(k) / (n + k + 1) for k in range(20))
    if n == 0:
        return -math.expm1(-h) / h
    return (n * _moment(h, n - 1) - math.exp(-h)) / h
