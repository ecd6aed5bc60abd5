"""What the network's output stands for, and the conversions between the parameterisations.

At a given x_t = √ᾱ x_0 + √(1-ᾱ) ε, each of these determines all others:

    eps     ε                                                   Ho et al. 2020
    x_0     x_0
    v       √ᾱ ε - √(1-ᾱ) x_0                                   Salimans & Ho 2022, section 4
    score   ∇ log q(x_t|x_0) = -ε/√(1-ᾱ)                         Song et al. 2021
    edm     F in  x_0 = c_skip x_t/√ᾱ + c_out F                  Karras et al. 2022, Eq. 7

Each is linear in (x_0, ε), and x_0 and ε are linear in (x_t, output): three small tables of float64
coefficients, functions of ᾱ, say all. ε is read off v or the score without passing through x_0,
since that way would multiply an error by √(1-ᾱ)/√ᾱ (20,000 at the end of the cosine schedule) only
to divide it out again. What is left of the amplification, x_0 from ε, is in the mathematics; the
samplers clip x̂_0.
"""

import torch
from torch import Tensor

from pipeline.diffusion.config import DiffusionConfig, Prediction
from pipeline.diffusion.gaussian import like, one_by_one


def edm_coefficients(alpha_bar: Tensor, sigma_data: float) -> tuple[Tensor, Tensor, Tensor]:
    """(c_skip, c_out, c_in) of Karras et al. 2022, table 1, for x_t in the frame of ᾱ.

    Their x is x_t/√ᾱ with σ² = (1-ᾱ)/ᾱ; c_skip and c_in here multiply x_t itself, which keeps them
    finite at ᾱ = 0.
    """
    noise, signal = 1 - alpha_bar, alpha_bar * sigma_data**2
    norm = (noise + signal).sqrt()
    c_skip = alpha_bar.sqrt() * sigma_data**2 / (noise + signal)
    c_out = noise.sqrt() * sigma_data / norm
    return c_skip, c_out, 1 / norm


def x_0_coefficients(
    prediction: Prediction, alpha_bar: Tensor, sigma_data: float
) -> tuple[Tensor, Tensor]:
    """(a, b) with x_0 = a x_t + b output."""
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    if prediction == "eps":
        return 1 / signal, -noise / signal
    if prediction == "x_0":
        return torch.zeros_like(signal), torch.ones_like(signal)
    if prediction == "v":
        return signal, -noise
    if prediction == "score":
        return 1 / signal, noise**2 / signal
    c_skip, c_out, _ = edm_coefficients(alpha_bar, sigma_data)
    return c_skip, c_out


def eps_coefficients(
    prediction: Prediction, alpha_bar: Tensor, sigma_data: float
) -> tuple[Tensor, Tensor]:
    """(a, b) with ε = a x_t + b output."""
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    if prediction == "eps":
        return torch.zeros_like(signal), torch.ones_like(signal)
    if prediction == "x_0":
        return 1 / noise, -signal / noise
    if prediction == "v":
        return noise, signal
    if prediction == "score":
        return torch.zeros_like(signal), -noise
    _, _, c_in = edm_coefficients(alpha_bar, sigma_data)
    return noise * c_in**2, -signal * sigma_data * c_in


def target_coefficients(
    prediction: Prediction, alpha_bar: Tensor, sigma_data: float
) -> tuple[Tensor, Tensor]:
    """(a, b) with output = a x_0 + b ε."""
    signal, noise = alpha_bar.sqrt(), (1 - alpha_bar).sqrt()
    zero, one = torch.zeros_like(signal), torch.ones_like(signal)
    if prediction == "eps":
        return zero, one
    if prediction == "x_0":
        return one, zero
    if prediction == "v":
        return -noise, signal
    if prediction == "score":
        return zero, -1 / noise
    _, _, c_in = edm_coefficients(alpha_bar, sigma_data)
    return noise * c_in / sigma_data, -signal * sigma_data * c_in


def target(
    prediction: Prediction, x_0: Tensor, eps: Tensor, alpha_bar: Tensor, sigma_data: float = 0.5
) -> Tensor:
    """What the network should say for x_0 and eps, (B, ...) each, at alpha_bar, () or (B,)."""
    a, b = target_coefficients(prediction, alpha_bar, sigma_data)
    return like(a, x_0) * x_0 + like(b, eps) * eps


def x_0_from(
    prediction: Prediction, output: Tensor, x_t: Tensor, alpha_bar: Tensor, sigma_data: float = 0.5
) -> Tensor:
    """x̂_0 of a network's output at x_t, (B, ...) each, in float32 or better."""
    a, b = x_0_coefficients(prediction, alpha_bar, sigma_data)
    x_t, output = _at_least_float32(x_t), _at_least_float32(output)
    if prediction == "x_0":
        return output
    if prediction in ("eps", "score"):  # both terms are large where ᾱ is small: subtract first
        return (x_t + like(b / a, x_t) * output) * like(a, x_t)
    return like(a, x_t) * x_t + like(b, output) * output


def eps_from(
    prediction: Prediction, output: Tensor, x_t: Tensor, alpha_bar: Tensor, sigma_data: float = 0.5
) -> Tensor:
    """ε̂ of a network's output at x_t, (B, ...) each, in float32 or better."""
    a, b = eps_coefficients(prediction, alpha_bar, sigma_data)
    x_t, output = _at_least_float32(x_t), _at_least_float32(output)
    return output if prediction == "eps" else like(a, x_t) * x_t + like(b, output) * output


def convert(
    output: Tensor,
    given: Prediction,
    wanted: Prediction,
    x_t: Tensor,
    alpha_bar: Tensor,
    sigma_data: float = 0.5,
) -> Tensor:
    """A network's output at x_t in another parameterisation, in float32 or better."""
    if given == wanted:
        return _at_least_float32(output)
    x_0 = x_0_from(given, output, x_t, alpha_bar, sigma_data)
    eps = eps_from(given, output, x_t, alpha_bar, sigma_data)
    a, b = target_coefficients(wanted, alpha_bar, sigma_data)
    if not a.any():  # 0·x_0 would be NaN where x_0 is not finite
        return like(b, eps) * eps
    return like(a, x_0) * x_0 + like(b, eps) * eps


def network_input(
    config: DiffusionConfig, x_t: Tensor, t: Tensor, alpha_bar: Tensor
) -> tuple[Tensor, Tensor]:
    """What the network sees of x_t (B, ...) and t (B,): its image and its time (B,).

    x_t is in the variance-preserving frame whatever the process, so that the input has about unit
    variance. EDM's preconditioning has an input scale and a time of its own, c_in and ¼ ln σ. Where
    the schedule is learned, the meaning of t moves during training, that of the log-SNR does not:
    there the time is 25 (20 - λ), about 0 .. 1,000 (Kingma et al. 2021 condition on λ, too).
    """
    if config.prediction == "edm":
        _, _, c_in = edm_coefficients(alpha_bar, config.sigma_data)
        return like(c_in, x_t) * x_t, -one_by_one(torch.logit, alpha_bar) / 8
    if config.schedule == "learned":
        return x_t, 25 * (20 - one_by_one(torch.logit, alpha_bar))
    return x_t, t


def _at_least_float32(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
