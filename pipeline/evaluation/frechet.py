"""Fréchet distance between two sets of images, as Gaussians in the feature space of a network.

    d² = ‖μ_1 - μ_2‖² + tr(Σ_1 + Σ_2 - 2 (Σ_1^½ Σ_2 Σ_1^½)^½)

Dowson & Landau 1982, "The Fréchet distance between multivariate normal distributions"; its use for
generative models is Heusel et al. 2017, section 4, who call d² the FID when the features are those
of Inception. Ours are those of the project's own judge, so the figure is named after that, and it
compares with no published FID. The estimate is biased upwards, by about 1/n of the smaller set
(Chong & Forsyth 2020): compare only figures of the same n.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.errors import DataError


@dataclass(frozen=True, eq=False)
class Gaussian:
    """N(mean, covariance): (D,) and (D, D), float64."""

    mean: Tensor
    covariance: Tensor


def fit_gaussian(features: Tensor) -> Gaussian:
    """The mean and the unbiased covariance of feature vectors (N, D), computed in float64.

    Raises:
        DataError: N is below D+1, which leaves the covariance singular whatever the images are.
    """
    n, dim = features.shape
    if n < dim + 1:
        raise DataError(
            f"a Fréchet distance in {dim} feature dimensions needs at least {dim + 1} images a "
            f"set, here are {n}: draw more"
        )
    features = features.double()
    mean = features.mean(0)
    centred = features - mean
    return Gaussian(mean, centred.T @ centred / (n - 1))


def frechet_distance(p: Gaussian, q: Gaussian) -> float:
    """d² of two Gaussians; the square, as is the custom.

    tr (Σ_1^½ Σ_2 Σ_1^½)^½ is the sum of the singular values of Σ_1^½ Σ_2^½. So no root is taken of
    an eigenvalue of the product, where rounding would leave its square root.
    """
    overlap = torch.linalg.svdvals(_root(p.covariance) @ _root(q.covariance)).sum()
    spread = p.covariance.trace() + q.covariance.trace() - 2 * overlap
    return float((p.mean - q.mean).square().sum() + spread)


def _root(covariance: Tensor) -> Tensor:
    """The symmetric square root of a covariance: (D, D)."""
    values, vectors = torch.linalg.eigh(covariance)
    root: Tensor = (vectors * values.clamp(min=0).sqrt()) @ vectors.T  # below 0 is rounding
    return root
