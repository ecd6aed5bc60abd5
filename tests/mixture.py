"""Data whose E[x_0 | x_t] and probability flow are known: a Gaussian, and a mixture of two."""

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Mixture:
    """x_0 ~ Σ_k weight_k N(mean_k, std_k²), independently for each pixel."""

    weights: tuple[float, ...]
    means: tuple[float, ...]
    stds: tuple[float, ...]

    def x_0(self, x: Tensor, t: Tensor, alpha_bar: Tensor) -> Tensor:
        """E[x_0 | x_t = x] for x (B, ...) in float64 and alpha_bar (B,) or (); t is not needed."""
        weight, mean, std = self._components()
        a = alpha_bar.reshape(alpha_bar.shape + (1,) * (x.ndim + 1 - alpha_bar.ndim))
        variance = a * std**2 + 1 - a
        off = x.unsqueeze(-1) - a.sqrt() * mean
        responsibility = (weight.log() - variance.log() / 2 - off**2 / 2 / variance).softmax(-1)
        return (responsibility * (mean + a.sqrt() * std**2 / variance * off)).sum(-1)

    def flow(self, x_t: Tensor, alpha_bar_t: Tensor, alpha_bar_s: Tensor) -> Tensor:
        """Where the probability flow takes x_t to at ᾱ_s: it keeps each pixel's quantile.

        The shapes broadcast: x_t (4, 1) and alpha_bar_s (N, 1, 1) give (N, 4, 1).
        """
        quantile = self._cdf(x_t, alpha_bar_t)
        low = torch.full(torch.broadcast_shapes(x_t.shape, alpha_bar_s.shape), -30.0).double()
        high = -low
        for _ in range(60):
            middle = (low + high) / 2
            below = self._cdf(middle, alpha_bar_s) < quantile
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        return (low + high) / 2

    def _cdf(self, x: Tensor, alpha_bar: Tensor) -> Tensor:
        weight, mean, std = self._components()
        a = alpha_bar.unsqueeze(-1)
        z = (x.unsqueeze(-1) - a.sqrt() * mean) / (a * std**2 + 1 - a).sqrt()
        return (weight * torch.special.ndtr(z)).sum(-1)

    def _components(self) -> tuple[Tensor, Tensor, Tensor]:
        weights, means, stds = torch.tensor(
            [self.weights, self.means, self.stds], dtype=torch.float64
        )
        return weights, means, stds


GAUSSIAN = Mixture((1.0,), (0.4,), (0.5,))
TWO_MODES = Mixture((0.3, 0.7), (-0.6, 0.5), (0.3, 0.4))
