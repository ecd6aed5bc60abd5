"""The 1,797 handwritten digits of scikit-learn (UCI optdigits), in place of files."""

import functools
import importlib.util
from collections.abc import Iterator

import numpy as np

from pipeline.data.formats.common import Member
from pipeline.data.place import Place
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
    """(N, 8, 8, 1) uint8, 0 to 255 in place of 0 to 16, and (N,) int64."""
    package = importlib.util.find_spec("sklearn")  # found and not imported, which takes a second
    assert package is not None and package.submodule_search_locations
    path = f"{package.submodule_search_locations[0]}/datasets/data/digits.csv.gz"
    table = np.loadtxt(path, delimiter=",")  # a row an image, its label last
    pixels = np.rint(table[:, :-1].reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    return pixels, table[:, -1].astype(np.int64)
