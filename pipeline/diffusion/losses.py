"""Training objectives."""

from torch import Tensor


def simple_loss(target: Tensor, output: Tensor) -> Tensor:
    """‖target - output‖², averaged over the elements of each image: (B,) float32.

    With ε for a target it is L_simple, Ho et al. 2020, Eq. 14.
    """
    return (target.float() - output.float()).square().flatten(1).mean(1)
