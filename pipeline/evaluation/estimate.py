"""A figure with its uncertainty: what another draw of as many samples would have changed."""

import math
from typing import Any, NamedTuple

from torch import Tensor

NORMAL_95 = 1.959963984540054
"""Of the standard normal law, 95 % lie within so many deviations of its mean."""


class Estimate(NamedTuple):
    """A figure, and its standard error over the draw of the samples; the reference is given."""

    value: float
    error: float
    """NaN where one image tells nothing of it."""
    interval: tuple[float, float] | None = None
    """That has the true value in 95 % of the cases, where it is not the normal law's."""

    def to_json(self) -> dict[str, Any]:
        """The value, its standard error and its interval; null where these are not known."""
        known = math.isfinite(self.error)
        half = NORMAL_95 * self.error
        interval = self.interval or (self.value - half, self.value + half)
        return {
            "value": self.value,
            "standard_error": self.error if known else None,
            "interval": list(interval) if known else None,
        }


def mean_of(values: Tensor) -> Estimate:
    """The mean of a figure (N,) of each image."""
    values = values.double()
    n = len(values)
    if not n:
        return Estimate(math.nan, math.nan)
    error = float(values.std()) / math.sqrt(n) if n > 1 else math.nan
    return Estimate(float(values.mean()), error)


def share_of(hits: Tensor) -> Estimate:
    """The share of the images (N,) bool of which something is true.

    Its interval is Wilson's (1927), which does not shrink to a point where it is true of all.
    """
    n, p = len(hits), float(hits.double().mean())
    z = NORMAL_95**2 / n
    middle = (p + z / 2) / (1 + z)
    half = math.sqrt(z * (p * (1 - p) + z / 4)) / (1 + z)
    interval = max(0.0, middle - half), min(1.0, middle + half)
    return Estimate(p, math.sqrt(p * (1 - p) / n), interval)
