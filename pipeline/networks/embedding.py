"""Sines and cosines of a number: of the timestep, and of a patch's place (Vaswani et al. 2017)."""

import math

import torch
from torch import Tensor


def sinusoidal_embedding(t: Tensor, dim: int, sines_first: bool = False, shift: int = 0) -> Tensor:
    """Cosines and sines of t at dim/2 frequencies from 1 to about 1/10,000.

    t: (B,); returns (B, dim) float32. In bfloat16, timesteps above 256 would lose their last digit.

    Args:
        sines_first: the order of the two halves.
        shift: with 1 the last frequency is 1/10,000 itself; with 0 the one after it would be.
    """
    half = dim // 2
    frequency = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / (half - shift))
    angle = t.float()[:, None] * frequency
    halves = [angle.sin(), angle.cos()] if sines_first else [angle.cos(), angle.sin()]
    return torch.cat(halves, dim=1)


def grid_embedding(side: int, dim: int) -> Tensor:
    """The embeddings of the places of a square grid, row by row: (side², dim) float32.

    One half is of the row and one of the column, so `dim` is a multiple of 4.
    """
    place = torch.arange(side)
    row, column = place.repeat_interleave(side), place.repeat(side)
    return torch.cat([sinusoidal_embedding(axis, dim // 2) for axis in (row, column)], dim=1)
