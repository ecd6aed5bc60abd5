"""Training losses on the network's own output, and how much each noise level counts."""

import math

import torch
from torch import Tensor

from pipeline.diffusion.config import LossWeight, Prediction
from pipeline.diffusion.elbo import log_variances
from pipeline.diffusion.gaussian import posterior_coefficients
from pipeline.diffusion.parameterisation import x_0_coefficients
from pipeline.diffusion.schedules import Schedule

MAX_LOG_SNR = 30.0
"""|λ| beyond this counts as this: the weights have reached their limits, 0·∞ has not."""


def simple_loss(target: Tensor, output: Tensor) -> Tensor:
    """‖target - output‖², averaged over the elements of each image: (B,) float32.

    With ε for a target it is L_simple, Ho et al. 2020, Eq. 14.
    """
    return (target.float() - output.float()).square().flatten(1).mean(1)


def loss_weight(
    name: LossWeight,
    prediction: Prediction,
    schedule: Schedule,
    t: Tensor,
    sigma_data: float = 0.5,
    min_snr_gamma: float = 5.0,
    p2_gamma: float = 1.0,
    p2_k: float = 1.0,
    sigmoid_bias: float = 2.0,
) -> Tensor:
    """What `simple_loss` is multiplied by at t (B,): (B,) float64.

    A weight is a function W of the log-SNR λ on ‖x_0 - x̂_0‖². With x̂_0 = a x_t + b output,
    ‖x_0 - x̂_0‖² = b² ‖target - output‖², so that on the network's own error the weight is W b²,
    whatever the network predicts. SNR = e^λ, and W is

        snr         SNR: the error of ε, unweighted             Ho et al. 2020, Eq. 14
        min_snr     min(SNR, γ)                                 Hang et al. 2023
        p2          SNR / (k + SNR)^γ                           Choi et al. 2022, Eq. 8
        edm         (σ² + σ_data²)/(σ σ_data)², σ² = 1/SNR      Karras et al. 2022, table 1
        sigmoid     SNR · sigmoid(b - λ)                        Kingma & Gao 2023
        likelihood  see `likelihood_weight`

    and uniform is 1 on the network's own error. Kingma & Gao multiply by -dλ/dt as well, here as
    with the others the density of λ is what the schedule and the drawn timesteps make it.
    """
    if name == "uniform":
        return torch.ones(t.shape, dtype=torch.float64)
    log_snr = schedule.alpha_bar_at(t).logit().clamp(-MAX_LOG_SNR, MAX_LOG_SNR)
    snr = log_snr.exp()
    if name == "snr":
        weight = snr
    elif name == "min_snr":
        weight = snr.clamp(max=min_snr_gamma)
    elif name == "p2":
        weight = snr / (p2_k + snr) ** p2_gamma
    elif name == "edm":
        weight = snr + sigma_data**-2
    elif name == "sigmoid":
        weight = snr * (sigmoid_bias - log_snr).sigmoid()
    else:
        weight = likelihood_weight(schedule, t)
    _, b = x_0_coefficients(prediction, log_snr.sigmoid(), sigma_data)
    return weight * b**2


def likelihood_weight(schedule: Schedule, t: Tensor) -> Tensor:
    """W(t) on ‖x_0 - x̂_0‖² whose mean over t is the bound on the NLL, in nats: (B,) float64.

    Up to what does not depend on the network. In continuous time it is ½ (-dλ/du) SNR with u the
    time of the SDE and -dλ/du = g²/s², which on the score is ½ g² (Song et al. 2021, "Maximum
    likelihood training of score-based diffusion models"). In discrete time it is T times the factor
    of L_{t-1} with σ² = β̃ (Ho et al. 2020, Eq. 8), which on ε is T β²/(2σ²α(1-ᾱ)) (Eq. 12); at
    t = 0, β̃ is that of t = 1.
    """
    if schedule.sde is not None:
        u = schedule.sde_time(t)
        mean, std = schedule.sde.marginal(u)
        rate = schedule.sde.diffusion(u) ** 2 / std**2
        return (1 - schedule.sde.t_min) * rate * (mean / std) ** 2 / 2
    log_beta_tilde, _ = log_variances(schedule, t)
    alpha_bar_t, alpha_bar_s = schedule.alpha_bar_at(t), schedule.alpha_bar_at(t - 1)
    c_x_0, _, _ = posterior_coefficients(alpha_bar_t, alpha_bar_s)
    return schedule.timesteps * c_x_0**2 * (-log_beta_tilde - math.log(2)).exp()
