"""The keys of a diffusers folder as a ModelSpec, and back.

Each key of diffusers 0.42 stands here with its default, narrowed to what our U-Net and schedules
know; any other key or value is refused with its name.
"""

import math
from typing import Any, Literal, cast

import torch
from pydantic import BaseModel, Field, ValidationError
from torch import nn

from pipeline.diffusion.config import BETA_ENDS, DiffusionConfig, Prediction, ScheduleName, Variance
from pipeline.diffusion.schedules import make_schedule
from pipeline.errors import ConfigError
from pipeline.networks.config import UNetConfig
from pipeline.samplers.model import ModelSpec
from pipeline.sentences import first_mistake

VERSION = "0.42.0"
"""Of diffusers, whose keys these are."""

DownBlock = Literal["DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D"]
UpBlock = Literal["UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"]
PredictionType = Literal["epsilon", "sample", "v_prediction"]


class UNet2DModel(BaseModel, frozen=True, extra="forbid", strict=True):
    """unet/config.json."""

    sample_size: int
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: Literal[False] = False
    time_embedding_type: Literal["positional"] = "positional"
    time_embedding_dim: int | None = None
    freq_shift: Literal[0, 1] = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[DownBlock, ...]
    mid_block_type: Literal["UNetMidBlock2D"] = "UNetMidBlock2D"
    up_block_types: tuple[UpBlock, ...]
    block_out_channels: tuple[int, ...] = Field(min_length=1)
    layers_per_block: int = 2
    mid_block_scale_factor: float = Field(default=1.0, ge=1, le=1)
    downsample_padding: Literal[0, 1] = 1
    downsample_type: Literal["conv", "resnet"] = "conv"
    upsample_type: Literal["conv", "resnet"] = "conv"
    dropout: float = 0.0
    act_fn: Literal["silu"] = "silu"
    attention_head_dim: int | None = 8
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None
    """Of the attention in the middle, which by default has no norm with scale_shift."""
    norm_eps: float = 1e-5
    resnet_time_scale_shift: Literal["default", "scale_shift"] = "default"
    add_attention: Literal[True] = True
    class_embed_type: None = None
    num_class_embeds: int | None = None
    num_train_timesteps: int | None = None
    """Of a learned time embedding alone."""


class DDPMScheduler(BaseModel, frozen=True, extra="forbid", strict=True):
    """scheduler/scheduler_config.json.

    The keys of the second half say how to draw, which is asked anew for each image here.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: Literal["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"] = "linear"
    trained_betas: tuple[float, ...] | None = None
    variance_type: Literal["fixed_small", "fixed_small_log", "fixed_large", "learned_range"] = (
        "fixed_small"
    )
    prediction_type: PredictionType = "epsilon"
    rescale_betas_zero_snr: bool = False

    clip_sample: bool = True
    clip_sample_range: float = 1.0
    thresholding: bool = False
    dynamic_thresholding_ratio: float = 0.995
    sample_max_value: float = 1.0
    timestep_spacing: Literal["leading", "trailing", "linspace"] = "leading"
    steps_offset: int = 0


class DDIMScheduler(DDPMScheduler, frozen=True):
    """The same of another scheduler, with a key more that says how to draw."""

    set_alpha_to_one: bool = True


PREDICTIONS: dict[Prediction, PredictionType] = {
    "eps": "epsilon",
    "x_0": "sample",
    "v": "v_prediction",
}
SCHEDULES: dict[ScheduleName, str] = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "quadratic": "scaled_linear",  # the same with other ends
    "cosine": "squaredcos_cap_v2",
}
"""Schedules that have a name in diffusers; the others are given as their betas."""


# --- out ----------------------------------------------------------------------------------------


def to_keys(spec: ModelSpec) -> tuple[UNet2DModel, DDPMScheduler]:
    """The keys of a model.

    Raises:
        ConfigError: it has an option that diffusers cannot express; the message names it.
    """
    network, diffusion = spec.network, spec.diffusion
    if not isinstance(network, UNetConfig):
        raise ConfigError(
            f"network.kind={network.kind} cannot be given to diffusers, whose DDPMPipeline has a "
            "U-Net: only models with network.kind=unet can"
        )
    with torch.device("meta"):
        layers = spec.make_network().modules()
    groups = sorted({layer.num_groups for layer in layers if isinstance(layer, nn.GroupNorm)})
    for holds, option, reason in (
        (
            network.channel_multipliers[0] == 1,
            f"network.channel_multipliers={network.channel_multipliers}",
            "whose first convolution has the channels of the first level: only multipliers that "
            "begin with 1 can",
        ),
        (
            len(groups) == 1,
            f"network.norm_groups={network.norm_groups or 'null'}",
            "which normalises all layers in the same number of groups, where it makes "
            f"{' or '.join(map(str, groups))}: train with network.norm_groups={math.gcd(*groups)}",
        ),
        (
            diffusion.prediction in PREDICTIONS,
            f"diffusion.prediction={diffusion.prediction}",
            f"whose DDPMScheduler reads an output as {', '.join(PREDICTIONS)} only",
        ),
        (
            diffusion.schedule != "learned",
            "diffusion.schedule=learned",
            "which tells a network the timestep: with a learned schedule it is told the log-SNR",
        ),
        (
            spec.data_range == (-1.0, 1.0),
            f"data_range={spec.data_range}",
            "whose DDPMPipeline takes the values of an image to be in [-1, 1]",
        ),
    ):
        if not holds:
            raise ConfigError(f"{option} cannot be given to diffusers, {reason}")
    return _unet(spec, network, groups[0]), _scheduler(diffusion)


def _unet(spec: ModelSpec, network: UNetConfig, groups: int) -> UNet2DModel:
    levels = range(len(network.channel_multipliers))
    attends = [spec.image_size >> level in network.attention_at for level in levels]
    in_blocks, scales = network.resample == "block", network.conditioning == "scale_shift"
    down: DownBlock = "ResnetDownsampleBlock2D" if in_blocks else "DownBlock2D"
    up: UpBlock = "ResnetUpsampleBlock2D" if in_blocks else "UpBlock2D"
    return UNet2DModel(
        sample_size=spec.image_size,
        in_channels=spec.channels,
        out_channels=spec.channels * (2 if spec.learns_variance else 1),
        freq_shift=network.frequency_shift,
        flip_sin_to_cos=not network.sines_first,
        down_block_types=tuple("AttnDownBlock2D" if attend else down for attend in attends),
        up_block_types=tuple("AttnUpBlock2D" if attend else up for attend in reversed(attends)),
        block_out_channels=tuple(network.base_channels * m for m in network.channel_multipliers),
        layers_per_block=network.blocks_per_level,
        downsample_padding=0 if network.halving_padding == "after" else 1,
        downsample_type="resnet" if in_blocks else "conv",
        upsample_type="resnet" if in_blocks else "conv",
        dropout=network.dropout,
        attention_head_dim=network.head_channels,
        norm_num_groups=groups,
        attn_norm_num_groups=groups if scales else None,
        norm_eps=network.norm_eps,
        resnet_time_scale_shift="scale_shift" if scales else "default",
        num_class_embeds=spec.num_classes + 1 if spec.num_classes else None,
    )


def _scheduler(diffusion: DiffusionConfig) -> DDPMScheduler:
    values: dict[str, Any] = {}
    if diffusion.schedule in SCHEDULES:
        values["beta_schedule"] = SCHEDULES[diffusion.schedule]
        if diffusion.schedule in BETA_ENDS:  # ours are of 1,000 timesteps
            low, high = diffusion.ends(BETA_ENDS)
            scale = 1000 / diffusion.timesteps
            values |= {"beta_start": scale * low, "beta_end": scale * high}
    else:
        beta = make_schedule(diffusion.model_copy(update={"zero_terminal_snr": False})).beta
        if 1 - beta[0].float() == 1:
            raise ConfigError(
                f"diffusion.schedule={diffusion.schedule} cannot be given to diffusers, whose "
                f"schedules are float32: there its first β, {float(beta[0]):.1g}, is nothing"
            )
        values["trained_betas"] = tuple(beta.tolist())
    return DDPMScheduler(
        num_train_timesteps=diffusion.timesteps,
        variance_type=diffusion.variance,
        prediction_type=PREDICTIONS[diffusion.prediction],
        rescale_betas_zero_snr=diffusion.zero_terminal_snr,
        # trailing is ours, but after the last timestep diffusers adds noise of the other variances
        # to the finished image, unless that timestep is 0
        timestep_spacing="trailing" if diffusion.variance == "fixed_small" else "leading",
        **values,
    )


# --- in -----------------------------------------------------------------------------------------


def from_keys(unet: UNet2DModel, scheduler: DDPMScheduler) -> ModelSpec:
    """The model of the keys, its classes called 0, 1, ...

    Raises:
        ConfigError: they go together in a way that is not known here.
    """
    try:
        spec = ModelSpec(
            network=_network(unet),
            diffusion=_diffusion(scheduler),
            channels=unet.in_channels,
            image_size=unet.sample_size,
            class_names=[str(label) for label in range(unet.num_class_embeds or 0)],
        )
        cast(UNetConfig, spec.network).check_image_size(spec.image_size)
    except ValidationError as error:
        raise ConfigError(f"the folder cannot be taken over: {first_mistake(error)}") from error
    except ValueError as error:
        raise ConfigError(f"the folder cannot be taken over: {error}") from error
    if unet.out_channels != unet.in_channels * (2 if spec.learns_variance else 1):
        raise ConfigError(
            f"out_channels={unet.out_channels} of the U-Net does not go with variance_type="
            f"{scheduler.variance_type} of the scheduler: a learned variance needs twice the "
            f"in_channels={unet.in_channels}, any other as many"
        )
    return spec


def _network(unet: UNet2DModel) -> UNetConfig:
    widths, base = unet.block_out_channels, unet.block_out_channels[0]
    down, up = unet.down_block_types, unet.up_block_types[::-1]
    attends = [block.startswith("Attn") for block in down]
    # of all that lead to another level: the last does not downwards, the first not upwards
    resnets = {_by_resnet(block, unet.downsample_type) for block in down[:-1]} | {
        _by_resnet(block, unet.upsample_type) for block in up[1:]
    }
    scales = unet.resnet_time_scale_shift == "scale_shift"
    in_middle = unet.attn_norm_num_groups or (None if scales else unet.norm_num_groups)
    for holds, key, rule in (
        (
            len(down) == len(up) == len(widths),
            "block_out_channels",
            "must be as many as down_block_types and up_block_types",
        ),
        (
            not any(width % base for width in widths),
            "block_out_channels",
            f"must be multiples of the first, {base}",
        ),
        (
            unet.time_embedding_dim in (None, 4 * base),
            "time_embedding_dim",
            f"must be {4 * base}, four times the first of block_out_channels",
        ),
        (
            attends == [block.startswith("Attn") for block in up],
            "up_block_types",
            "must have attention at the levels where down_block_types have it",
        ),
        (
            len(resnets) < 2,
            "down_block_types",
            "and up_block_types must change the resolution in one way, all by convolutions or all "
            "by residual blocks",
        ),
        (
            in_middle == unet.norm_num_groups,
            "attn_norm_num_groups",
            f"must be norm_num_groups={unet.norm_num_groups}: with scale_shift and without it, the "
            "attention in the middle would have no norm",
        ),
    ):
        if not holds:
            raise ConfigError(
                f"{key}={getattr(unet, key)} of the U-Net cannot be taken over: it {rule}"
            )
    return UNetConfig(
        base_channels=base,
        channel_multipliers=[width // base for width in widths],
        blocks_per_level=unet.layers_per_block,
        attention_at=[unet.sample_size >> i for i, attend in enumerate(attends) if attend],
        head_channels=unet.attention_head_dim,
        conditioning="scale_shift" if scales else "add",
        resample="block" if resnets == {True} else "conv",
        dropout=unet.dropout,
        norm_groups=unet.norm_num_groups,
        norm_eps=unet.norm_eps,
        halving_padding="around" if unet.downsample_padding else "after",
        sines_first=not unet.flip_sin_to_cos,
        frequency_shift=unet.freq_shift,
    )


def _by_resnet(block: str, attending: Literal["conv", "resnet"]) -> bool:
    """Whether a block ends with a residual block; `attending` is of those with attention."""
    return block.startswith("Resnet") or (block.startswith("Attn") and attending == "resnet")


def _diffusion(scheduler: DDPMScheduler) -> DiffusionConfig:
    T, low, high = scheduler.num_train_timesteps, scheduler.beta_start, scheduler.beta_end
    values: dict[str, Any]
    if scheduler.trained_betas is not None:
        values = {"schedule": "betas", "betas": scheduler.trained_betas}
    elif scheduler.beta_schedule == "sigmoid":  # of β; ours is of ᾱ
        part = torch.linspace(-6, 6, T, dtype=torch.float64).sigmoid()
        values = {"schedule": "betas", "betas": tuple((low + (high - low) * part).tolist())}
    elif scheduler.beta_schedule == "squaredcos_cap_v2":
        values = {"schedule": "cosine"}
    else:
        ends = (T / 1000 * low, T / 1000 * high)
        values = {"schedule": scheduler.beta_schedule}
        if ends != BETA_ENDS[scheduler.beta_schedule]:
            values |= {"beta_start": ends[0], "beta_end": ends[1]}
    return DiffusionConfig(
        timesteps=T,
        prediction={theirs: ours for ours, theirs in PREDICTIONS.items()}[
            scheduler.prediction_type
        ],
        # fixed_small_log is the same number, computed in another way
        variance=cast(Variance, scheduler.variance_type.removesuffix("_log")),
        zero_terminal_snr=scheduler.rescale_betas_zero_snr,
        **values,
    )
