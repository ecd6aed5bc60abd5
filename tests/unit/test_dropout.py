"""Dropout by address: its masks, and that nothing but key, layer and position decides on them."""

import tempfile

import pytest
import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.networks.backbone import Backbone, dropout_keys, set_checkpointing
from pipeline.networks.choice import make_backbone
from pipeline.networks.config import DiTConfig, UNetConfig
from pipeline.networks.dropout import AddressedDropout, dropped, number_layers
from pipeline.networks.monotone import ScheduledNetwork

UNET = UNetConfig(
    base_channels=8, channel_multipliers=[1, 2], attention_at=[4], resample="block", dropout=0.5
)
DIT = DiTConfig(patch_size=2, width=16, depth=2, heads=2, dropout=0.5)
KEYS = torch.tensor([5, -7, 2**62, -(2**63)])


def make(config: UNetConfig | DiTConfig) -> Backbone:
    torch.manual_seed(0)
    network = make_backbone(config, 1, 8, 10)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.1)
    return network


def inputs(rows: int = 4) -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(rows, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    return x, torch.arange(rows) * 200, torch.arange(rows)


def splitmix64(state: int) -> tuple[int, int]:
    """The next state and number, as Steele, Lea & Flood 2014 have them, in Python's integers."""
    state = (state + 0x9E3779B97F4A7C15) % 2**64
    z = state
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ z >> 27) * 0x94D049BB133111EB % 2**64
    return state, z ^ z >> 31


def test_the_masks_are_those_of_splitmix64() -> None:
    # published: the first numbers from 1234567
    assert splitmix64(1234567)[1] == 6457827717110365317
    for key, layer, p in ((0, 0, 0.5), (-3, 2, 0.1), (2**63 - 1, 40, 0.9)):
        state = (key + layer * 0x9E3779B97F4A7C15) % 2**64
        _, state = splitmix64(state)
        state ^= state >> 31 ^ state >> 62  # the last line undone, which masks leave out
        expected = []
        for _ in range(200):
            state, number = splitmix64(state)
            number ^= number >> 31 ^ number >> 62
            expected.append((number + 2**63) % 2**64 < p * 2**64)  # signed, from the lowest
        assert dropped(torch.tensor([key]), layer, 200, p)[0].tolist() == expected


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
def test_a_share_p_is_dropped_in_every_row_layer_and_position(p: float) -> None:
    keys = torch.arange(300)  # neighbours: the worst that keys could be
    masks = torch.stack([dropped(keys, layer, 1000, p) for layer in range(8)]).double()
    for dims in ((1, 2), (0, 2), (0, 1)):
        n = masks.numel() / masks.mean(dims).numel()
        z = (masks.mean(dims) - p) / (p * (1 - p) / n) ** 0.5
        assert z.abs().max() < 5
        assert 0.6 < z.square().mean() < 1.5 or len(z) < 20  # neither too even


def test_rows_layers_and_positions_are_independent() -> None:
    """Of n products of ±1 the sum has the deviation √n; the largest of many sums stays below 6."""
    signs = torch.stack([dropped(torch.arange(200), layer, 2000, 0.5) for layer in range(10)])
    signs = 1 - 2.0 * signs.double()  # (layer, row, position)
    for flat in (signs.transpose(0, 1).flatten(1), signs.flatten(1), signs.flatten(0, 1).T):
        n = flat.shape[1]
        between = (flat @ flat.T / n**0.5).triu(1)
        assert between.abs().max() < 6
    # eight neighbours make a byte; all 256 are as frequent
    bits = (signs < 0).long().reshape(-1, 8)
    counts = torch.bincount((bits << torch.arange(8)).sum(1), minlength=256).double()
    expected = counts.sum() / 256
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - 255) < 6 * (2 * 255) ** 0.5


def test_what_is_kept_is_scaled_and_alone_has_a_gradient() -> None:
    layer = AddressedDropout(0.25)
    x = torch.randn(4, 3, 8, 8, requires_grad=True)
    out = layer(x, KEYS)
    kept = ~dropped(KEYS, 0, 192, 0.25).view(x.shape)
    assert 0 < kept.sum() < kept.numel()
    torch.testing.assert_close(out, torch.where(kept, x / 0.75, 0), rtol=1e-6, atol=0)
    out.sum().backward()
    assert x.grad is not None
    torch.testing.assert_close(x.grad, torch.where(kept, 1 / 0.75, 0.0), rtol=1e-6, atol=0)


def test_the_layout_in_memory_changes_no_mask() -> None:
    layer = AddressedDropout(0.5)
    x = torch.randn(4, 3, 8, 8)
    assert torch.equal(layer(x, KEYS), layer(x.to(memory_format=torch.channels_last), KEYS))


def test_without_training_or_p_it_is_the_identity() -> None:
    x = torch.randn(2, 3)
    assert AddressedDropout(0.5).eval()(x, None) is x
    assert AddressedDropout(0.0)(x, None) is x


def test_training_without_keys_is_refused() -> None:
    network = make(UNET)
    with pytest.raises(AssertionError, match="dropout in training needs keys"):
        network(*inputs())
    with dropout_keys(network, KEYS):
        network(*inputs())
    with pytest.raises(AssertionError, match="dropout in training needs keys"):
        network(*inputs())  # those of a step are not those of the next
    with pytest.raises(AssertionError, match="keys for 3 rows"), dropout_keys(network, KEYS):
        network(*inputs(3))
    network.eval()(*inputs())


@pytest.mark.parametrize("config", [UNET, DIT], ids=["unet", "dit"])
def test_every_dropout_of_a_network_has_a_number_of_its_own(config: UNetConfig | DiTConfig) -> None:
    layers = [m.layer for m in make(config).modules() if isinstance(m, AddressedDropout)]
    assert len(layers) >= 4
    assert layers == list(range(len(layers)))


@pytest.mark.parametrize("config", [UNET, DIT], ids=["unet", "dit"])
def test_a_row_is_dropped_alike_in_any_part_of_the_batch(config: UNetConfig | DiTConfig) -> None:
    network, (x, t, label) = make(config), inputs()
    with dropout_keys(network, KEYS):
        whole = network(x, t, label)
    with dropout_keys(network, KEYS + 1):
        assert not torch.allclose(network(x, t, label), whole, atol=1e-2)
    for rows in (slice(0, 1), slice(1, 4)):
        with dropout_keys(network, KEYS[rows]):
            part = network(x[rows], t[rows], label[rows])
        torch.testing.assert_close(part, whole[rows], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [UNET, DIT], ids=["unet", "dit"])
def test_blocks_computed_again_drop_the_same(config: UNetConfig | DiTConfig) -> None:
    """Even after the keys are gone, and while those of another step are set."""
    network = make(config)
    gradients = []
    for on in (False, True):
        set_checkpointing(network, on)
        network.zero_grad()
        with dropout_keys(network, KEYS):
            out = network(*inputs())
        with dropout_keys(network, KEYS + 1):
            out.square().mean().backward()
        gradients.append([p.grad.clone() for p in network.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(list(network.parameters()))
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_keys_reach_a_network_within_others() -> None:
    network = ScheduledNetwork(make(DIT))
    with dropout_keys(network, KEYS):
        alone = network(*inputs())
    with tempfile.NamedTemporaryFile() as file:
        distributed.init_process_group("gloo", f"file://{file.name}", rank=0, world_size=1)
        try:
            wrapped = DistributedDataParallel(network, find_unused_parameters=True)
            with dropout_keys(wrapped, KEYS):
                out = wrapped(*inputs())
            out.square().mean().backward()
        finally:
            distributed.destroy_process_group()
    assert torch.equal(out, alone)


def test_it_compiles_in_one_piece() -> None:
    layers = nn.ModuleList([AddressedDropout(0.5), AddressedDropout(0.5)])
    number_layers(layers)
    x = torch.randn(4, 30)
    compiled = torch.compile(layers[1], backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x, KEYS), layers[1](x, KEYS))
    assert not torch.equal(compiled(x, KEYS), layers[0](x, KEYS))
