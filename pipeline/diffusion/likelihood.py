"""Likelihood by the probability-flow ODE.

Song et al. 2021, "Score-based generative modeling through SDEs", sections 4.3 and D.2.

Along dx/dλ = f(x, λ) (see pipeline/diffusion/ode.py) the log-density changes by the divergence,
d log p/dλ = -∇·f, so that

    log p_data(x) = log N(x(λ_noise); 0, I) + ∫ ∇·f dλ,     λ from λ_data down to λ_noise,
    ∇·f = ½ (√ᾱ tr ∂x̂_0/∂x - ᾱ D)

p_data is the law that the model has at λ_data, the first noise level: that of the data with that
little noise. λ_noise is the last level, where the law is taken for N(0, I).

The trace is exact, by D vector-Jacobian products an evaluation, or Hutchinson's estimate vᵀJv with
v of independent signs, by one: unbiased, and exact where J is diagonal.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.diffusion.gaussian import like, one_by_one
from pipeline.diffusion.ode import Solution, flow, integrate
from pipeline.seeding import normal

LEVELS = 127.5
"""x = k/127.5 - 1 of a pixel k in 0 .. 255: neighbouring levels are 1/127.5 apart."""

PredictX0 = Callable[[Tensor, Tensor], Tensor]
"""(x_t (B, ...), log-SNR (B,)) -> x̂_0 (B, ...), differentiable, row i from row i alone."""


def log_density(
    predict_x_0: PredictX0,
    x: Tensor,
    log_snr_data: float,
    log_snr_noise: float,
    signs: Tensor | None,
    rtol: float,
    atol: float,
) -> Solution:
    """log p_data of each x (B, ...), float64, in nats, and its network evaluations: (B,) each.

    The tolerances hold for x and the integral of the divergence together.

    Args:
        signs: of Hutchinson's estimate, ±1 (B, ...), the same along the whole way; None: exact.

    Raises:
        UserError: the tolerances cannot be met, see `integrate`.
    """
    shape, D = x.shape, x[0].numel()

    def slope(joint: Tensor, log_snr: Tensor) -> Tensor:  # (B, D+1): x and the integral so far
        with torch.enable_grad():
            x_t = joint[:, :D].reshape(shape).requires_grad_()
            x_0 = predict_x_0(x_t, log_snr)
            trace = exact_trace(x_0, x_t) if signs is None else hutchinson_trace(x_0, x_t, signs)
        alpha_bar = like(one_by_one(torch.sigmoid, log_snr), trace)
        divergence = (alpha_bar.sqrt() * trace - alpha_bar * D) / 2
        velocity = flow(x_t.detach(), x_0.detach(), log_snr).flatten(1)
        return torch.cat([velocity, divergence[:, None]], dim=1)

    joint = torch.cat([x.flatten(1), x.new_zeros(len(x), 1)], dim=1)
    joint, evaluations = integrate(slope, joint, log_snr_data, log_snr_noise, rtol, atol)
    x_T, change = joint[:, :D], joint[:, D]
    prior = -(x_T.square().sum(1) + D * math.log(2 * math.pi)) / 2
    return Solution(prior + change, evaluations)


def exact_trace(y: Tensor, x: Tensor) -> Tensor:
    """tr ∂y_i/∂x_i of each row of y (B, ...), a function of x (B, ...) row by row: (B,) float64."""
    flat = y.flatten(1)
    trace = torch.zeros(len(x), dtype=torch.float64, device=x.device)
    for d in range(flat.shape[1]):
        (row,) = torch.autograd.grad(flat[:, d].sum(), x, retain_graph=True)
        trace += row.flatten(1)[:, d].double()
    return trace


def hutchinson_trace(y: Tensor, x: Tensor, v: Tensor) -> Tensor:
    """vᵀJv for the Jacobian J of each row; arguments (B, ...), result (B,) float64."""
    (product,) = torch.autograd.grad(y, x, v.to(y))
    return (product.double() * v.to(product)).flatten(1).sum(1)


def draw_signs(keys: list[int], shape: tuple[int, ...]) -> Tensor:
    """Independent ±1, row i from keys[i] alone: (len(keys), *shape) float64."""
    return 1.0 - 2.0 * (normal(keys, shape) < 0).double()


def dequantised(x_0: Tensor, keys: list[int]) -> Tensor:
    """Pixels of whole grey levels, each spread evenly over its bin [x-1/255, x+1/255].

    x_0: (B, ...) in [-1, 1] on the levels k/127.5 - 1; row i's noise is from keys[i] alone. Returns
    float64. The bins are those of the decoder of Ho et al. 2020, Eq. 13: both likelihoods are of
    the same discrete variable.
    """
    u: Tensor = torch.special.ndtr(normal(keys, tuple(x_0.shape[1:]), torch.float64))
    return x_0.double() + (u - 0.5) / LEVELS


def bits_per_dim(
    predict_x_0: PredictX0,
    x: Tensor,
    log_snr_data: float,
    log_snr_noise: float,
    signs: Tensor | None,
    rtol: float,
    atol: float,
) -> Solution:
    """-log2 p of dequantised pixels x (B, ...), by dimension, and network evaluations: (B,) each.

    The mean over the dequantisation bounds the bits of the 8-bit pixels themselves from above
    (Theis et al. 2016, section 3.1). p_data is the law of √ᾱ x_0 + σ ε; seen as a law of x_0 its
    density is √ᾱ^D p_data(√ᾱ x), and that of a pixel on the scale 0 .. 256 is 127.5^D times less:

        bits = -(log2 p_data(√ᾱ x))/D - ½ log2 ᾱ + log2 127.5
    """
    alpha_bar = torch.tensor(log_snr_data, dtype=torch.float64).sigmoid()
    log_p, evaluations = log_density(
        predict_x_0, like(alpha_bar.sqrt(), x) * x, log_snr_data, log_snr_noise, signs, rtol, atol
    )
    nats = -log_p / x[0].numel() - float(alpha_bar.log()) / 2 + math.log(LEVELS)
    return Solution(nats / math.log(2), evaluations)
