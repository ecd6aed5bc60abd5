"""Fréchet distance between two sets of images, as Gaussians in the feature space of a network.

    d² = ‖μ_1 - μ_2‖² + tr(Σ_1 + Σ_2 - 2 (Σ_1^½ Σ_2 Σ_1^½)^½)

Dowson & Landau 1982, "The Fréchet distance between multivariate normal distributions"; its use for
generative models is Heusel et al. 2017, section 4, who call d² the FID when the features are those
of Inception. Of other features the figure is named after them, and compares with no published FID.
The estimate is biased upwards, by about 1/n of the smaller set (Chong & Forsyth 2020): compare only
figures of the same n.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import DataError


@dataclass(frozen=True, eq=False)
class Gaussian:
    """N(mean, covariance): (D,) and (D, D), float64."""

    mean: Tensor
    covariance: Tensor


@dataclass(frozen=True, eq=False)
class Moments:
    """What a Gaussian is fitted from, of some of the images: as large for many as for few."""

    n: int
    mean: Tensor
    """(D,) float64"""
    scatter: Tensor
    """(D, D) float64: Σ (f - mean)(f - mean)ᵀ"""


def moments(features: Tensor) -> Moments:
    """Of feature vectors (N, D), computed in float64."""
    features = features.double()
    mean = features.mean(0)
    centred = features - mean
    return Moments(len(features), mean, centred.T @ centred)


def merged(parts: Iterable[Moments]) -> Moments:
    """The moments of all images together (Chan, Golub & LeVeque 1983, eq. 2.1).

    No difference of large numbers is taken, as it is where squares are added up.
    """
    parts = iter(parts)
    first = next(parts)
    n, mean, scatter = first.n, first.mean, first.scatter
    for part in parts:
        shift = part.mean - mean
        total = n + part.n
        scatter = scatter + part.scatter + torch.outer(shift, shift) * (n * part.n / total)
        mean = mean + shift * (part.n / total)
        n = total
    return Moments(n, mean, scatter)


def gaussian(of: Moments) -> Gaussian:
    """The mean and the unbiased covariance.

    Raises:
        DataError: N is below D+1, which leaves the covariance singular whatever the images are.
    """
    dim = len(of.mean)
    if of.n < dim + 1:
        raise DataError(
            f"a Fréchet distance in {dim} feature dimensions needs at least {dim + 1} images a "
            f"set, here are {of.n}: draw more"
        )
    return Gaussian(of.mean, of.scatter / (of.n - 1))


def fit_gaussian(features: Tensor) -> Gaussian:
    """That of feature vectors (N, D); raises as `gaussian` does."""
    return gaussian(moments(features))


def frechet_distance(p: Gaussian, q: Gaussian) -> float:
    """d² of two Gaussians; the square, as is the custom.

    tr (Σ_1^½ Σ_2 Σ_1^½)^½ is the sum of the singular values of Σ_1^½ Σ_2^½. So no root is taken of
    an eigenvalue of the product, where rounding would leave its square root.
    """
    overlap = torch.linalg.svdvals(_root(p.covariance) @ _root(q.covariance)).sum()
    spread = p.covariance.trace() + q.covariance.trace() - 2 * overlap
    return float((p.mean - q.mean).square().sum() + spread)


def frechet_error(features: Tensor, n: int, p: Gaussian, q: Gaussian) -> float:
    """The standard error of d² over the draw of the `n` images that p was fitted to.

    To first order a bootstrap of the images, without fitting again: each image f moves d² by

        (2 (μ_p - μ_q)ᵀ(f - μ_p) + (f - μ_p)ᵀ(I - T)(f - μ_p)) / n  + what is the same for all,

    T = Σ_q^½ (Σ_q^½ Σ_p Σ_q^½)^-½ Σ_q^½ being the map that carries p to q.

    Args:
        features: (N, D) of those images, or of some of them.
    """
    root = _root(q.covariance)
    values, vectors = torch.linalg.eigh(root @ p.covariance @ root)
    smallest = values.max() * len(values) * torch.finfo(values.dtype).eps  # below it is rounding
    inverse = torch.where(values > smallest, values.clamp(min=smallest).rsqrt(), 0.0)
    carry = root @ (vectors * inverse) @ vectors.T @ root
    centred = features.double() - p.mean
    quadratic = (centred * (centred - centred @ carry)).sum(1)
    moved = 2 * centred @ (p.mean - q.mean) + quadratic
    return float(moved.std()) / math.sqrt(n)


def _root(covariance: Tensor) -> Tensor:
    """The symmetric square root of a covariance: (D, D)."""
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T  # below 0 is rounding
    return root
