"""The U-Net, the published sizes, and the section `network` of a config."""

import hashlib
import re
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from torch import nn
from torch.nn import functional as F

from pipeline.config import load_config
from pipeline.errors import ConfigError
from pipeline.networks.backbone import Backbone, set_checkpointing
from pipeline.networks.choice import make_backbone
from pipeline.networks.config import PRESETS, DiTConfig, NetworkConfig, UNetConfig
from pipeline.networks.embedding import sinusoidal_embedding
from pipeline.networks.unet import (
    DoublingConv2d,
    HalvingConv2d,
    ResidualBlock,
    SelfAttention,
    UNet,
    double,
    half,
)
from pipeline.samplers.model import ModelSpec
from tests import needs
from tests.conftest import ROOT

DIGITS = str(ROOT / "configs" / "digits.yaml")
VARIANTS: list[dict[str, Any]] = [
    {},
    {"conditioning": "add"},
    {"head_channels": 4},
    {"resample": "block"},
    {"conditioning": "add", "head_channels": 2, "resample": "block", "blocks_per_level": 1},
    {"halving_padding": "after", "sines_first": True, "frequency_shift": 1, "norm_groups": 2},
]


def make(channels: int = 1, size: int = 8, num_classes: int = 0, **values: object) -> UNet:
    config = {"base_channels": 8, "channel_multipliers": [1, 2], "attention_at": [4]} | values
    torch.manual_seed(0)
    network = UNet(UNetConfig(**config), channels, size, num_classes)  # type: ignore[arg-type]
    nn.init.normal_(network.conv_out.weight)  # it starts at zero, which would hide everything
    return network.eval()


@pytest.mark.parametrize(
    ("channels", "size", "values"),
    [
        *((1, 8, variant) for variant in VARIANTS),
        (3, 16, {"channel_multipliers": [1, 2, 2], "blocks_per_level": 1, "attention_at": [4, 8]}),
        (3, 12, {"channel_multipliers": [1], "attention_at": []}),
    ],
)
def test_output_has_the_shape_of_the_input(
    channels: int, size: int, values: dict[str, object]
) -> None:
    network = make(channels, size, **values)
    x = torch.randn(2, channels, size, size)
    assert network(x, torch.tensor([0, 999])).shape == x.shape


def test_an_untrained_network_predicts_zero() -> None:
    """The last convolution starts at zero, so that training starts from a loss of 1."""
    network = UNet(UNetConfig(base_channels=8, channel_multipliers=[1]), 1, 8, 0)
    assert (network(torch.randn(2, 1, 8, 8), torch.tensor([0, 1])) == 0).all()


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_time_and_label_reach_the_output(variant: dict[str, Any]) -> None:
    network = make(num_classes=10, **variant)
    for module in network.modules():  # branches that start at zero
        if isinstance(module, nn.Conv2d):
            nn.init.normal_(module.weight, std=0.1)
    x = torch.randn(1, 1, 8, 8).expand(3, -1, -1, -1)
    out = network(x, torch.tensor([10, 500, 10]), torch.tensor([3, 3, 10]))
    assert not torch.allclose(out[0], out[1])
    assert not torch.allclose(out[0], out[2])


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_every_parameter_gets_a_gradient(variant: dict[str, Any]) -> None:
    """None may hang loose: data-parallel training would wait for it for ever."""
    network = make(num_classes=10, **variant).train()
    for parameter in network.parameters():  # zero-initialised layers let nothing through
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    x = torch.randn(11, 1, 8, 8)
    out = network(x, torch.arange(11) * 90, torch.arange(11))
    F.mse_loss(out, torch.randn_like(x)).backward()
    largest = {name: p.grad.abs().max() for name, p in network.named_parameters()}
    # a parameter without effect has a gradient of rounding errors
    idle = [name for name, value in largest.items() if value < 1e-5 * max(largest.values())]
    assert idle == []


def test_the_sinusoidal_embedding_tells_neighbours_apart_in_any_precision() -> None:
    t = torch.tensor([750, 751])
    embedding = sinusoidal_embedding(t, 32)
    assert embedding.dtype == torch.float32
    assert embedding.shape == (2, 32)
    assert not torch.allclose(embedding[0], embedding[1], atol=1e-2)
    assert sinusoidal_embedding(torch.tensor([0]), 4).tolist() == [[1, 1, 0, 0]]


def test_the_embedding_of_ho_et_al_has_sines_first_and_ends_at_a_frequency_of_1_in_10_000() -> None:
    t = torch.tensor([3, 750])
    got = sinusoidal_embedding(t, 8, sines_first=True, shift=1)
    angle = t.double()[:, None] * 10_000.0 ** -(torch.arange(4, dtype=torch.float64) / 3)
    torch.testing.assert_close(
        got.double(), torch.cat([angle.sin(), angle.cos()], 1), atol=1e-4, rtol=0
    )


def test_a_halving_convolution_sees_zeros_only_after_the_image() -> None:
    layer, x = HalvingConv2d(1), torch.zeros(1, 1, 4, 4)
    nn.init.ones_(layer.weight)
    nn.init.zeros_(layer.bias)
    x[0, 0, 0, 0] = 1  # under the kernel of the first output alone
    x[0, 0, 3, 3] = 2  # of the last alone
    assert layer(x).tolist() == [[[[1, 0], [0, 2]]]]


def test_groups_that_do_not_divide_a_layer_are_refused() -> None:
    with pytest.raises(ValueError, match="norm_groups=3 must divide base_channels=8"):
        make(norm_groups=3)


def test_norms_have_the_groups_and_the_eps_of_the_config() -> None:
    def norms(**values: object) -> set[tuple[int, int, float]]:
        layers = make(attention_at=[], **values).modules()
        found = [layer for layer in layers if isinstance(layer, nn.GroupNorm)]
        return {(layer.num_channels, layer.num_groups, layer.eps) for layer in found}

    assert norms() == {(8, 2, 1e-5), (16, 4, 1e-5), (24, 2, 1e-5), (32, 8, 1e-5)}
    widths = (8, 16, 24, 32)
    assert norms(norm_groups=4, norm_eps=1e-6) == {(width, 4, 1e-6) for width in widths}


def test_a_setting_that_came_later_does_not_change_the_digest_of_a_model() -> None:
    """It is taken of what has not its default."""
    config = UNetConfig(base_channels=8, channel_multipliers=[1, 2])
    given = {"base_channels": 8, "channel_multipliers": [1, 2]}
    assert config.model_dump(exclude_defaults=True) == given


def test_a_size_the_levels_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"image_size=10 is not a multiple of 4"):
        make(size=10, channel_multipliers=[1, 2, 2])


def test_attention_at_a_resolution_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attention_at=\[5\] is not among .* \[8, 4\]"):
        make(attention_at=[5])


def test_a_doubling_convolution_is_the_doubled_image_convolved() -> None:
    layer, x = DoublingConv2d(4).double(), torch.randn(2, 4, 3, 5, dtype=torch.float64)
    plain = F.conv2d(double(x), layer.weight, layer.bias, padding=1)
    torch.testing.assert_close(layer(x), plain, rtol=0, atol=1e-12)


def test_heads_that_do_not_divide_a_level_with_attention_are_refused() -> None:
    with pytest.raises(ValueError, match="head_channels=3 does not divide the 16 channels"):
        make(head_channels=3)
    with pytest.raises(ValueError, match="head_channels=16 does not divide the 8 channels"):
        make(head_channels=16, attention_at=[8])
    make(head_channels=16, attention_at=[])  # the middle has 16


def test_the_default_network_is_that_of_checkpoints_from_before_the_other_settings() -> None:
    config = load_config(DIGITS, ["network.base_channels=32"]).network
    assert isinstance(config, UNetConfig)
    older = {name: getattr(config, name) for name in list(UNetConfig.model_fields)[:5]}
    spec = {"network": older, "diffusion": {}, "channels": 1, "image_size": 8, "class_names": ["a"]}
    network = ModelSpec.model_validate(spec).make_network()
    lines = "".join(f"{name} {tuple(w.shape)}\n" for name, w in network.state_dict().items())
    digest = hashlib.sha256(lines.encode()).hexdigest()
    assert digest == "4a78c52dfac60b731b2a218ed29203a863860bf7a82496ba4ea0014f057245ae", lines


def test_attention_is_that_of_torch_with_as_many_heads() -> None:
    config = UNetConfig(base_channels=32, channel_multipliers=[1], head_channels=8)
    ours = SelfAttention(32, config)
    nn.init.normal_(ours.out.weight, std=0.1)
    peer = nn.MultiheadAttention(32, 4, batch_first=True)
    peer.load_state_dict(
        {
            "in_proj_weight": ours.qkv.weight[:, :, 0, 0],
            "in_proj_bias": ours.qkv.bias,
            "out_proj.weight": ours.out.weight[:, :, 0, 0],
            "out_proj.bias": ours.out.bias,
        }
    )
    x = torch.randn(2, 32, 3, 5)
    tokens = ours.norm(x).flatten(2).transpose(1, 2)
    expected = peer(tokens, tokens, tokens, need_weights=False)[0].transpose(1, 2).view(x.shape)
    torch.testing.assert_close(ours(x), x + expected)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
@pytest.mark.parametrize("conditioning", ["scale_shift", "add"])
@pytest.mark.parametrize("resample", [None, half, double])
def test_a_residual_block_is_that_of_diffusers(conditioning: Any, resample: Any) -> None:
    resnet = needs.package("diffusers.models.resnet", "diffusers")
    config = UNetConfig(base_channels=4, channel_multipliers=[1], conditioning=conditioning)
    ours = ResidualBlock(32, 64, 16, config, resample).eval()
    nn.init.normal_(ours.conv2.weight, std=0.1)
    # its time embedding goes through a SiLU of its own
    peer = resnet.ResnetBlock2D(
        in_channels=32,
        out_channels=64,
        temb_channels=16,
        groups=ours.norm1.num_groups,
        groups_out=ours.norm2.num_groups,
        eps=1e-5,
        time_embedding_norm="default" if conditioning == "add" else "scale_shift",
        down=resample is half,
        up=resample is double,
    ).eval()
    names = {"scale_shift": "time_emb_proj", "skip": "conv_shortcut"}
    weights = {
        re.sub(r"^\w+", lambda m: names.get(m[0], m[0]), k): v for k, v in ours.state_dict().items()
    }
    peer.load_state_dict(weights)
    x, embedding = torch.randn(2, 32, 8, 8), torch.randn(2, 16)
    torch.testing.assert_close(ours(x, F.silu(embedding), None), peer(x, embedding))


def num_parameters(preset: str, channels: int, size: int, classes: int, out: int) -> int:
    config = TypeAdapter[Any](NetworkConfig).validate_python({"preset": preset})
    with torch.device("meta"):
        network = make_backbone(config, channels, size, classes, out)
    return sum(parameter.numel() for parameter in network.parameters())


@pytest.mark.parametrize(
    ("preset", "channels", "size", "classes", "out", "published"),
    [
        # counted in google/ddpm-cifar10-32 and google/ddpm-celebahq-256
        ("ddpm_cifar10", 3, 32, 0, 3, 35_746_307),
        ("ddpm_256", 3, 256, 0, 3, 113_673_219),
        # Dhariwal & Nichol 2021, in millions
        ("adm_64", 3, 64, 1000, 6, 296),
        ("adm_256", 3, 256, 1000, 6, 554),
        # Peebles & Xie 2023, in millions
        ("dit_s_2", 4, 32, 1000, 8, 33),
        ("dit_b_2", 4, 32, 1000, 8, 130),
        ("dit_l_2", 4, 32, 1000, 8, 458),
        ("dit_xl_2", 4, 32, 1000, 8, 675),
        # what the authors' code counts, less the places (256 tokens), which it has as a parameter
        ("dit_xl_2", 4, 32, 1000, 8, 675_129_632 - 256 * 1152),
    ],
)
def test_a_preset_has_the_published_number_of_parameters(
    preset: str, channels: int, size: int, classes: int, out: int, published: int
) -> None:
    number = num_parameters(preset, channels, size, classes, out)
    assert (number if published > 1000 else round(number / 1e6)) == published


@pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers")
def test_the_ddpm_of_diffusers_has_the_same_number_of_parameters() -> None:
    diffusers = needs.package("diffusers", "diffusers")
    plain, attending = ("DownBlock2D", "UpBlock2D"), ("AttnDownBlock2D", "AttnUpBlock2D")
    blocks = [plain, attending, plain, plain]
    with torch.device("meta"):
        peer = diffusers.UNet2DModel(
            sample_size=32,
            layers_per_block=2,
            block_out_channels=(128, 256, 256, 256),
            down_block_types=tuple(down for down, _ in blocks),
            up_block_types=tuple(up for _, up in reversed(blocks)),
        )
    expected = sum(parameter.numel() for parameter in peer.parameters())
    assert num_parameters("ddpm_cifar10", 3, 32, 0, 3) == expected


@pytest.mark.parametrize("preset", PRESETS)
def test_a_preset_is_written_out_in_the_config(preset: str) -> None:
    size = ["data.image_size=64", "evaluation.samples=8"]
    config = load_config(DIGITS, [f"network={{preset: {preset}, dropout: 0.3}}", *size])
    written = config.network.model_dump()
    assert "preset" not in written
    assert written.items() >= (PRESETS[preset] | {"dropout": 0.3}).items()
    assert load_config(DIGITS, [f"network={written}".replace("None", "null"), *size]) == config


@pytest.mark.parametrize(
    ("network", "sentence"),
    [
        ("{preset: ddpm}", "network: preset='ddpm' is not among ddpm_cifar10, ddpm_256, adm_64,"),
        ("{preset: [1]}", "network: preset=[1] is not among ddpm_cifar10,"),
        ("{preset: dit_s_2, kind: unet}", "preset=dit_s_2 is of kind=dit, but kind=unet stands"),
        ("{preset: dit_s_2, base_channels: 8}", "network.base_channels=8 has no meaning for "),
        ("{preset: dit_s_2, heads: 7}", "network: width=384 must be a multiple of heads=7"),
        (
            "{preset: dit_s_2, hedas: 6}",
            "network.hedas is not a known key; did you mean network.he",
        ),
        ("{preset: dit_s_8, depth: 0}", "network.depth=0 is wrong: should be greater than or"),
        ("{presett: dit_s_2}", "network.presett is not a known key; did you mean network.preset?"),
        ("{kind: vit}", "network.kind='vit' is wrong: should be 'unet' or 'dit'"),
        ("{preset: dit_s_2, dropout: 1}", "network.dropout=1 is wrong: should be less than 1"),
        ("{preset: dit_s_2, patch_size: 3}", "data.image_size=8 is not a multiple of network.pat"),
        ("3", "network=3 is wrong: should be a section with keys of its own"),
    ],
)
def test_a_mistake_in_the_section_is_one_sentence(network: str, sentence: str) -> None:
    with pytest.raises(ConfigError) as error:
        load_config(DIGITS, [f"network={network}"])
    assert sentence in str(error.value).splitlines()[-1 if "presett" in network else 0]


@pytest.mark.parametrize(
    "config",
    [
        UNetConfig(base_channels=8, channel_multipliers=[1, 2], attention_at=[4]),
        UNetConfig(base_channels=8, channel_multipliers=[1, 2], resample="block"),
        DiTConfig(patch_size=2, width=16, depth=2, heads=2),
    ],
    ids=["conv", "block", "dit"],
)
def test_blocks_computed_again_give_the_same_gradients(config: UNetConfig | DiTConfig) -> None:
    torch.manual_seed(0)
    network = make_backbone(config, 1, 8, 10)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    x, t, label = torch.randn(4, 1, 8, 8), torch.arange(4) * 200, torch.arange(4)
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    for module in network.modules():
        if isinstance(module, ResidualBlock) or module in getattr(network, "blocks", ()):
            module.register_forward_pre_hook(count)

    def step(network: Backbone) -> tuple[int, list[torch.Tensor]]:
        nonlocal calls
        calls = 0
        network.zero_grad()
        network(x, t, label).square().mean().backward()
        return calls, [p.grad.clone() for p in network.parameters() if p.grad is not None]

    once, gradients = step(network)
    set_checkpointing(network, True)
    twice, again = step(network)
    assert twice == 2 * once > 0
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))
    with torch.no_grad():  # there is no backward pass to keep anything for
        calls = 0
        network(x, t, label)
    assert calls == once
