"""Kernel distance between two sets of images: the squared maximum mean discrepancy of features.

    MMD² = E k(x, x') + E k(y, y') - 2 E k(x, y),    k(x, y) = (xᵀy / D + 1)³

Bińkowski et al. 2018, "Demystifying MMD GANs", section 4, who call it the KID when the features are
those of Inception. The estimate leaves out each image's product with itself and so is unbiased:
unlike the Fréchet distance it may be compared between sets of different size, and it is below zero
now and then when both sets are of one law. They average it over random subsets, which changes its
noise and not its mean; here all pairs count.
"""

import math

import torch
from torch import Tensor

from pipeline.errors import DataError
from pipeline.evaluation.estimate import Estimate

ROWS = 1024
"""Of the matrix of products, that are held at once."""
LEAST_FOR_ERROR = 5
"""Samples: of fewer, the spread that each brings cannot be told from that of pairs."""


def kernel_distance(x: Tensor, y: Tensor) -> Estimate:
    """The unbiased MMD² of features (N, D) of samples and (M, D) of the reference, in float64.

    The error is that of a U-statistic over the draw of x (Hoeffding 1948, eq. 5.13), with both
    terms: where the two laws are one, the first vanishes. What is estimated of it is not let below
    zero, so there the error is stated somewhat too large.

    Raises:
        DataError: there are fewer than two images in a set.
    """
    n, m = len(x), len(y)
    if min(n, m) < 2:
        raise DataError(
            f"a kernel distance needs two images a set, here are {n} and {m}: draw more"
        )
    x, y = x.double(), y.double()
    to_y = _row_sums(x, y) / m  # (N,)
    # h(x, x') = k(x, x') - E_y k(x, y) - E_y k(x', y), whose mean over pairs is MMD² - E k(y, y')
    rows, squares = [], 0.0
    for start in range(0, n, ROWS):
        block = slice(start, min(start + ROWS, n))
        h = _kernel(x[block], x) - to_y[block, None] - to_y
        h[torch.arange(len(h)), torch.arange(block.start, block.stop)] = 0.0
        rows.append(h.sum(1))
        squares += float(h.square().sum())
    of_row = torch.cat(rows) / (n - 1)
    mean = float(of_row.mean())
    within_y = (_row_sums(y, y).sum() - _kernel_diagonal(y).sum()) / (m * (m - 1))
    if n < LEAST_FOR_ERROR:
        return Estimate(mean + float(within_y), math.nan)
    of_pairs = squares / (n * (n - 1)) - mean**2
    # a row's mean spreads by what its image does, and by the others it met
    own_part = ((n - 2) / (n - 1)) ** 2 - 2 / (n - 1)
    of_images = max(0.0, (float(of_row.var()) - of_pairs / (n - 1)) / own_part)
    variance = (4 * (n - 2) * of_images + 2 * of_pairs) / (n * (n - 1))
    return Estimate(mean + float(within_y), math.sqrt(variance))


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _kernel_diagonal(x: Tensor) -> Tensor:
    diagonal: Tensor = (x.square().sum(1) / x.shape[1] + 1) ** 3
    return diagonal


def _row_sums(x: Tensor, y: Tensor) -> Tensor:
    """Σ_j k(x_i, y_j): (N,)."""
    return torch.cat([_kernel(part, y).sum(1) for part in torch.split(x, ROWS)])
