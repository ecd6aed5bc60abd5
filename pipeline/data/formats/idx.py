"""IDX files, as MNIST, Fashion-MNIST, KMNIST ... come, each as it is or with .gz.

An IDX file is the bytes 0, 0, 8 (for unsigned bytes) and the number of axes, the length of each
axis as a big-endian 32-bit integer, and the values (LeCun's page of MNIST).
"""

import re
from collections.abc import Iterator
from typing import IO

import numpy as np

from pipeline.data.formats.common import Member, read_pixels, rows
from pipeline.data.place import Place
from pipeline.storage import sha256

IMAGES = re.compile(r"(.+)-images([-.])idx3-ubyte(\.gz)?", re.IGNORECASE)


def is_images(name: str) -> bool:
    """Whether that is what a file of images is called, such as train-images-idx3-ubyte.gz."""
    return IMAGES.fullmatch(name) is not None


def stem(name: str) -> str:
    """`train` of `train-images-idx3-ubyte.gz`, with the folder if there is one."""
    match = IMAGES.fullmatch(name)
    return match[1] if match else name


def index(place: Place, name: str, hashed: bool = True) -> Iterator[Member]:
    """The images, with the labels from the file that lies beside, if one does."""
    labels = next((other for other in beside(name) if place.exists(other)), None)
    with place.explained(name), place.open(name, "infer") as file:
        shape = _shape(place, name, file, 3)
        begin, size = file.tell(), shape[1] * shape[2]
        images = rows(place, name, file, shape)
        numbers = _labels(place, labels, name, shape[0]) if labels else None
        for i, pixels in enumerate(images):
            label = next(numbers) if numbers else None
            digest = sha256(pixels) if hashed else ""
            yield Member(f"{i:05d}", label, digest, (begin + i * size, shape[1], shape[2], 1))
        if numbers:
            next(numbers, None)  # its file must end here as well


def read(place: Place, name: str, wheres: list[tuple[int, ...]]) -> Iterator[np.ndarray]:
    """The images alone; what lies before them in a .gz is decompressed and dropped."""
    with place.explained(name), place.open(name, "infer") as file:
        yield from read_pixels(place, name, file, wheres)


def beside(name: str) -> list[str]:
    """What the file of the labels may be called; it need not be compressed as the images are."""
    match = IMAGES.fullmatch(name)
    if match is None:
        return []
    start, dash, suffix = match.groups(default="")
    return [f"{start}-labels{dash}idx1-ubyte{s}" for s in (suffix, "" if suffix else ".gz")]


def _labels(place: Place, name: str, images: str, count: int) -> Iterator[int]:
    with place.explained(name), place.open(name, "infer") as file:
        shape = _shape(place, name, file, 1)
        if shape != (count,):
            raise place.error(
                images,
                f"has {count} images, but {name} has {shape[0]} labels: the two files do not "
                "belong together",
            )
        for label in rows(place, name, file, shape):
            yield label[0]


def _shape(place: Place, name: str, file: IO[bytes], ndim: int) -> tuple[int, ...]:
    magic, wanted = file.read(4), bytes([0, 0, 8, ndim])
    if magic != wanted:
        raise place.error(
            name,
            f"begins with the bytes {magic.hex(' ') or 'none'}, an IDX file of unsigned bytes "
            f"with {ndim} axes begins with {wanted.hex(' ')}",
        )
    sizes = file.read(4 * ndim)
    if len(sizes) < 4 * ndim:
        raise place.error(name, "ends within its header: it is truncated")
    return tuple(int(size) for size in np.frombuffer(sizes, ">u4"))
