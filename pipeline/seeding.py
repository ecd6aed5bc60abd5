"""The only place where randomness is derived: addressed, not streamed.

A random number belongs to an address (seed, what it is for, counters such as step and index), so
it can be drawn again by anyone, in any order, on any number of workers (promise P2).

Noise comes from Philox (Salmon et al. 2011), keyed with all 64 bits of the address. `torch`'s CPU
generator is not used for this: it keeps only the low 32 bits of a seed, so among 100,000 images
two would be expected to share their noise.
"""

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:  # those who preprocess images need keys, and no torch
    import torch
    from torch import Tensor


def key(seed: int, what: str, *counters: int) -> int:
    """The 64-bit seed that belongs to the address (seed, what, counters)."""
    address = "/".join((str(seed), what, *map(str, counters)))
    return int.from_bytes(hashlib.blake2b(address.encode(), digest_size=8).digest(), "little")


def uniform(k: int) -> float:
    """A number in [0, 1) that belongs to the key `k`: its top 53 bits."""
    return (k >> 11) * 2.0**-53


def uniforms(k: int, shape: tuple[int, ...]) -> np.ndarray:
    """Numbers in [0, 1) that belong to the key `k`: float64 of that shape."""
    return np.random.Generator(np.random.Philox(key=k)).random(shape)


def normal(
    keys: Sequence[int], shape: tuple[int, ...], dtype: "torch.dtype | None" = None
) -> "Tensor":
    """Standard normal noise, row i from `keys[i]` alone: (len(keys), *shape), on the CPU.

    Args:
        dtype: float32 by default.
    """
    import torch

    wide = np.float64 if dtype == torch.float64 else np.float32
    z = np.empty((len(keys), *shape), dtype=wide)
    for row, k in zip(z, keys, strict=True):
        np.random.Generator(np.random.Philox(key=k)).standard_normal(dtype=wide, out=row)
    return torch.from_numpy(z).to(dtype or torch.float32)


def permutation(k: int, n: int) -> np.ndarray:
    """A random order of 0 .. n-1 that belongs to the key `k`: (n,) int64."""
    return np.random.Generator(np.random.Philox(key=k)).permutation(n)
