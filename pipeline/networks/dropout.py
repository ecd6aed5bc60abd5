"""Dropout whose masks are addressed, like all randomness here.

Dropout (Srivastava et al. 2014) commonly draws from a generator, whose state an interrupted run
would have to carry along and of which each rank has its own. Here it is a function of the row's
key, the layer and the element's position in the row whether the element is dropped: the same
whichever rank computes the row, beside whichever others, and however often.

The function is SplitMix64 (Steele, Lea & Flood 2014, "Fast splittable pseudorandom number
generators", figures 15 and 17), started at a mix of key and layer, its j-th number for position j.
Torch has no unsigned 64-bit arithmetic: int64 wraps around in the same way, and `_mix` masks what
`>>` drags in of the sign.
"""

import torch
from torch import Tensor, nn


def _int64(unsigned: int) -> int:
    """The int64 of the same 64 bits."""
    return unsigned - 2**64 if unsigned >= 2**63 else unsigned


STEP = _int64(0x9E3779B97F4A7C15)  # 2^64 by the golden ratio
FACTOR_1 = _int64(0xBF58476D1CE4E5B9)
FACTOR_2 = _int64(0x94D049BB133111EB)


def _mix(z: Tensor) -> Tensor:
    """Each int64 of z thoroughly mixed, in place.

    SplitMix64 ends with z ^ (z >>> 31), which leaves the upper 31 bits as they are: without it, the
    share that is dropped is still right to 2^-31.
    """
    z ^= (z >> 30) & 0x3FFFFFFFF
    z *= FACTOR_1
    z ^= (z >> 27) & 0x1FFFFFFFFF
    z *= FACTOR_2
    return z


def dropped(keys: Tensor, layer: int, num: int, p: float) -> Tensor:
    """Which of the `num` elements of each row are dropped: (B, num) bool, true with probability p.

    keys: (B,) int64.
    """
    position = torch.arange(1, num + 1, device=keys.device) * STEP
    stream = _mix(keys + _int64((layer + 1) * STEP % 2**64))
    z = _mix(stream[:, None] + position)
    return z < round(p * 2**64) - 2**63  # z is even over -2^63 .. 2^63-1


class AddressedDropout(nn.Module):
    """x with a share p of its elements set to 0 and the others scaled by 1/(1-p); x in eval mode.

    `layer` is its number in the network, from `number_layers`.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p
        self.layer = 0

    def forward(self, x: Tensor, keys: Tensor | None) -> Tensor:
        """x: (B, ...); keys: (B,) int64 on its device, or None in eval mode."""
        if not self.training or self.p == 0:
            return x
        assert keys is not None, "dropout in training needs keys: `with dropout_keys(network, ...)`"
        assert keys.shape == x.shape[:1], f"{keys.shape} dropout keys for {x.shape[0]} rows"
        drop = dropped(keys, self.layer, x[0].numel(), self.p).view(x.shape)
        return (x * (1 / (1 - self.p))).masked_fill(drop, 0)


def number_layers(network: nn.Module) -> None:
    """Give each dropout of a network its number, in the order in which they were made."""
    layers = (module for module in network.modules() if isinstance(module, AddressedDropout))
    for number, layer in enumerate(layers):
        layer.layer = number
