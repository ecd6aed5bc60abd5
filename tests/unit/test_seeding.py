"""Addressed randomness: who asks, in which order, has no part in the answer."""

import numpy as np
import pytest
import torch

from pipeline.seeding import key, normal, permutation, uniform


def test_every_part_of_an_address_matters() -> None:
    addresses = [
        (0, "a"),
        (1, "a"),
        (0, "b"),
        (0, "a", 0),
        (0, "a", 1),
        (0, "a", 0, 1),
        (0, "a", 1, 0),
    ]
    keys = {key(seed, what, *counters) for seed, what, *counters in addresses}
    assert len(keys) == len(addresses)
    assert all(0 <= k < 2**64 for k in keys)


def test_keys_stay_what_they_are() -> None:
    """A change here would change every image that was ever made."""
    assert key(0, "noise", 1, 2) == 16412390301497831799
    z = normal([16412390301497831799], (3,))[0]
    assert z.tolist() == pytest.approx([0.6641317, -0.2470561, -2.2133079], abs=1e-6)


def test_a_row_of_noise_does_not_know_its_neighbours() -> None:
    keys = [key(0, "noise", i) for i in range(5)]
    together = normal(keys, (3, 8, 8))
    for row, k in zip(together, keys, strict=True):
        assert torch.equal(row, normal([k], (3, 8, 8))[0])


def test_all_64_bits_of_a_key_count() -> None:
    """torch's own CPU generator would give the same noise for keys that differ above bit 31."""
    low = 12345
    high = low + 2**40
    assert not torch.equal(normal([low], (8,)), normal([high], (8,)))
    same = [torch.randn(8, generator=torch.Generator().manual_seed(k)) for k in (low, high)]
    assert torch.equal(*same), "torch has mended its generator: say so in pipeline/seeding.py"


def test_noise_is_standard_normal() -> None:
    z = normal([key(0, "law", i) for i in range(100)], (1000,), torch.float64)
    assert z.mean().abs() < 5 / 100_000**0.5
    assert (z.var() - 1).abs() < 5 * (2 / 100_000) ** 0.5
    inside = (z.abs() < 1).double().mean().item()
    assert inside == pytest.approx(0.6827, abs=0.0075)


def test_uniform_is_uniform_and_below_one() -> None:
    values = np.array([uniform(key(0, "u", i)) for i in range(10_000)])
    assert uniform(2**64 - 1) < 1.0
    assert uniform(0) == 0.0
    counts, _ = np.histogram(values, bins=10, range=(0, 1))
    assert ((counts - 1000) ** 2 / 1000).sum() < 33.7  # χ² with 9 degrees, p = 1e-4


def test_a_permutation_is_one_and_belongs_to_its_key() -> None:
    order = permutation(key(0, "order", 0), 100)
    assert sorted(order) == list(range(100))
    assert np.array_equal(order, permutation(key(0, "order", 0), 100))
    assert not np.array_equal(order, permutation(key(0, "order", 1), 100))
