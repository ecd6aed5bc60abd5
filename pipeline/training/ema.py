"""Averages of the weights over training, in float32 whatever the network computes in.

After each step n = 0, 1, ... an average takes θ' ← d θ' + (1-d) θ, with the decay d of its kind:

    decay      min(d, (1+n)/(10+n)): constant after a warm-up
    half_life  0.5^(B/min(H, r i)) for batches of B images after i = n B: the influence of a step is
               halved in H images, at first in a share r of those seen (Karras et al. 2022, EDM)
    power      (1 - 1/(n+1))^(γ+1): the influence grows as the γ-th power of the step, so that the
               average is as long as training is (Karras et al. 2024, EDM2, section 3.1)

A decay depends on the step and the global batch alone, so not on the number of workers.
"""

import torch
from torch import Tensor, nn

from pipeline.training.config import EmaConfig, sigma_rel_to_gamma
from pipeline.training.parallel import cut_like, slice_of


def decays(config: EmaConfig, step: int, batch_size: int) -> list[float]:
    """The decay of each average at step `step` (from 0), for global batches of `batch_size`.

    With those of power, the weights of step i = 1 ... t have the influence
    (i^(γ+1) - (i-1)^(γ+1))/t^(γ+1) after t steps, exactly: those before training have none.
    """
    if config.kind == "power":
        kept = 1 - 1 / (step + 1)
        return [kept ** (sigma_rel_to_gamma(sigma_rel) + 1) for sigma_rel in config.sigma_rel]
    if config.kind == "half_life":
        half_life = min(config.half_life, config.ramp_up * step * batch_size)
        return [0.5 ** (batch_size / half_life) if half_life else 0.0]
    # without warm-up 90 % of an average at 0.9999 would be the initial weights still at step 1,000
    return [min(config.decay, (1 + step) / (10 + step))]


class Ema:
    """The averages of a network's weights, by the names of its parameters and buffers.

    A sharded parameter (DTensor) has a sharded average: `Tensor.full_tensor()`, called by all
    ranks, gathers it. What is not floating point, such as a count of batches, is not averaged but
    kept as it is.

    Args:
        batch_size: images of a step, of all workers together.
    """

    def __init__(self, network: nn.Module, config: EmaConfig, batch_size: int) -> None:
        self.config = config
        self.batch_size = batch_size
        self.averages: dict[str, dict[str, Tensor]] = {
            average: {name: _float(t).clone() for name, t in network.state_dict().items()}
            for average in config.names
        }

    @property
    def weights(self) -> dict[str, Tensor]:
        """The average that is the model's."""
        return self.averages["ema"]

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Take in the weights after optimizer step `step` (from 0)."""
        current = {name: _float(slice_of(t)) for name, t in network.state_dict().items()}
        averaged = [name for name, tensor in current.items() if tensor.is_floating_point()]
        weights = [current[name] for name in averaged]
        rates = decays(self.config, step, self.batch_size)
        for average, decay in zip(self.averages.values(), rates, strict=True):
            torch._foreach_lerp_([slice_of(average[name]) for name in averaged], weights, 1 - decay)
            for name in current.keys() - averaged:
                average[name].copy_(current[name])

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor], average: str = "ema") -> None:
        """Take over an average, of whole weights or of such shards as this one's."""
        for name, tensor in self.averages[average].items():
            tensor.copy_(cut_like(weights[name], tensor))


def _float(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.float() if tensor.is_floating_point() else tensor
