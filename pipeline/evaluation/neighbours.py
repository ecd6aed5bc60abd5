"""Where samples lie among real images: precision and recall, density and coverage, nearest ones.

Around each image of a set lies a ball that reaches to its k-th nearest neighbour in the same set;
the balls together stand for where images of that law are.

    precision  share of the samples in some ball of a real image
    recall     share of the real images in some ball of a sample
    density    in how many balls of real images a sample lies, over k: not moved by an outlier
    coverage   share of the real images with a sample in their ball

Kynkäänniemi et al. 2019, "Improved precision and recall metric", eq. 1 and 2, with k=3; Naeem et
al. 2020, "Reliable fidelity and diversity metrics", eq. 4 and 5, with k=5. All depend on the number
of images, by custom the same of both sets. Distances are Euclidean, of features, in float64.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from pipeline.errors import DataError
from pipeline.evaluation.estimate import Estimate, mean_of, share_of

K_PRECISION, K_DENSITY = 3, 5
ROWS = 512
"""Of the matrix of distances, that are held at once."""
RARE, LEAST_HELD_OUT = 0.01, 200
"""A nearness to the training images that is rare among held-out ones, and how many tell it."""


class Neighbourhood(NamedTuple):
    """Of samples among real images; the error of each is that of a mean over its images."""

    precision: Estimate
    recall: Estimate
    density: Estimate
    coverage: Estimate


def neighbourhood(
    real: Tensor, samples: Tensor, k_precision: int = K_PRECISION, k_density: int = K_DENSITY
) -> Neighbourhood:
    """The four figures of features (N, D) of real images and (M, D) of samples.

    Raises:
        DataError: a set has no more than k images.
    """
    least = max(k_precision, k_density) + 1
    if min(len(real), len(samples)) < least:
        raise DataError(
            f"precision, recall, density and coverage need at least {least} images a set, here "
            f"are {len(real)} real ones and {len(samples)} samples: draw more"
        )
    real, samples = real.double(), samples.double()
    of_real = radii(real, max(k_precision, k_density))
    of_samples = radii(samples, k_precision)[:, k_precision - 1]
    inside, recalled, dense, covered = [], [], [], []
    for part in torch.split(samples, ROWS):
        apart = squared_distances(part, real)
        inside.append((apart <= of_real[:, k_precision - 1]).any(1))
        dense.append((apart <= of_real[:, k_density - 1]).double().sum(1) / k_density)
    for part, radius in zip(
        torch.split(real, ROWS), torch.split(of_real[:, k_density - 1], ROWS), strict=True
    ):
        apart = squared_distances(part, samples)
        recalled.append((apart <= of_samples).any(1))
        covered.append((apart <= radius[:, None]).any(1))
    return Neighbourhood(
        precision=share_of(torch.cat(inside)),
        recall=share_of(torch.cat(recalled)),
        density=mean_of(torch.cat(dense)),
        coverage=share_of(torch.cat(covered)),
    )


def radii(x: Tensor, k: int) -> Tensor:
    """The squared distances of each of (N, D) to its k nearest among the others, rising: (N, k)."""
    found = []
    for start in range(0, len(x), ROWS):
        apart = squared_distances(x[start : start + ROWS], x)
        rows = torch.arange(len(apart))
        apart[rows, start + rows] = torch.inf
        found.append(apart.topk(k, largest=False).values)
    return torch.cat(found)


def nearest(x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Of each of x (N, D) the squared distance to the nearest of y (M, D), and its row: (N,).

    The nearest is found by |y|² - 2 xᵀy, which is fast; its distance is that of the difference.
    """
    x, y = x.double(), y.double()
    squares = y.square().sum(1)
    found = [(squares - 2 * part @ y.T).argmin(1) for part in torch.split(x, ROWS)]
    rows = torch.cat(found)
    return (x - y[rows]).square().sum(1), rows


def squared_distances(x: Tensor, y: Tensor) -> Tensor:
    """(N, M) float64, of (N, D) and (M, D).

    From differences, not from |x|² + |y|² - 2 xᵀy: an image and its copy are 0 apart.
    """
    return torch.cdist(x.double(), y.double(), compute_mode="donot_use_mm_for_euclid_dist").square()


def memorised(samples: Tensor, held_out: Tensor) -> Estimate:
    """The share of samples that lie nearer to a training image than nearly all held-out images do.

    Nearly all are 99 %: a model that draws new images has 0.01, one that copies has more.

    Args:
        samples: (N,) distances of the samples, each to the training image that is nearest to it.
        held_out: (M,) the same of images that were held out.

    Raises:
        DataError: there are too few held-out images to know their hundredth part.
    """
    if len(held_out) < LEAST_HELD_OUT:
        raise DataError(
            f"memorisation is told from at least {LEAST_HELD_OUT} held-out images, here are "
            f"{len(held_out)}: hold out more with data.holdout"
        )
    limit = held_out.double().quantile(RARE)
    return share_of(samples.double() < limit)
