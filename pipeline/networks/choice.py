"""The network that a config names."""

from pipeline.networks.backbone import Backbone
from pipeline.networks.config import DiTConfig, UNetConfig
from pipeline.networks.dit import DiT
from pipeline.networks.unet import UNet


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
