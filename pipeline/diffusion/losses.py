"""Training objectives."""

from torch import Tensor


def simple_loss(eps: Tensor, eps_hat: Tensor) -> Tensor:
    """L_simple = ‖ε - ε_θ(x_t, t)‖², averaged over the elements of each image: (B,) float32.

    Ho et al. 2020, Eq. 14.
    """
    return (eps.float() - eps_hat.float()).square().flatten(1).mean(1)
