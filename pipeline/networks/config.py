"""Which network and of what shape: the section `network` of a config, and the published sizes.

    network:
      preset: ddpm_cifar10
      dropout: 0.1              # keys beside a preset override its own

A preset is a size, so dropout is none of its business; the config that is stored has the values
and not the name.

    ddpm_cifar10, ddpm_256    Ho et al. 2020, appendix B: 35.7M and 114M parameters
    adm_64, adm_256           Dhariwal & Nichol 2021, table 11: 296M and 554M, with 1,000 classes
                              and a learned variance
    dit_SIZE_PATCH            Peebles & Xie 2023, table 1: SIZE s, b, l or xl and PATCH 2, 4 or 8;
                              33M, 130M, 458M and 675M at patch 2, with 1,000 classes and a learned
                              variance, on latents of 32x32x4

Widths, depths and blocks are the published ones, and with them the number of parameters; so are, of
the first two, the padding of a stride-2 convolution, the embedding of t and the norms. Our own stay
the first weights of the U-Net (torch's) and the groups of ADM's norms (at widths that 128 does not
divide, 16 and not 32).
"""

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, Field, model_validator


class UNetConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """The shape of the U-Net."""

    kind: Literal["unet"] = "unet"
    """A U-Net, the default."""
    base_channels: int = Field(ge=4, multiple_of=4)
    """Channels of the first level."""
    channel_multipliers: list[int] = Field(min_length=1)
    """Channels of each level, as multiples of base_channels; the resolution halves from level to
    level."""
    blocks_per_level: int = Field(default=2, ge=1)
    """Residual blocks of a level on the way down; on the way up there is one more."""
    attention_at: list[int] = []
    """Resolutions in pixels at which the blocks are followed by self-attention."""
    head_channels: int | None = Field(default=None, ge=1)
    """Channels of an attention head. By default there is one head of all channels, as in Ho et al.
    2020, which is fastest on a CPU; ADM has 64."""
    conditioning: Literal["scale_shift", "add"] = "scale_shift"
    """How timestep and class reach a block. scale_shift: they scale and shift the output of its
    second GroupNorm (ADM, section 3.1). add: they are added before it (Ho et al. 2020)."""
    resample: Literal["conv", "block"] = "conv"
    """What halves and doubles the resolution between levels: a convolution, or a residual block
    (ADM, section 3)."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of a block's activations, before its second convolution, that is dropped in
    training."""
    norm_groups: int | None = Field(default=None, ge=1)
    """Groups of every GroupNorm. By default each layer has up to 32 groups of at least 4
    channels."""
    norm_eps: float = Field(default=1e-5, gt=0, allow_inf_nan=False)
    """What a GroupNorm adds to a variance; 1e-6 in Ho et al. 2020."""
    halving_padding: Literal["around", "after"] = "around"
    """Where a convolution that halves the resolution is padded with zeros: all around the image,
    or only on its right and lower sides (Ho et al. 2020)."""
    sines_first: bool = False
    """Whether the sines come before the cosines in the embedding of the timestep, as in Ho et al.
    2020."""
    frequency_shift: Literal[0, 1] = 0
    """With 1, as in Ho et al. 2020, the lowest frequency of the timestep is 1/10,000 itself."""

    @model_validator(mode="after")
    def _multipliers_are_positive(self) -> "UNetConfig":
        if min(self.channel_multipliers) < 1:
            raise ValueError(
                f"channel_multipliers={self.channel_multipliers} must be 1 or more each"
            )
        return self

    @model_validator(mode="after")
    def _groups_divide_every_width(self) -> "UNetConfig":
        if self.base_channels % (self.norm_groups or 1):
            raise ValueError(
                f"norm_groups={self.norm_groups} must divide base_channels={self.base_channels}"
            )
        return self

    def check_image_size(self, image_size: int) -> None:
        """Raise ValueError unless the levels divide `image_size` and attention has its level."""
        levels = len(self.channel_multipliers)
        if image_size % 2 ** (levels - 1):
            raise ValueError(
                f"channel_multipliers has {levels} levels, which halve the image {levels - 1} "
                f"times, but data.image_size={image_size} is not a multiple of {2 ** (levels - 1)}"
            )
        resolutions = [image_size >> level for level in range(levels)]
        if strange := [r for r in self.attention_at if r not in resolutions]:
            raise ValueError(
                f"attention_at={strange} is not among the resolutions of the levels, {resolutions}"
            )
        attending = [r in self.attention_at for r in resolutions[:-1]] + [True]  # and the middle
        widths = [self.base_channels * multiplier for multiplier in self.channel_multipliers]
        for width, attends in zip(widths, attending, strict=True):
            if attends and width % (self.head_channels or width):
                raise ValueError(
                    f"network.head_channels={self.head_channels} does not divide the {width} "
                    "channels of a level with attention"
                )


class DiTConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """The shape of the transformer."""

    kind: Literal["dit"] = "dit"
    """A diffusion transformer (Peebles & Xie 2023)."""
    patch_size: int = Field(ge=1)
    """Side of a patch in pixels; smaller patches make more tokens."""
    width: int = Field(ge=4, multiple_of=4)
    """Channels of a token."""
    depth: int = Field(ge=1)
    """Number of blocks."""
    heads: int = Field(ge=1)
    """Attention heads; they divide the width."""
    mlp_ratio: float = Field(default=4.0, gt=0, allow_inf_nan=False)
    """Hidden units of a block's MLP, as a multiple of the width."""
    dropout: float = Field(default=0.0, ge=0, lt=1)
    """Share of the outputs of attention and MLP that is dropped in training."""

    @model_validator(mode="after")
    def _heads_divide_the_width(self) -> "DiTConfig":
        if self.width % self.heads:
            raise ValueError(f"width={self.width} must be a multiple of heads={self.heads}")
        return self

    def check_image_size(self, image_size: int) -> None:
        """Raise ValueError unless `image_size` is made of whole patches."""
        if image_size % self.patch_size:
            raise ValueError(
                f"data.image_size={image_size} is not a multiple of "
                f"network.patch_size={self.patch_size}"
            )


DDPM = {
    "base_channels": 128,
    "blocks_per_level": 2,
    "attention_at": [16],
    "conditioning": "add",
    "norm_eps": 1e-6,
    "halving_padding": "after",
    "sines_first": True,
    "frequency_shift": 1,
}
ADM = {"attention_at": [32, 16, 8], "head_channels": 64, "resample": "block"}
DIT = {  # depth, width, heads
    "s": (12, 384, 6),
    "b": (12, 768, 12),
    "l": (24, 1024, 16),
    "xl": (28, 1152, 16),
}
PRESETS: dict[str, dict[str, Any]] = {
    "ddpm_cifar10": DDPM | {"channel_multipliers": [1, 2, 2, 2]},
    "ddpm_256": DDPM | {"channel_multipliers": [1, 1, 2, 2, 4, 4]},
    "adm_64": ADM
    | {"base_channels": 192, "channel_multipliers": [1, 2, 3, 4], "blocks_per_level": 3},
    "adm_256": ADM
    | {"base_channels": 256, "channel_multipliers": [1, 1, 2, 2, 4, 4], "blocks_per_level": 2},
} | {
    f"dit_{size}_{patch_size}": {
        "kind": "dit",
        "patch_size": patch_size,
        "depth": depth,
        "width": width,
        "heads": heads,
    }
    for size, (depth, width, heads) in DIT.items()
    for patch_size in (2, 4, 8)
}


def with_preset(section: Any) -> Any:
    """The section with its preset's values written out, and its kind.

    Raises:
        ValueError: there is no such preset, or it is of another kind than the section says.
    """
    if not isinstance(section, dict):
        return section
    section = dict(section)
    name = section.pop("preset", None)
    if name is None:
        return {"kind": "unet"} | section
    if str(name) not in PRESETS:
        raise ValueError(f"preset={name!r} is not among {', '.join(PRESETS)}")
    preset = {"kind": "unet"} | PRESETS[str(name)]
    if section.get("kind", preset["kind"]) != preset["kind"]:
        raise ValueError(
            f"preset={name} is of kind={preset['kind']}, but kind={section['kind']} stands beside "
            "it: drop kind"
        )
    return preset | section


NetworkConfig = Annotated[
    UNetConfig | DiTConfig, Field(discriminator="kind"), BeforeValidator(with_preset)
]
