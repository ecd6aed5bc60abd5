"""What the U-Net and the DiT have in common: the switches of training.

Neither switch is part of what a network is, and neither is stored with it: a network computes the
same with them and without.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


class Block(nn.Module):
    """A part of a backbone that is run, computed again and spread over ranks as a whole."""


class Backbone(nn.Module):
    """ε_θ(x_t, t, label), made of blocks that are run one after another."""

    row_keys: Tensor | None = None
    """(B,) int64, what the dropout masks of the rows follow from: see `dropout_keys`."""
    checkpointing = False
    """Whether blocks are computed again in the backward pass: see `set_checkpointing`."""

    def run(self, block: nn.Module, *inputs: Tensor | None) -> Tensor:
        """The block's output.

        The keys of dropout are among the inputs: what is computed again sees the same ones, even
        when the network has others by then.
        """
        if self.checkpointing and torch.is_grad_enabled():
            out: Tensor = checkpoint(  # dropout needs no generator's state
                block, *inputs, use_reentrant=False, preserve_rng_state=False
            )
        else:
            out = block(*inputs)
        return out


def set_checkpointing(network: nn.Module, on: bool) -> None:
    """Keep only the inputs of blocks for the backward pass, and compute the rest again there.

    Memory falls from that of every layer to that of every block, for about a third more arithmetic;
    the gradients are the same (Chen et al. 2016, "Training deep nets with sublinear memory cost").
    """
    for backbone in _backbones(network):
        backbone.checkpointing = on


@contextmanager
def dropout_keys(network: nn.Module, keys: Tensor) -> Iterator[None]:
    """Calls of `network` within drop what `keys` say: (B,) int64 on its device, one a row.

    The backward pass may come later.
    """
    backbones = _backbones(network)
    for backbone in backbones:
        backbone.row_keys = keys
    try:
        yield
    finally:
        for backbone in backbones:
            backbone.row_keys = None


def _backbones(network: nn.Module) -> list[Backbone]:
    """Those within: a network is wrapped to learn its schedule, and to train on several ranks."""
    return [module for module in network.modules() if isinstance(module, Backbone)]
