"""An exponential moving average of the weights, in float32 whatever the network computes in."""

import torch
from torch import Tensor, nn


def ema_decay(step: int, decay: float) -> float:
    """The decay after `step` updates, with warm-up: min(decay, (1+n)/(10+n)).

    Without warm-up 90 % of an average at 0.9999 would still be the initial weights at step 1,000.
    """
    return min(decay, (1 + step) / (10 + step))


class Ema:
    """Shadow weights θ' ← d θ' + (1-d) θ by the name of the parameter or buffer."""

    def __init__(self, network: nn.Module, decay: float) -> None:
        self.decay = decay
        self.weights: dict[str, Tensor] = {
            name: tensor.detach().float().clone() for name, tensor in network.state_dict().items()
        }

    @torch.no_grad()
    def update(self, network: nn.Module, step: int) -> None:
        """Take in the weights after optimizer step `step` (from 0)."""
        weights = [tensor.float() for tensor in network.state_dict().values()]
        torch._foreach_lerp_(list(self.weights.values()), weights, 1 - ema_decay(step, self.decay))

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor]) -> None:
        for name, tensor in self.weights.items():
            tensor.copy_(weights[name])
