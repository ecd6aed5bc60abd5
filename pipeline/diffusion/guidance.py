"""Classifier-free guidance of a network's output, in whichever parameterisation it is.

x_0, ε, v, the score and F are linear in each other at a given x_t, so that guiding one guides all.
A learned variance is not guided: callers pass the part of the output that stands for the mean.
"""

import torch
from torch import Tensor

from pipeline.device import send
from pipeline.diffusion.gaussian import like


def guided(output_label: Tensor, output_null: Tensor, w: Tensor) -> Tensor:
    """(1+w) ε(c) - w ε(∅); Ho & Salimans 2022, Eq. 6. Outputs (B, ...), w (B,) float64.

    A row with w = 0 is ε(c) exactly.
    """
    return like(1 + w, output_label) * output_label - like(w, output_null) * output_null


def rescaled(output: Tensor, output_label: Tensor, phi: Tensor) -> Tensor:
    """The guided output with φ of the way back to the standard deviation of the conditional one.

    Guidance raises the contrast of an image; Lin et al. 2023, Eq. 15-16. phi: (B,) float64.
    """
    # image by image: a reduction over a batch may round differently with its size
    std, std_label = (
        torch.stack([image.std() for image in batch]).double() for batch in (output, output_label)
    )
    phi = send(phi, output.device)
    return like(phi * std_label / std + 1 - phi, output) * output
