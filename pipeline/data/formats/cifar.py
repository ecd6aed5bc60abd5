"""The binary form of CIFAR-10 and CIFAR-100 (Krizhevsky): labels, then planar RGB of 32 x 32.

A row of CIFAR-10 is a label and 3,072 bytes; of CIFAR-100 a coarse and a fine label, of which the
fine one is taken, and 3,072 bytes.
"""

import posixpath
from collections.abc import Iterator

import numpy as np

from pipeline.data.formats.common import Member, read_up_to
from pipeline.data.place import Place
from pipeline.storage import sha256

PIXELS = 3 * 32 * 32
NAMES = ("batches.meta.txt", "fine_label_names.txt")
"""For one label in a row, and for two: the file beside, with the name of a class in each line."""
CLASSES = {1: 10, 2: 100}


def index(place: Place, name: str, hashed: bool = True) -> Iterator[Member]:
    with place.explained(name), place.open(name) as file:
        size = file.seek(0, 2)
        file.seek(0)
        num_labels = _num_labels(place, name, size)
        row = num_labels + PIXELS
        class_names = _class_names(place, name, num_labels)
        for i in range(size // row):
            raw = read_up_to(file, row)
            if len(raw) < row:
                raise place.changed(name)
            label = raw[num_labels - 1]
            bad = label >= CLASSES[num_labels]
            yield Member(
                f"{i:05d}",
                None if bad else class_names[label] if class_names else label,
                sha256(_image(raw[num_labels:]).tobytes()) if hashed else "",
                (i * row + num_labels,),
                f"its label is {label}, of {CLASSES[num_labels]} classes" if bad else "",
            )


def read(place: Place, name: str, wheres: list[tuple[int, ...]]) -> Iterator[np.ndarray]:
    with place.explained(name), place.open(name) as file:
        for (offset,) in wheres:
            file.seek(offset)
            raw = read_up_to(file, PIXELS)
            if len(raw) < PIXELS:
                raise place.changed(name)
            yield _image(raw)


def _image(planes: bytes) -> np.ndarray:
    """(32, 32, 3)."""
    return np.ascontiguousarray(
        np.frombuffer(planes, np.uint8).reshape(3, 32, 32).transpose(1, 2, 0)
    )


def _num_labels(place: Place, name: str, size: int) -> int:
    """1 for CIFAR-10, 2 for CIFAR-100; where the size allows both, the names beside decide."""
    fits = [number for number in CLASSES if size and size % (number + PIXELS) == 0]
    if not fits:
        raise place.error(
            name,
            f"has {size} bytes, no multiple of {1 + PIXELS} (CIFAR-10) or {2 + PIXELS} "
            "(CIFAR-100): it is truncated, or something else",
        )
    named = [number for number in fits if place.exists(beside(name)[number - 1])]
    return (named or fits)[0]


def _class_names(place: Place, name: str, num_labels: int) -> list[str] | None:
    file = beside(name)[num_labels - 1]
    if not place.exists(file):
        return None
    with place.explained(file, UnicodeDecodeError):
        names = place.read(file).decode().split()
    if len(names) != CLASSES[num_labels] or len(set(names)) != len(names):
        raise place.error(
            file, f"has {len(set(names))} names, a class each needs {CLASSES[num_labels]}"
        )
    return names


def beside(name: str) -> list[str]:
    """Where the names of the classes may stand: for one label in a row, and for two."""
    return [posixpath.join(posixpath.dirname(name), other) for other in NAMES]
