"""How well a model predicts held-out images, in bits per dimension: by the bound, and by the ODE.

Both are computed a chunk of images at a time, so that chunks may lie on different machines, and
summarised from the chunks. All noise is addressed by the image's place in the held-out set.
"""

import itertools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.data.images import to_unit
from pipeline.data.shards import NO_LABEL, ImageSet
from pipeline.device import CPU, send
from pipeline.diffusion.elbo import Elbo, elbo
from pipeline.diffusion.gaussian import one_by_one
from pipeline.diffusion.likelihood import bits_per_dim, dequantised, draw_signs
from pipeline.errors import UserError
from pipeline.evaluation.config import Trace
from pipeline.evaluation.estimate import mean_of
from pipeline.samplers.model import Model
from pipeline.seeding import key, normal, permutation

IMAGES_PER_CHUNK = 16
TOLERANCE = 1e-5
"""rtol and atol of the ODE, those of Song et al. 2021."""
CURVE_POINTS = 50


class OdeBits(NamedTuple):
    bits: Tensor
    """(B, draws) float64 bits per dimension: each draw has its own dequantisation and signs."""
    evaluations: Tensor
    """Of the network, (B, draws) int64; each with D backward passes if the trace is exact, or 1."""


def choose_chunks(count: int, held_out: int, seed: int) -> list[np.ndarray]:
    """`count` of the held-out images, or all if there are fewer, in chunks of positions.

    In a random order: the held-out set may lie class by class. More images contain fewer.
    """
    chosen = permutation(key(seed, "likelihood"), held_out)[:count]
    return [chosen[i : i + IMAGES_PER_CHUNK] for i in range(0, len(chosen), IMAGES_PER_CHUNK)]


def elbo_of(
    model: Model, images: ImageSet, positions: np.ndarray, seed: int, device: torch.device = CPU
) -> Elbo:
    """The variational bound of some images, all timesteps, of the chain that samples are drawn by.

    It clips x̂_0 to the range of the data. It matters where ε is predicted: at the end of the
    cosine schedule an error of it is 20,291 times as large in x̂_0.
    """
    x_0, labels = _batch(model, images, device)

    def predict(x_t: Tensor, t: Tensor, alpha_bar: Tensor) -> tuple[Tensor, Tensor | None]:
        x = x_t.float()
        of_rows = labels.repeat(len(x) // len(labels))
        output, fraction = model.output(x, t, alpha_bar, of_rows)
        return model.x_0(output, x, alpha_bar).clamp(-1, 1), fraction

    def noise(t: int) -> Tensor:
        keys = [key(seed, "elbo", int(i), t) for i in positions]
        return send(normal(keys, model.spec.image_shape), device).double()

    variance = model.spec.diffusion.variance
    found = elbo(send(x_0, device), model.schedule, variance, predict, noise)
    return Elbo(found.prior.cpu(), found.terms.cpu())


def ode_bits_of(
    model: Model,
    images: ImageSet,
    positions: np.ndarray,
    seed: int,
    trace: Trace,
    draws: int = 1,
    device: torch.device = CPU,
) -> OdeBits:
    """Bits per dimension of some images by the probability-flow ODE, with x̂_0 unclipped.

    Raises:
        UserError: the schedule ends in noise alone, or the tolerances cannot be met.
    """
    noise, data = model.schedule.log_snr[[-1, 0]].tolist()
    if math.isinf(noise):
        raise UserError(
            "evaluation.ode_images must be 0 for a model with zero_terminal_snr: the ODE would end "
            "at its last timestep, whose log-SNR is not finite"
        )
    x_0, labels = _batch(model, images, device)

    def predict_x_0(x_t: Tensor, log_snr: Tensor) -> Tensor:
        t = one_by_one(model.schedule.t_at, log_snr)
        alpha_bar = one_by_one(torch.sigmoid, log_snr)
        return model.predict_x_0(x_t.float(), t, alpha_bar, labels)

    bits, evaluations = [], []
    for draw in range(draws):
        x = dequantised(x_0, [key(seed, "dequantise", int(i), draw) for i in positions])
        signs = None
        if trace == "hutchinson":
            keys = [key(seed, "hutchinson", int(i), draw) for i in positions]
            signs = send(draw_signs(keys, tuple(x.shape[1:])), device)
        x = send(x, device)
        solution = bits_per_dim(predict_x_0, x, data, noise, signs, TOLERANCE, TOLERANCE)
        bits.append(solution.x.cpu())
        evaluations.append(solution.evaluations)
    return OdeBits(torch.stack(bits, dim=1), torch.stack(evaluations, dim=1))


def _batch(model: Model, images: ImageSet, device: torch.device) -> tuple[Tensor, Tensor]:
    """x_0 (B, C, H, W) float64 on the CPU, and on the device the network and the labels (B,), ∅ for
    an image without one."""
    model.network.to(device)
    x_0 = to_unit(torch.from_numpy(images.images)).double()
    labels = torch.from_numpy(images.labels)
    return x_0, send(labels.masked_fill(labels == NO_LABEL, model.spec.num_classes), device)


def summarise_elbo(chunks: Sequence[Elbo]) -> dict[str, Any]:
    """The mean over all images, its standard error, and where the bits are.

    per_timestep: the mean L_t of the timesteps from each t up to the next one.
    """
    prior = torch.cat([chunk.prior for chunk in chunks])  # (N,)
    terms = torch.cat([chunk.terms for chunk in chunks])  # (N, T)
    curve = terms.mean(0)  # (T,)
    T = len(curve)
    edges = np.unique(np.linspace(1, T, min(CURVE_POINTS, T - 1) + 1).astype(int)).tolist()
    return {
        **mean_of(prior + terms.sum(1)).to_json(),
        "n": len(terms),
        "by_term": {
            "prior": float(prior.mean()),
            "kl": float(curve[1:].sum()),
            "decoder": float(curve[0]),
        },
        "per_timestep": {
            "t": edges[:-1],
            "bits": [float(curve[a:b].mean()) for a, b in itertools.pairwise(edges)],
        },
        "clip_x_0": True,
        "network_evaluations": T,
    }


def summarise_ode(chunks: Sequence[OdeBits], trace: Trace) -> dict[str, Any]:
    """The mean over all images, its standard error, and the spread of draws for one image."""
    bits = torch.cat([chunk.bits for chunk in chunks])  # (N, draws)
    evaluations = torch.cat([chunk.evaluations for chunk in chunks])
    draws = bits.shape[1]
    spread = float(bits.var(1).mean().sqrt()) if draws > 1 else None
    return {
        **mean_of(bits.mean(1)).to_json(),
        "n": len(bits),
        "trace": trace,
        "draws": draws,
        "spread_of_draws": spread,
        "dequantisation": "uniform",
        "clip_x_0": False,
        "rtol": TOLERANCE,
        "atol": TOLERANCE,
        "network_evaluations": float(evaluations.double().mean()),
    }
