"""The variational bound on the negative log-likelihood, term by term, in bits per dimension.

    -log p(x_0)  <=  L_T + Σ_{t=1}^{T-1} L_t + L_0                        Ho et al. 2020, Eq. 5

    L_T   KL(q(x_{T-1} | x_0) ‖ N(0, I))                                  no parameters
    L_t   KL(q(x_{t-1} | x_t, x_0) ‖ p_θ(x_{t-1} | x_t))                  t = 1 .. T-1
    L_0   -log p_θ(x_0 | x_t), t = 0, over the 256 values of a pixel      Eq. 13

with timesteps counted from 0 (see `schedules`). p_θ has the mean of q's posterior at x̂_0 and the
variance β̃_t e^r: r = 0 if it is fixed_small, log β/β̃ if fixed_large, and a learned fraction of that
for each pixel if learned_range (Nichol & Dhariwal 2021, Eq. 15).

Images are in [-1, 1], of pixels in 8 bits. A dimension is one value of one channel of one pixel.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.device import send
from pipeline.diffusion.config import Variance
from pipeline.diffusion.gaussian import like, posterior_coefficients, q_sample
from pipeline.diffusion.schedules import Schedule

HALF_BIN = 1 / 255
"""Half the width of one of the 256 values in [-1, 1]."""
ROWS = 64
"""Of a network call, where there are fewer images: a small network keeps a CPU core busy only with
many rows (16 channels on 8x8 pixels: 1.8 times as many a second as in calls of 16)."""


def log_variances(schedule: Schedule, t: Tensor) -> tuple[Tensor, Tensor]:
    """(log β̃_t, log β_t) at integer t (B,): (B,) float64 each.

    β̃_0 is 0; as in Nichol & Dhariwal 2021 it is replaced by β̃_1.
    """
    later = t.clamp(min=1)
    _, _, beta_tilde = posterior_coefficients(
        schedule.alpha_bar_at(later), schedule.alpha_bar_at(later - 1)
    )
    beta = 1 - schedule.alpha_bar_at(t) / schedule.alpha_bar_at(t - 1)
    return beta_tilde.log(), beta.log()


def mean_and_fraction(output: Tensor) -> tuple[Tensor, Tensor]:
    """The two halves (B, C, ...) of a network's output (B, 2C, ...) where the variance is learned.

    The second one is mapped so that -1 .. 1 is a variance from β̃ (0) to β (1).
    """
    mean, fraction = output.chunk(2, dim=1)
    return mean, (fraction + 1) / 2


def bound_term(
    schedule: Schedule,
    variance: Variance,
    t: Tensor,
    x_0: Tensor,
    x_0_hat: Tensor,
    fraction: Tensor | None = None,
) -> Tensor:
    """L_t of each row, in bits per dimension: (B,) in the dtype of x_0.

    x_t has no part in it but by x̂_0: it moves the means of q and p_θ alike.

    Args:
        t: (B,) integers, on the CPU; 0 gives L_0, the decoder.
        x_0, x_0_hat: (B, ...) the image, and what the network makes of x_t.
        fraction: (B, ...) of a learned variance, from log β̃ (0) to log β (1).
    """
    log_beta_tilde, log_beta = log_variances(schedule, t)
    log_range = log_beta - log_beta_tilde
    if variance == "learned_range":
        assert fraction is not None, "a learned variance comes with the network's output"
        r = like(log_range, x_0) * fraction.to(x_0.dtype)
    elif variance == "fixed_large":  # but at t = 0, where β̃_1 is the better decoder
        r = like(torch.where(t == 0, 0.0, log_range), x_0)
    else:
        r = like(torch.zeros_like(log_range), x_0)

    c_x_0, _, _ = posterior_coefficients(schedule.alpha_bar_at(t), schedule.alpha_bar_at(t - 1))
    # the difference of the means, in units of √β̃
    distance = like(c_x_0 * (-log_beta_tilde / 2).exp(), x_0) * (x_0 - x_0_hat)
    kl = (r + torch.expm1(-r) + distance.square() * (-r).exp()) / 2
    term = _bits_per_dim(kl)

    (last,) = (t == 0).nonzero(as_tuple=True)
    if not len(last):
        return term
    last = send(last, x_0.device)
    log_variance = (like(log_beta_tilde, x_0) + r)[last]
    nll = discretised_gaussian_nll(x_0[last], x_0_hat[last], log_variance)
    return term.index_put((last,), _bits_per_dim(nll))


def discretised_gaussian_nll(x_0: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-log of the Gaussian's mass in the bin of each value of x_0, in nats: (B, ...).

    The bins of -1 and 1 are open to their side (Ho et al. 2020, Eq. 13). Both edges are taken to
    the tail below the mean, where log Φ keeps its digits: log Φ(b) + log(1 - Φ(a)/Φ(b)).
    """
    precision = (-log_variance / 2).exp()
    distance = -(x_0 - mean).abs()
    upper = torch.special.log_ndtr((distance + HALF_BIN) * precision)
    lower = torch.special.log_ndtr((distance - HALF_BIN) * precision)
    share = -torch.expm1(lower - upper)
    within = upper + share.clamp(min=torch.finfo(share.dtype).tiny).log()
    lowest = torch.special.log_ndtr((x_0 - mean + HALF_BIN) * precision)
    highest = torch.special.log_ndtr((mean - x_0 + HALF_BIN) * precision)
    edge = 1 - HALF_BIN
    return -torch.where(x_0 < -edge, lowest, torch.where(x_0 > edge, highest, within))


def prior_term(x_0: Tensor, alpha_bar: Tensor) -> Tensor:
    """L_T = KL(q(x_t | x_0) ‖ N(0, I)) at the last ᾱ, () float64, in bits per dimension: (B,)."""
    half_log = like(torch.log1p(-alpha_bar) / 2, x_0)
    return _bits_per_dim(like(alpha_bar, x_0) * (x_0.square() - 1) / 2 - half_log)


def continuous_term(gamma_slope: Tensor, eps: Tensor, eps_hat: Tensor) -> Tensor:
    """½ γ'(u) ‖ε - ε̂‖², γ = -λ: what all L_t are an integral of over u in [0, 1], as T → ∞.

    In bits per dimension, (B,); Kingma et al. 2021, the diffusion loss of continuous time in ε.
    gamma_slope: (B,) float64.
    """
    return _bits_per_dim(like(gamma_slope / 2, eps) * (eps - eps_hat).square())


def reconstruction_term(x_0: Tensor, eps: Tensor, log_snr: Tensor) -> Tensor:
    """L_0 at the first log-SNR of continuous time, () float64, in bits per dimension: (B,).

    The decoder is q(x_t | x_0) read as a distribution of x_0, about x_t/√ᾱ with the variance 1/SNR,
    and there is no network in it (Kingma et al. 2021).
    """
    mean = x_0 + like((-log_snr / 2).exp(), x_0) * eps
    return _bits_per_dim(discretised_gaussian_nll(x_0, mean, like(-log_snr, x_0)))


@dataclass(frozen=True)
class Elbo:
    """The bound of B images, in bits per dimension."""

    prior: Tensor
    """(B,) L_T"""
    terms: Tensor
    """(B, T) L_t, L_0 first; each from one draw of x_t"""

    @property
    def total(self) -> Tensor:
        """(B,): an upper bound on -log₂ p(x_0) per dimension, in expectation over x_t."""
        return self.prior + self.terms.sum(1)

    @property
    def per_timestep(self) -> Tensor:
        """(T,): the mean of each L_t over the images."""
        return self.terms.mean(0)

    @property
    def spread(self) -> Tensor:
        """(): the standard deviation of the total over the images."""
        return self.total.std()


def elbo(
    x_0: Tensor,
    schedule: Schedule,
    variance: Variance,
    predict: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor | None]],
    noise: Callable[[int], Tensor],
) -> Elbo:
    """All terms of the bound for images x_0 (B, ...), some timesteps at a time for all of them.

    Args:
        predict: (x_t, t, ᾱ_t) -> (x̂_0, fraction or None), with t and ᾱ_t (N,) float64, N a multiple
            of B; row i is of image i mod B. Clipping x̂_0 changes the bound: clip where the sampler
            does.
        noise: t -> ε (B, ...), standard normal; addressed, so that the figure can be had again.
    """
    B, T = len(x_0), schedule.timesteps
    terms = []
    for steps in torch.split(torch.arange(T), max(1, ROWS // B)):
        t = steps.double().repeat_interleave(B)
        alpha_bar = schedule.alpha_bar_at(t)
        of_rows = x_0.repeat(len(steps), *[1] * (x_0.ndim - 1))
        eps = torch.cat([noise(int(step)) for step in steps])
        x_0_hat, fraction = predict(q_sample(of_rows, eps, alpha_bar), t, alpha_bar)
        found = bound_term(schedule, variance, t, of_rows, x_0_hat, fraction)
        terms.append(found.double().view(len(steps), B))
    return Elbo(prior_term(x_0, schedule.alpha_bar[-1]).double(), torch.cat(terms).T)


def _bits_per_dim(nats: Tensor) -> Tensor:
    """The mean over the elements of each row, (B, ...) -> (B,)."""
    return nats.flatten(1).mean(1) / math.log(2)
