"""In what numbers the network computes, and what `training.precision: auto` becomes.

It is resolved where the workers are, since the machine on which a command is given may have another
device; below that nobody meets `auto`.
"""

from typing import Literal

import torch

from pipeline.training.config import Precision

HALF = {"bfloat16": torch.bfloat16, "float16": torch.float16}
"""Precisions in which the network computes with fewer bits than it keeps."""
LEAST_CPU_FLOPS = 50e6
"""Of the forward and backward pass of one image. A CPU computes a smaller network faster in
float32: to convert its tensors takes longer than bfloat16 saves (tests/benchmarks/precision.py)."""


def resolve(
    asked: Precision | Literal["auto"], kept: Precision | None, everywhere: bool
) -> Precision:
    """What a training computes in.

    Args:
        asked: `training.precision`.
        kept: what the run began with, if it goes on from a checkpoint.
        everywhere: whether `prefers_bfloat16` holds on every rank.
    """
    if asked != "auto":
        return asked
    return kept or ("bfloat16" if everywhere else "float32")


def prefers_bfloat16(device: torch.device, flops: float) -> bool:
    """Whether a device computes bfloat16 natively, and a network of so many FLOPs faster in it.

    Args:
        flops: of a forward and backward pass of one image, see watch.training_flops.
    """
    return computes_natively(device, "bfloat16") and not is_small(device, flops)


def is_small(device: torch.device, flops: float) -> bool:
    """Whether bfloat16 does not pay on this device; it follows from the network alone."""
    return device.type == "cpu" and flops < LEAST_CPU_FLOPS


def computes_natively(device: torch.device, precision: Precision) -> bool:
    """Whether a device has instructions for products in a precision.

    bfloat16  GPUs from sm_80; CPUs with AVX512_BF16 or AMX, if oneDNN may use them
              (ONEDNN_MAX_CPU_ISA)
    float16   GPUs; CPUs of which oneDNN says so
    tf32      is float32 where there is none
    """
    if precision not in HALF:
        return True
    if device.type == "cuda":
        return precision == "float16" or torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    if precision == "float16":
        return bool(torch.ops.mkldnn._is_mkldnn_fp16_supported())
    return _cpu_computes_bfloat16()


def _cpu_computes_bfloat16() -> bool:
    # torch has no public word for it. What the CPU has alone would not do: oneDNN may have been
    # told to leave it. Nor would what oneDNN says: with AVX-512 alone it takes bfloat16, too, and
    # computes in float32
    has = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return has and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
