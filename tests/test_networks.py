"""The U-Net: shapes, conditioning, and what it refuses."""

import pytest
import torch
from torch.nn import functional as F

from pipeline.networks.unet import UNet, UNetConfig, sinusoidal_embedding


def make(channels: int = 1, size: int = 8, num_classes: int = 0, **values: object) -> UNet:
    config = {"base_channels": 8, "channel_multipliers": [1, 2], "attention_at": [4]} | values
    torch.manual_seed(0)
    network = UNet(UNetConfig(**config), channels, size, num_classes)  # type: ignore[arg-type]
    torch.nn.init.normal_(network.conv_out.weight)  # it starts at zero, which would hide everything
    return network.eval()


@pytest.mark.parametrize(
    ("channels", "size", "values"),
    [
        (1, 8, {}),
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


def test_time_and_label_reach_the_output() -> None:
    network = make(num_classes=10)
    for module in network.modules():  # branches that start at zero
        if isinstance(module, torch.nn.Conv2d):
            torch.nn.init.normal_(module.weight, std=0.1)
    x = torch.randn(1, 1, 8, 8).expand(3, -1, -1, -1)
    out = network(x, torch.tensor([10, 500, 10]), torch.tensor([3, 3, 10]))
    assert not torch.allclose(out[0], out[1])
    assert not torch.allclose(out[0], out[2])


def test_every_parameter_gets_a_gradient() -> None:
    """None may hang loose: data-parallel training would wait for it for ever."""
    network = make(num_classes=10).train()
    for parameter in network.parameters():  # zero-initialised layers let nothing through
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.1)
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


def test_a_size_the_levels_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"image_size=10 is not a multiple of 4"):
        make(size=10, channel_multipliers=[1, 2, 2])


def test_attention_at_a_resolution_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"attention_at=\[5\] is not among .* \[8, 4\]"):
        make(attention_at=[5])
