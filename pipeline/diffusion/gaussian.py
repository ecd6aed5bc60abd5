"""Gaussian diffusion: q (forward), p (reverse), and the ε-parameterisation, as functions of ᾱ.

    q(x_t | x_0)          = N(√ᾱ_t x_0, (1-ᾱ_t) I)                       Ho et al. 2020, Eq. 4
    q(x_s | x_t, x_0)     = N(μ̃, β̃ I), s < t                             Eq. 6-7
    x̂_0                   = (x_t - √(1-ᾱ_t) ε) / √ᾱ_t                    Eq. 15
    μ_θ                   = (x_t - β_t/√(1-ᾱ_t) ε) / √α_t                 Eq. 11

The step from t to s need not be t-1: with α_{t|s} = ᾱ_t/ᾱ_s in place of α_t the equations hold for
any pair, and for s = t-1 they are the paper's.

Coefficients (ᾱ_t, ...) are float64 tensors, of shape () or (B,) for a batch; square roots are taken
in float64 and cast to x's type last. In bfloat16, `1 - ᾱ_t` would be exactly 0 for the first ten
timesteps of the linear schedule.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.device import is_apart


def like(c: Tensor, x: Tensor) -> Tensor:
    """The float64 coefficient `c`, () or (B,), shaped, cast and placed to multiply x (B, ...).

    A device is not waited for, unless the coefficient comes from there.
    """
    assert c.dtype == torch.float64
    shaped = c.reshape(c.shape + (1,) * (x.ndim - c.ndim))
    return shaped.to(x.device, x.dtype, non_blocking=is_apart(x.device))


def one_by_one(f: Callable[[Tensor], Tensor], c: Tensor) -> Tensor:
    """f of a few coefficients (B,), as though each were alone.

    torch takes eight numbers or so at a time and what is left over by another exp or log, whose
    last bit may differ. A multiple of 16 leaves nothing over.
    """
    padding = -len(c) % 16
    return f(torch.cat([c, c[-1:].expand(padding)]))[: len(c)]


def q_sample(x_0: Tensor, eps: Tensor, alpha_bar_t: Tensor) -> Tensor:
    """x_t ~ q(x_t | x_0) for the noise eps ~ N(0, I); Ho et al. 2020, Eq. 4."""
    return like(alpha_bar_t.sqrt(), x_0) * x_0 + like((1 - alpha_bar_t).sqrt(), x_0) * eps


def predict_x_0(x_t: Tensor, eps: Tensor, alpha_bar_t: Tensor) -> Tensor:
    """x̂_0, the clean image that x_t and the noise eps imply; Ho et al. 2020, Eq. 15."""
    return (x_t - like((1 - alpha_bar_t).sqrt(), x_t) * eps) * like(alpha_bar_t.rsqrt(), x_t)


def predict_eps(x_t: Tensor, x_0: Tensor, alpha_bar_t: Tensor) -> Tensor:
    """The noise that x_t and x_0 imply; the inverse of `predict_x_0`."""
    return (x_t - like(alpha_bar_t.sqrt(), x_t) * x_0) * like((1 - alpha_bar_t).rsqrt(), x_t)


def posterior_coefficients(
    alpha_bar_t: Tensor, alpha_bar_s: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(c_x_0, c_x_t, β̃) of q(x_s | x_t, x_0) = N(c_x_0 x_0 + c_x_t x_t, β̃ I), s < t.

    Ho et al. 2020, Eq. 7, with α = ᾱ_t/ᾱ_s. At s = -1 (ᾱ_s = 1) it is the point x_0: (1, 0, 0).
    """
    alpha = alpha_bar_t / alpha_bar_s
    beta = 1 - alpha
    c_x_0 = alpha_bar_s.sqrt() * beta / (1 - alpha_bar_t)
    c_x_t = alpha.sqrt() * (1 - alpha_bar_s) / (1 - alpha_bar_t)
    return c_x_0, c_x_t, beta * (1 - alpha_bar_s) / (1 - alpha_bar_t)


def q_posterior(
    x_0: Tensor, x_t: Tensor, alpha_bar_t: Tensor, alpha_bar_s: Tensor
) -> tuple[Tensor, Tensor]:
    """Mean (B, ...) and variance (() or (B,), float64) of q(x_s | x_t, x_0)."""
    c_x_0, c_x_t, variance = posterior_coefficients(alpha_bar_t, alpha_bar_s)
    return like(c_x_0, x_0) * x_0 + like(c_x_t, x_t) * x_t, variance


def p_mean(x_t: Tensor, eps: Tensor, alpha_t: Tensor, alpha_bar_t: Tensor) -> Tensor:
    """μ_θ(x_t, t) from the predicted noise; Ho et al. 2020, Eq. 11. β_t = 1 - α_t."""
    c_eps = (1 - alpha_t) * (1 - alpha_bar_t).rsqrt()
    return (x_t - like(c_eps, x_t) * eps) * like(alpha_t.rsqrt(), x_t)
