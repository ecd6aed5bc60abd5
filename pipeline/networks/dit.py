"""The diffusion transformer ε_θ(x_t, t, label) of Peebles & Xie 2023 (DiT), on pixels.

The image is cut into patches, each a token; blocks of self-attention and an MLP follow. The
timestep and the class scale, shift and gate every block (section 3.2, "adaLN-Zero"): at first all
gates are closed, so that every block is the identity, and the last layer says 0.

Shapes: B batch, N tokens, D width, p patch size, C channels, H×W pixels.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.networks.backbone import Backbone, Block
from pipeline.networks.config import DiTConfig
from pipeline.networks.dropout import AddressedDropout, number_layers
from pipeline.networks.embedding import grid_embedding, sinusoidal_embedding

TIME_DIM = 256
"""Of the timestep's sines and cosines."""


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """x (B, N, D), scaled and shifted by (B, 1, D) each."""
    return x * (1 + scale) + shift


class TransformerBlock(Block):
    """Self-attention, then an MLP, each with adaLN-Zero."""

    def __init__(self, config: DiTConfig) -> None:
        super().__init__()
        D, hidden = config.width, int(config.width * config.mlp_ratio)
        self.heads = config.heads
        self.norm1 = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.qkv = nn.Linear(D, 3 * D)
        self.out = nn.Linear(D, D)
        self.dropout1 = AddressedDropout(config.dropout)
        self.norm2 = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.mlp = nn.Sequential(
            nn.Linear(D, hidden), nn.GELU(approximate="tanh"), nn.Linear(hidden, D)
        )
        self.dropout2 = AddressedDropout(config.dropout)
        self.modulation = nn.Linear(D, 6 * D)

    def forward(self, x: Tensor, condition: Tensor, keys: Tensor | None) -> Tensor:
        """x: (B, N, D); condition: (B, D); keys: (B,) of dropout."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (
            self.modulation(condition).unsqueeze(1).chunk(6, dim=2)
        )
        h = self._attention(modulate(self.norm1(x), shift1, scale1))
        x = x + gate1 * self.dropout1(h, keys)
        h = self.mlp(modulate(self.norm2(x), shift2, scale2))
        out: Tensor = x + gate2 * self.dropout2(h, keys)
        return out

    def _attention(self, x: Tensor) -> Tensor:
        B, N, D = x.shape
        qkv = self.qkv(x).view(B, N, 3, self.heads, D // self.heads)
        q, k, v = qkv.transpose(1, 3).unbind(2)  # (B, heads, N, D/heads)
        h = F.scaled_dot_product_attention(q, k, v)
        out: Tensor = self.out(h.transpose(1, 2).reshape(B, N, D))
        return out


class DiT(Backbone):
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
        config: DiTConfig,
        channels: int,
        image_size: int,
        num_classes: int,
        out_channels: int | None = None,
    ) -> None:
        super().__init__()
        config.check_image_size(image_size)
        p, D = config.patch_size, config.width
        self.patch_size = p
        self.embed_patch = nn.Conv2d(channels, D, p, stride=p)
        place = grid_embedding(image_size // p, D)
        self.register_buffer("place", place, persistent=False)  # a constant, not a weight
        self.embed_t = nn.Sequential(nn.Linear(TIME_DIM, D), nn.SiLU(), nn.Linear(D, D))
        self.embed_label = nn.Embedding(num_classes + 1, D) if num_classes else None
        self.blocks = nn.ModuleList([TransformerBlock(config) for _ in range(config.depth)])
        self.norm_out = nn.LayerNorm(D, elementwise_affine=False, eps=1e-6)
        self.modulation_out = nn.Linear(D, 2 * D)
        self.out = nn.Linear(D, p * p * (out_channels or channels))
        number_layers(self)
        self._initialise()

    def _initialise(self) -> None:
        """As published: Xavier's uniform weights, small embeddings, zero gates and output."""
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Conv2d):
                nn.init.xavier_uniform_(module.weight.flatten(1))
                assert module.bias is not None
                nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
        for module in self.embed_t:
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, TransformerBlock):
                nn.init.zeros_(module.modulation.weight)
        nn.init.zeros_(self.modulation_out.weight)
        nn.init.zeros_(self.out.weight)

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """ε_θ of x_t (B, C, H, W), t (B,) and label (B,) int64, None if unconditional."""
        condition = self.embed_t(sinusoidal_embedding(t, TIME_DIM))
        if self.embed_label is not None:
            assert label is not None, "a conditional network needs a label a row (∅ = num_classes)"
            condition = condition + self.embed_label(label)
        condition = F.silu(condition)  # (B, D)

        h = self.embed_patch(x_t).flatten(2).transpose(1, 2) + self.place  # (B, N, D)
        for block in self.blocks:
            h = self.run(block, h, condition, self.row_keys)
        shift, scale = self.modulation_out(condition).unsqueeze(1).chunk(2, dim=2)
        return self._image(self.out(modulate(self.norm_out(h), shift, scale)))

    def _image(self, tokens: Tensor) -> Tensor:
        """(B, N, p²C) put together as (B, C, H, W)."""
        B, N, _ = tokens.shape
        side, p = round(N**0.5), self.patch_size
        patches = tokens.view(B, side, side, p, p, -1)
        return torch.einsum("bhwpqc->bchpwq", patches).reshape(B, -1, side * p, side * p)
