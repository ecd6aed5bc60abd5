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

    def to_json(self) -> dict[str, Any]:
        """The value with its error and the interval that has the true one in 95 % of the cases."""
        known = math.isfinite(self.error)
        half = NORMAL_95 * self.error
        return {
            "value": self.value,
            "standard_error": self.error if known else None,
            "interval": [self.value - half, self.value + half] if known else None,
        }


def mean_of(values: Tensor) -> Estimate:
    """The mean of a figure (N,) of each image."""
    values = values.double()
    n = len(values)
    error = float(values.std()) / math.sqrt(n) if n > 1 else math.nan
    return Estimate(float(values.mean()), error)
