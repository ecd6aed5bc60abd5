"""The diffusion transformer: shapes, patches, conditioning, and what it refuses."""

from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from pipeline.networks.config import DiTConfig
from pipeline.networks.dit import DiT
from pipeline.networks.embedding import grid_embedding

SMALL = {"patch_size": 2, "width": 16, "depth": 2, "heads": 2}


def make(
    channels: int = 1, size: int = 8, num_classes: int = 0, out: int | None = None, **values: Any
) -> DiT:
    torch.manual_seed(0)
    return DiT(DiTConfig(**(SMALL | values)), channels, size, num_classes, out).eval()


def wake(network: DiT) -> DiT:
    """With weights in what starts at zero, which lets nothing through."""
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return network


@pytest.mark.parametrize(
    ("channels", "size", "out", "values"),
    [
        (1, 8, None, {}),
        (3, 8, 6, {"patch_size": 4, "heads": 4, "mlp_ratio": 2.5}),
        (3, 12, None, {"patch_size": 3, "depth": 1}),
    ],
)
def test_output_has_the_shape_of_the_input(
    channels: int, size: int, out: int | None, values: dict[str, Any]
) -> None:
    x = torch.randn(2, channels, size, size)
    y = make(channels, size, out=out, **values)(x, torch.tensor([0, 999]))
    assert y.shape == (2, out or channels, size, size)


def test_an_untrained_network_predicts_zero() -> None:
    network = make(num_classes=10)
    assert (
        network(torch.randn(2, 1, 8, 8), torch.tensor([0, 1]), torch.tensor([0, 10])) == 0
    ).all()


def test_untrained_blocks_are_the_identity() -> None:
    """adaLN-Zero: a patch of the output depends on the same patch of the input, and no other."""
    network = make()
    nn.init.normal_(network.out.weight)
    x = torch.randn(1, 1, 8, 8)
    changed = x.clone()
    changed[0, 0, 2, 5] += 1  # of the patch in row 1, column 2
    t = torch.tensor([100])
    different = (network(x, t) != network(changed, t))[0, 0]
    expected = torch.zeros(8, 8, dtype=torch.bool)
    expected[2:4, 4:6] = True
    assert torch.equal(different, expected)


def test_awake_every_patch_sees_every_other() -> None:
    network = wake(make())
    x = torch.randn(1, 1, 8, 8)
    changed = x.clone()
    changed[0, 0, 2, 5] += 1
    t = torch.tensor([100])
    different = (network(x, t) - network(changed, t)).abs()[0, 0]
    assert (F.max_pool2d(different[None], 2) > 1e-6).all()


def test_attention_is_that_of_torch() -> None:
    block = wake(make(heads=4)).blocks[0]
    peer = nn.MultiheadAttention(16, 4, batch_first=True)
    names = {"in_proj_weight": block.qkv.weight, "in_proj_bias": block.qkv.bias}
    names |= {"out_proj.weight": block.out.weight, "out_proj.bias": block.out.bias}
    peer.load_state_dict(names)
    x = torch.randn(3, 5, 16)
    torch.testing.assert_close(block._attention(x), peer(x, x, x, need_weights=False)[0])


def test_tokens_are_put_where_their_patches_were() -> None:
    network = make(3, 12, patch_size=3)
    tokens = torch.randn(2, 16, 27)
    image = network._image(tokens)
    by_channel = tokens.view(2, 16, 9, 3).transpose(2, 3).reshape(2, 16, 27)
    folded = F.fold(by_channel.transpose(1, 2), output_size=12, kernel_size=3, stride=3)
    assert torch.equal(image, folded)


def test_places_are_told_apart_by_row_and_column() -> None:
    place = grid_embedding(8, 16)
    assert place.shape == (64, 16)
    products = (place @ place.T).view(8, 8, 8, 8)
    # of sines and cosines: a product depends on the distance along each axis alone, and is the
    # largest at home
    torch.testing.assert_close(products[0, 0, 2, 3], products[4, 1, 6, 4])
    torch.testing.assert_close(products[0, 0, 2, 3], products[2, 5, 0, 2])
    assert (products.flatten(0, 1).flatten(1).argmax(1) == torch.arange(64)).all()


def test_time_label_and_place_reach_the_output() -> None:
    network = wake(make(num_classes=10))
    x = torch.randn(1, 1, 2, 2).repeat(3, 1, 4, 4)  # the same patch everywhere
    out = network(x, torch.tensor([10, 500, 10]), torch.tensor([3, 3, 10]))
    assert not torch.allclose(out[0], out[1])
    assert not torch.allclose(out[0], out[2])
    assert not torch.allclose(out[0, :, :2, :2], out[0, :, :2, 2:4])


def test_neighbouring_timesteps_differ_in_bfloat16() -> None:
    network = wake(make())
    x = torch.randn(1, 1, 8, 8).expand(2, -1, -1, -1)
    with torch.autocast("cpu", torch.bfloat16):
        out = network(x, torch.tensor([750, 751]))
    assert not torch.equal(out[0], out[1])


def test_every_parameter_gets_a_gradient() -> None:
    """None may hang loose: data-parallel training would wait for it for ever."""
    network = wake(make(num_classes=10)).train()
    x = torch.randn(11, 1, 8, 8)
    out = network(x, torch.arange(11) * 90, torch.arange(11))
    F.mse_loss(out, torch.randn_like(x)).backward()
    largest = {name: p.grad.abs().max() for name, p in network.named_parameters()}
    idle = [name for name, value in largest.items() if value < 1e-5 * max(largest.values())]
    assert idle == []


def test_the_places_are_no_weights() -> None:
    assert not [name for name in make().state_dict() if "place" in name]


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"patch_size": 3}, "image_size=8 is not a multiple of network.patch_size=3"),
        ({"heads": 3}, "width=16 must be a multiple of heads=3"),
    ],
)
def test_a_shape_that_does_not_divide_is_refused(values: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        make(**values)
