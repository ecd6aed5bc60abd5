"""The tensors of our U-Net by their names in diffusers, and back."""

from typing import cast

import torch
from torch import Tensor

from pipeline.errors import DataError
from pipeline.networks.config import UNetConfig
from pipeline.samplers.model import ModelSpec

RESIDUAL = {
    "norm1": "norm1",
    "conv1": "conv1",
    "scale_shift": "time_emb_proj",
    "norm2": "norm2",
    "conv2": "conv2",
    "skip": "conv_shortcut",
}
ATTENTION = {"norm": ("group_norm",), "qkv": ("to_q", "to_k", "to_v"), "out": ("to_out.0",)}
"""Ours are 1×1 convolutions, q, k and v in one; theirs are linear layers."""
OUTSIDE = {
    "embed_t.0": "time_embedding.linear_1",
    "embed_t.2": "time_embedding.linear_2",
    "embed_label": "class_embedding",
    "conv_in": "conv_in",
    "norm_out": "conv_norm_out",
    "conv_out": "conv_out",
}
OLD_ATTENTION = {
    ".query.": ".to_q.",
    ".key.": ".to_k.",
    ".value.": ".to_v.",
    ".proj_attn.": ".to_out.0.",
}
"""Names of before diffusers 0.15, as in google/ddpm-cifar10-32."""


def to_theirs(spec: ModelSpec, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of our network by their names in diffusers, in the shapes of theirs."""
    return _theirs(tensor_names(spec), weights)


def to_ours(spec: ModelSpec, tensors: dict[str, Tensor], source: str) -> dict[str, Tensor]:
    """The weights of a U-Net of diffusers as those of our network, in float32.

    Args:
        source: what the tensors were read from, for the error.

    Raises:
        DataError: they are not those of the network.
    """
    names = tensor_names(spec)
    network = _weights_on_paper(spec)
    expected = _theirs(names, network)
    for name in sorted(expected.keys() | tensors.keys()):
        shape = tuple(expected[name].shape) if name in expected else None
        found = tuple(tensors[name].shape) if name in tensors else None
        if found != shape:
            raise DataError(
                f"{source} is not of the model in config.json: tensor {name} has shape "
                f"{found or 'none, it is missing'}, the model's has {shape or 'none'}"
            )
    return {
        ours: torch.cat([tensors[name].float() for name in theirs]).reshape(network[ours].shape)
        for ours, theirs in names.items()
    }


def name_of_today(name: str) -> str:
    """The present name of a tensor, from a folder of any version of diffusers."""
    if ".attentions." in name:
        for old, new in OLD_ATTENTION.items():
            name = name.replace(old, new)
    return name


def tensor_names(spec: ModelSpec) -> dict[str, tuple[str, ...]]:
    """Their names of each tensor of our U-Net: one, or three that lie one after another in ours."""
    layers: dict[str, tuple[str, ...]] = {ours: (theirs,) for ours, theirs in OUTSIDE.items()}

    def residual(ours: str, theirs: str) -> None:
        layers.update({f"{ours}.{o}": (f"{theirs}.{t}",) for o, t in RESIDUAL.items()})

    def stage(ours: str, theirs: str, i: int) -> None:
        residual(f"{ours}.block", f"{theirs}.resnets.{i}")
        for part, parts in ATTENTION.items():
            attention = tuple(f"{theirs}.attentions.{i}.{p}" for p in parts)
            layers[f"{ours}.attention.{part}"] = attention

    def resample(ours: str, theirs: str) -> None:  # by either of the two ways
        layers[ours] = (f"{theirs}.0.conv",)
        residual(ours, f"{theirs}.0")

    network = cast(UNetConfig, spec.network)
    down, up = 0, 0  # ours are counted through all levels
    for level in range(len(network.channel_multipliers)):
        if level:
            resample(f"down.{down}", f"down_blocks.{level - 1}.downsamplers")
            resample(f"up.{up}", f"up_blocks.{level - 1}.upsamplers")
            down, up = down + 1, up + 1
        for i in range(network.blocks_per_level):
            stage(f"down.{down + i}", f"down_blocks.{level}", i)
        for i in range(network.blocks_per_level + 1):
            stage(f"up.{up + i}", f"up_blocks.{level}", i)
        down, up = down + network.blocks_per_level, up + network.blocks_per_level + 1
    stage("middle.0", "mid_block", 0)
    stage("middle.1", "mid_block", 1)

    names = {}
    for tensor in _weights_on_paper(spec):
        layer, kind = tensor.rsplit(".", 1)
        names[tensor] = tuple(f"{theirs}.{kind}" for theirs in layers[layer])
    return names


def _theirs(names: dict[str, tuple[str, ...]], weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Our tensors by their names, in their shapes."""
    theirs = {}
    for ours, tensor in weights.items():
        if ".attention." in ours and tensor.ndim == 4:
            tensor = tensor.flatten(1)
        for name, part in zip(names[ours], tensor.chunk(len(names[ours])), strict=True):
            theirs[name] = part.clone(memory_format=torch.contiguous_format)
    return theirs


def _weights_on_paper(spec: ModelSpec) -> dict[str, Tensor]:
    """Names and shapes of our tensors, without memory for their values."""
    with torch.device("meta"):
        return spec.make_network().state_dict()
