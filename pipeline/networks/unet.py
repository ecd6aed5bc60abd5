"""The U-Net ε_θ(x_t, t, label) of Ho et al. 2020, with scale-and-shift conditioning.

Residual blocks of GroupNorm, SiLU and 3×3 convolutions; the timestep's sinusoidal embedding, plus a
class embedding, goes through an MLP into every block as a scale and a shift (Dhariwal & Nichol
2021, "adaptive group normalisation"); single-head self-attention at chosen resolutions; skip
connections.

Shapes: B batch, C channels, H×W pixels, E embedding.
"""

import math
from typing import Literal

import torch
from pydantic import BaseModel, Field, model_validator
from torch import Tensor, nn
from torch.nn import functional as F


class UNetConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """The shape of the U-Net."""

    kind: Literal["unet"] = "unet"
    base_channels: int = Field(ge=4, multiple_of=4)
    channel_multipliers: list[int] = Field(min_length=1)
    """Channels of each level, in base_channels; the resolution halves from level to level."""
    blocks_per_level: int = Field(default=2, ge=1)
    attention_at: list[int] = []
    """Resolutions (in pixels) at which the blocks are followed by self-attention."""

    @model_validator(mode="after")
    def _multipliers_are_positive(self) -> "UNetConfig":
        if min(self.channel_multipliers) < 1:
            raise ValueError(
                f"channel_multipliers={self.channel_multipliers} must be 1 or more each"
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


def sinusoidal_embedding(t: Tensor, dim: int) -> Tensor:
    """Sines and cosines of t at dim/2 frequencies from 1 to 1/10,000 (Vaswani et al. 2017).

    t: (B,); returns (B, dim) float32. In bfloat16, timesteps above 256 would lose their last digit.
    """
    half = dim // 2
    frequency = torch.exp(-math.log(10_000) * torch.arange(half, device=t.device) / half)
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.cos(), angle.sin()], dim=1)


def group_norm(channels: int) -> nn.GroupNorm:
    """At most 32 groups, of at least 4 channels: groups of one would make a bias before it moot."""
    return nn.GroupNorm(math.gcd(32, channels // 4), channels)


def zero_init(layer: nn.Conv2d) -> nn.Conv2d:
    """The layer with zero weights, so that its residual branch starts as the identity."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


class ResidualBlock(nn.Module):
    def __init__(self, in_channels: int, out_channels: int, embedding_dim: int) -> None:
        super().__init__()
        self.norm1 = group_norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.scale_shift = nn.Linear(embedding_dim, 2 * out_channels)
        self.norm2 = group_norm(out_channels)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = (
            nn.Identity()
            if in_channels == out_channels
            else nn.Conv2d(in_channels, out_channels, 1)
        )

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (B, C, H, W)
        scale, shift = self.scale_shift(embedding)[:, :, None, None].chunk(2, dim=1)
        h = self.norm2(h) * (1 + scale) + shift
        out: Tensor = self.skip(x) + self.conv2(F.silu(h))
        return out


class SelfAttention(nn.Module):
    """One head over the H·W positions: a head of all channels keeps the CPU kernels busy."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = group_norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        qkv = self.qkv(self.norm(x)).reshape(B, 3, C, H * W).transpose(2, 3)  # (B, 3, HW, C)
        q, k, v = (part.unsqueeze(1) for part in qkv.unbind(1))  # (B, 1 head, HW, C)
        h = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = x + self.out(h.squeeze(1).transpose(1, 2).reshape(B, C, H, W))
        return out


class Stage(nn.Module):
    """A residual block, then attention where the resolution asks for it."""

    def __init__(
        self, in_channels: int, out_channels: int, embedding_dim: int, attend: bool
    ) -> None:
        super().__init__()
        self.block = ResidualBlock(in_channels, out_channels, embedding_dim)
        self.attention = SelfAttention(out_channels) if attend else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        out: Tensor = self.attention(self.block(x, embedding))
        return out


class UNet(nn.Module):
    """ε_θ: images of (channels, image_size, image_size) to noise of the same shape.

    Args:
        config: the shape of the network.
        channels: of the image.
        image_size: height and width in pixels.
        num_classes: 0 for an unconditional network; otherwise labels are 0 .. num_classes-1, and
            `num_classes` itself is the null label ∅ of classifier-free guidance.
        out_channels: by default those of the image; twice as many where the variance is learned.
    """

    def __init__(
        self,
        config: UNetConfig,
        channels: int,
        image_size: int,
        num_classes: int,
        out_channels: int | None = None,
    ) -> None:
        super().__init__()
        config.check_image_size(image_size)
        base, E = config.base_channels, 4 * config.base_channels
        self.base_channels = base
        self.num_classes = num_classes
        self.embed_t = nn.Sequential(nn.Linear(base, E), nn.SiLU(), nn.Linear(E, E))
        self.embed_label = nn.Embedding(num_classes + 1, E) if num_classes else None

        self.conv_in = nn.Conv2d(channels, base, 3, padding=1)
        widths = [base]  # of the skip connections, a stack
        width, resolution = base, image_size
        self.down = nn.ModuleList()
        for level, multiplier in enumerate(config.channel_multipliers):
            if level:
                self.down.append(nn.Conv2d(width, width, 3, stride=2, padding=1))
                widths.append(width)
                resolution //= 2
            for _ in range(config.blocks_per_level):
                attend = resolution in config.attention_at
                self.down.append(Stage(width, base * multiplier, E, attend))
                width = base * multiplier
                widths.append(width)

        self.middle = nn.ModuleList([Stage(width, width, E, True), Stage(width, width, E, False)])

        self.up = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(config.channel_multipliers))):
            for _ in range(config.blocks_per_level + 1):
                attend = resolution in config.attention_at
                self.up.append(Stage(width + widths.pop(), base * multiplier, E, attend))
                width = base * multiplier
            if level:
                self.up.append(nn.Conv2d(width, width, 3, padding=1))
                resolution *= 2
        assert not widths

        self.norm_out = group_norm(width)
        self.conv_out = zero_init(nn.Conv2d(width, out_channels or channels, 3, padding=1))

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """ε_θ of x_t (B, C, H, W), t (B,) and label (B,) int64, None if unconditional."""
        embedding = self.embed_t(sinusoidal_embedding(t, self.base_channels))
        if self.embed_label is not None:
            assert label is not None, "a conditional network needs a label a row (∅ = num_classes)"
            embedding = embedding + self.embed_label(label)
        embedding = F.silu(embedding)

        h = self.conv_in(x_t)
        skips = [h]
        for layer in self.down:
            h = layer(h, embedding) if isinstance(layer, Stage) else layer(h)
            skips.append(h)
        for layer in self.middle:
            h = layer(h, embedding)
        for layer in self.up:
            if isinstance(layer, Stage):
                h = layer(torch.cat([h, skips.pop()], dim=1), embedding)
            else:
                h = layer(F.interpolate(h, scale_factor=2, mode="nearest"))
        out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out
