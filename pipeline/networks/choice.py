"""Which network: its kind, and the published sizes by name.

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

from typing import Annotated, Any

from pydantic import BeforeValidator, Field

from pipeline.networks.backbone import Backbone
from pipeline.networks.dit import DiT, DiTConfig
from pipeline.networks.unet import UNet, UNetConfig

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


def make_backbone(
    config: UNetConfig | DiTConfig,
    channels: int,
    image_size: int,
    num_classes: int,
    out_channels: int | None = None,
) -> Backbone:
    """The network of a config, with weights of its own; the arguments are those of UNet and DiT."""
    if isinstance(config, DiTConfig):
        return DiT(config, channels, image_size, num_classes, out_channels)
    return UNet(config, channels, image_size, num_classes, out_channels)
