"""The U-Net ε_θ(x_t, t, label) of Ho et al. 2020 and Dhariwal & Nichol 2021 (ADM).

Residual blocks of GroupNorm, SiLU and 3×3 convolutions; the timestep's sinusoidal embedding, plus a
class embedding, goes through an MLP into every block; self-attention at chosen resolutions; skip
connections.

Shapes: B batch, C channels, H×W pixels, E embedding.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.networks.backbone import Backbone, Block
from pipeline.networks.config import UNetConfig
from pipeline.networks.dropout import AddressedDropout, number_layers
from pipeline.networks.embedding import sinusoidal_embedding


def group_norm(channels: int, config: UNetConfig) -> nn.GroupNorm:
    """At least 4 channels a group by default: groups of one would make a bias before it moot."""
    groups = config.norm_groups or math.gcd(32, channels // 4)
    return nn.GroupNorm(groups, channels, config.norm_eps)


def zero_init(layer: nn.Conv2d) -> nn.Conv2d:
    """The layer with zero weights, so that its residual branch starts as the identity."""
    nn.init.zeros_(layer.weight)
    if layer.bias is not None:
        nn.init.zeros_(layer.bias)
    return layer


def half(x: Tensor) -> Tensor:
    return F.avg_pool2d(x, 2)


def double(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


class HalvingConv2d(nn.Conv2d):
    """A 3×3 convolution of stride 2, with zeros only right of the image and below."""

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W), H and W even; gives (B, C, H/2, W/2)."""
        return super().forward(F.pad(x, (0, 1, 0, 1)))


class DoublingConv2d(nn.Conv2d):
    """The image doubled (nearest neighbour), then a 3×3 convolution, in 4/9 of the multiplications.

    Of the nine pixels under the kernel several are copies of one: along an axis, output 2i sees
    x[i-1], x[i], x[i], and output 2i+1 sees x[i], x[i], x[i+1]. That is a transposed convolution of
    stride 2 whose four taps are w_2, w_1 + w_2, w_0 + w_1 and w_0.
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, C, H, W); gives (B, C, 2H, 2W)."""
        weight = self.weight  # (out, in, 3, 3)
        for axis in (2, 3):
            w_0, w_1, w_2 = weight.unbind(axis)
            weight = torch.stack([w_2, w_1 + w_2, w_0 + w_1, w_0], axis)
        return F.conv_transpose2d(x, weight.transpose(0, 1), self.bias, stride=2, padding=1)


class ResidualBlock(nn.Module):
    """Two convolutions beside a skip connection.

    Args:
        resample: `half` or `double`, for a block that leads to another level.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_dim: int,
        config: UNetConfig,
        resample: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.resample = resample
        self.scales = config.conditioning == "scale_shift"
        self.norm1 = group_norm(in_channels, config)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        # a shift alone where nothing is scaled
        self.scale_shift = nn.Linear(embedding_dim, out_channels * (2 if self.scales else 1))
        self.norm2 = group_norm(out_channels, config)
        self.dropout = AddressedDropout(config.dropout)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        self.skip = (
            nn.Identity()
            if in_channels == out_channels
            else nn.Conv2d(in_channels, out_channels, 1)
        )

    def forward(self, x: Tensor, embedding: Tensor, keys: Tensor | None) -> Tensor:
        """x: (B, C, H, W); embedding: (B, E); keys: (B,) of dropout."""
        h = F.silu(self.norm1(x))
        if self.resample is not None:
            x, h = self.resample(x), self.resample(h)
        h = self.conv1(h)
        condition = self.scale_shift(embedding)[:, :, None, None]
        if self.scales:
            scale, shift = condition.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + condition)
        h = self.dropout(F.silu(h), keys)
        out: Tensor = self.skip(x) + self.conv2(h)
        return out


class SelfAttention(nn.Module):
    """Over the H·W positions."""

    def __init__(self, channels: int, config: UNetConfig) -> None:
        super().__init__()
        self.heads = channels // (config.head_channels or channels)
        self.norm = group_norm(channels, config)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.out = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        # as linear layers over positions, since the fused kernels of attention want the channels of
        # a head side by side
        positions = self.norm(x).flatten(2).transpose(1, 2)  # (B, HW, C)
        qkv = F.linear(positions, self.qkv.weight.flatten(1), self.qkv.bias)
        q, k, v = qkv.view(B, H * W, 3, self.heads, C // self.heads).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v)  # (B, heads, HW, C/heads)
        h = h.transpose(1, 2).reshape(B, H * W, C)
        h = F.linear(h, self.out.weight.flatten(1), self.out.bias)
        out: Tensor = x + h.transpose(1, 2).reshape(B, C, H, W)
        return out


class Stage(Block):
    """A residual block, then attention where the resolution asks for it."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        embedding_dim: int,
        config: UNetConfig,
        attend: bool,
    ) -> None:
        super().__init__()
        self.block = ResidualBlock(in_channels, out_channels, embedding_dim, config)
        self.attention = SelfAttention(out_channels, config) if attend else nn.Identity()

    def forward(
        self, x: Tensor, embedding: Tensor, keys: Tensor | None, skip: Tensor | None = None
    ) -> Tensor:
        """x, and skip beside it: (B, C, H, W); embedding: (B, E); keys: (B,) of dropout."""
        if skip is not None:  # here, so that a block computed again need not keep both together
            x = torch.cat([x, skip], dim=1)
        out: Tensor = self.attention(self.block(x, embedding, keys))
        return out


class UNet(Backbone):
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
        self.config = config
        self.num_classes = num_classes
        self.embed_t = nn.Sequential(nn.Linear(base, E), nn.SiLU(), nn.Linear(E, E))
        self.embed_label = nn.Embedding(num_classes + 1, E) if num_classes else None

        self.conv_in = nn.Conv2d(channels, base, 3, padding=1)
        widths = [base]  # of the skip connections, a stack
        width, resolution = base, image_size
        self.down = nn.ModuleList()
        for level, multiplier in enumerate(config.channel_multipliers):
            if level:
                self.down.append(self._halving(width, E))
                widths.append(width)
                resolution //= 2
            for _ in range(config.blocks_per_level):
                attend = resolution in config.attention_at
                self.down.append(Stage(width, base * multiplier, E, config, attend))
                width = base * multiplier
                widths.append(width)

        self.middle = nn.ModuleList(
            [Stage(width, width, E, config, attend) for attend in (True, False)]
        )

        self.up = nn.ModuleList()
        for level, multiplier in reversed(list(enumerate(config.channel_multipliers))):
            for _ in range(config.blocks_per_level + 1):
                attend = resolution in config.attention_at
                self.up.append(Stage(width + widths.pop(), base * multiplier, E, config, attend))
                width = base * multiplier
            if level:
                self.up.append(
                    ResidualBlock(width, width, E, config, double)
                    if config.resample == "block"
                    else DoublingConv2d(width)
                )
                resolution *= 2
        assert not widths

        self.norm_out = group_norm(width, config)
        self.conv_out = zero_init(nn.Conv2d(width, out_channels or channels, 3, padding=1))
        number_layers(self)

    def _halving(self, width: int, embedding_dim: int) -> nn.Module:
        config = self.config
        if config.resample == "block":
            return ResidualBlock(width, width, embedding_dim, config, half)
        if config.halving_padding == "after":
            return HalvingConv2d(width)
        return nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """ε_θ of x_t (B, C, H, W), t (B,) and label (B,) int64, None if unconditional."""
        config = self.config
        embedding = self.embed_t(
            sinusoidal_embedding(
                t, config.base_channels, config.sines_first, config.frequency_shift
            )
        )
        if self.embed_label is not None:
            assert label is not None, "a conditional network needs a label a row (∅ = num_classes)"
            embedding = embedding + self.embed_label(label)
        embedding = F.silu(embedding)

        keys = self.row_keys
        h = self.conv_in(x_t)
        skips = [h]
        for layer in self.down:
            plain = isinstance(layer, nn.Conv2d)
            h = layer(h) if plain else self.run(layer, h, embedding, keys)
            skips.append(h)
        for layer in self.middle:
            h = self.run(layer, h, embedding, keys)
        for layer in self.up:
            if isinstance(layer, DoublingConv2d):
                h = layer(h)
            elif isinstance(layer, Stage):
                h = self.run(layer, h, embedding, keys, skips.pop())
            else:
                h = self.run(layer, h, embedding, keys)
        out: Tensor = self.conv_out(F.silu(self.norm_out(h)))
        return out
