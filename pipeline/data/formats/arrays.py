"""NumPy's files: .npy with the images of one array, .npz with those of each array of images.

An array of images is uint8 and (N, H, W) or (N, H, W, C) with 1, 3 or 4 channels. In an .npz its
labels are the array of whole numbers, (N,) or (N, 1), that is named as the images are, with
`labels` for `images`, `label` for `image`, or `y` for `x`.
"""

import io
import itertools
import re
import warnings
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO

import numpy as np

from pipeline.data.formats.common import Member, label_of, read_pixels, read_up_to, rows
from pipeline.data.formats.zip_files import DAMAGE, opened
from pipeline.data.place import Place
from pipeline.storage import sha256

RULE = "uint8 of the shape (N, H, W) or (N, H, W, C) with C of 1, 3 or 4, in C order"
MAX_HEADER_BYTES = 12 + 10_000
"""The fixed part of a header, and as much of the rest as numpy reads."""
LABELS_OF = (("images", "labels"), ("image", "label"), ("x", "y"), ("X", "Y"), ("X", "y"))


@dataclass(frozen=True)
class Header:
    """What stands before the values of an array."""

    dtype: np.dtype
    shape: tuple[int, ...]
    fortran: bool
    size: int
    """Bytes of the header itself."""

    def __str__(self) -> str:
        return f"{self.dtype} of the shape {self.shape}{' in Fortran order' * self.fortran}"

    def is_images(self) -> bool:
        channels = self.shape[3:] or (1,)
        return (
            self.dtype == np.uint8
            and len(self.shape) in (3, 4)
            and channels[0] in (1, 3, 4)
            and not self.fortran
        )


def index(place: Place, name: str, hashed: bool = True) -> Iterator[Member]:
    if _is_npz(name):
        yield from _index_npz(place, name, hashed)
        return
    with place.explained(name), place.open(name) as file:
        header = _header(place, name, file)
        if not header.is_images():
            raise place.error(name, f"holds {header}: images are {RULE}")
        for i, (digest, where) in enumerate(_images(place, name, file, header, hashed)):
            yield Member(f"{i:05d}", None, digest, where)


def read(place: Place, name: str, wheres: list[tuple[int, ...]]) -> Iterator[np.ndarray]:
    """Each image from its place; in a compressed .npz what lies before it is decompressed.

    In an .npz, `where` begins with the number of the array in the archive.
    """
    if not _is_npz(name):
        with place.explained(name), place.open(name) as file:
            yield from read_pixels(place, name, file, wheres)
        return
    with place.explained(name, *DAMAGE), opened(place, name) as (_, archive):
        entries = archive.infolist()
        for number, run in itertools.groupby(wheres, key=lambda where: where[0]):
            if number >= len(entries):
                raise place.changed(name)
            with archive.open(entries[number]) as entry:
                yield from read_pixels(place, name, entry, (where[1:] for where in run))


def _is_npz(name: str) -> bool:
    return name.lower().endswith(".npz")


def _index_npz(place: Place, name: str, hashed: bool) -> Iterator[Member]:
    with place.explained(name, *DAMAGE), opened(place, name) as (_, archive):
        headers, numbers = {}, {}  # by the name of the array; its number in the archive
        for number, info in enumerate(archive.infolist()):
            array, suffix, _ = info.filename.rpartition(".npy")
            if suffix:
                with archive.open(info) as file:
                    headers[array] = _header(place, f"{name}/{info.filename}", file)
                numbers[array] = number
        images = [array for array, header in headers.items() if header.is_images()]
        if not images:
            found = "; ".join(f"{array}, {header}" for array, header in headers.items())
            raise place.error(name, f"has no array of images ({found}): images are {RULE}")
        for array in images:
            labels = _labels(place, name, archive, headers, array)
            with archive.open(f"{array}.npy") as file:
                file.seek(headers[array].size)
                found_images = _images(place, f"{name}/{array}.npy", file, headers[array], hashed)
                for i, (digest, where) in enumerate(found_images):
                    label = None if labels is None else label_of(int(labels[i]))
                    yield Member(f"{array}/{i:05d}", label, digest, (numbers[array], *where))


def _images(
    place: Place, name: str, file: IO[bytes], header: Header, hashed: bool
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(digest, where) of each image; `file` stands behind the header. All are read in either case:
    what is truncated is to be found."""
    _, height, width, channels = (*header.shape, 1)[:4]
    size = height * width * channels
    for i, row in enumerate(rows(place, name, file, header.shape)):
        yield sha256(row) if hashed else "", (header.size + i * size, height, width, channels)


def _labels(
    place: Place, name: str, archive: zipfile.ZipFile, headers: dict[str, Header], images: str
) -> np.ndarray | None:
    """The labels of an array of images, None if the archive has none.

    Raises:
        DataError: they are no whole numbers, or of another number.
    """
    array = next((other for other in _label_names(images) if other in headers), None)
    if array is None:
        return None
    header, count = headers[array], headers[images].shape[0]
    if header.dtype.kind not in "iu" or header.shape not in ((count,), (count, 1)):
        raise place.error(
            name,
            f"has {count} images in {images}, but the labels in {array} are {header}: labels are "
            f"whole numbers of the shape ({count},) or ({count}, 1)",
        )
    with archive.open(f"{array}.npy") as file:
        file.seek(header.size)
        shape = (count, header.dtype.itemsize)
        raw = b"".join(rows(place, f"{name}/{array}.npy", file, shape))
    return np.frombuffer(raw, header.dtype)


def _label_names(images: str) -> Iterator[str]:
    """`train_labels` of `train_images`, `y_train` of `x_train`."""
    for of_images, of_labels in LABELS_OF:
        word = rf"(?<![A-Za-z]){of_images}(?![A-Za-z])"
        name = re.sub(word, of_labels, images)
        if name != images:
            yield name


def _header(place: Place, name: str, file: IO[bytes]) -> Header:
    """The header of an array; `file` stands behind it then.

    Raises:
        DataError: there is none.
    """
    head = io.BytesIO(read_up_to(file, MAX_HEADER_BYTES))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of headers from Python 2
            version = np.lib.format.read_magic(head)
            read_rest = {
                (1, 0): np.lib.format.read_array_header_1_0,
                (2, 0): np.lib.format.read_array_header_2_0,
            }[version]
            shape, fortran, dtype = read_rest(head)
            if min(shape, default=0) < 0:
                raise ValueError(f"the shape {shape}")
    except Exception as error:  # of Python's own parser, which numpy lets read it
        raise place.error(name, f"does not begin as an array of NumPy does ({error})") from error
    file.seek(head.tell())
    return Header(dtype, shape, fortran, head.tell())
