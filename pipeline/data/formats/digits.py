"""The 1,797 handwritten digits of scikit-learn (UCI optdigits), in place of files."""

import functools
from collections.abc import Iterator

import numpy as np

from pipeline.data.formats.common import Member, Place
from pipeline.storage import sha256


def index(place: Place, name: str, hashed: bool = True) -> Iterator[Member]:
    pixels, labels = all_digits()
    for i, (image, label) in enumerate(zip(pixels, labels, strict=True)):
        digest = sha256(image.tobytes()) if hashed else ""
        yield Member(f"{i:04d}", str(label), digest, (i,))


def read(place: Place, name: str, wheres: list[tuple[int, ...]]) -> Iterator[np.ndarray]:
    pixels, _ = all_digits()
    for (i,) in wheres:
        yield pixels[i]


@functools.cache
def all_digits() -> tuple[np.ndarray, np.ndarray]:
    """(N, 8, 8, 1) uint8, (N,)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]  # 0..16 -> 0..255
    return pixels, bunch.target
