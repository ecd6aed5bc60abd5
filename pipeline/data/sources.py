"""Where images come from: what there is, with a content hash each, and how to read it.

A source is scanned once, on the driver, into items in a stable order; the items are cut into input
shards, and each shard is read by whoever preprocesses it. The scan remembers the hash of a file by
its size and modification time, so that a second run does not read everything again.
"""

import contextlib
import functools
import hashlib
import zlib
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import IO, Annotated, Any, Literal

import numpy as np
from fsspec.core import url_to_fs
from pydantic import BaseModel, Field, field_validator

from pipeline import storage
from pipeline.errors import DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class DataConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """Which images, and the form in which they are stored."""

    source: str = Field(min_length=1)
    """`builtin:digits`; a folder (path or fsspec URI), whose sub-folders are the classes; or
    `idx:FOLDER`, where an MNIST-like set lies in IDX files."""
    class_names: Annotated[tuple[str, ...], Field(strict=False)] | None = None
    """In place of the source's own names, in the order of the labels: IDX files hold no names."""
    image_size: int = Field(ge=4, le=4096)
    """Height and width in pixels: the shortest side is resized to it, the centre is cropped."""
    channels: Literal[1, 3]
    """1 for grey, 3 for RGB."""
    holdout: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of the images that training never sees, chosen by the hash of their key."""
    max_bad_fraction: float = Field(default=0.01, ge=0.0, le=1.0)
    """More undecodable images than this share stop the stage."""
    images_per_shard: int = Field(default=512, ge=1)

    @field_validator("class_names")
    @classmethod
    def _names_differ(cls, names: tuple[str, ...] | None) -> tuple[str, ...] | None:
        if twice := [name for name in names or () if (names or ()).count(name) > 1]:
            raise ValueError(f"the name {twice[0]!r} stands twice, and a request could not tell")
        return names


BUILTIN, IDX = "builtin:", "idx:"
"""What a source that is no folder of images begins with."""

UNREADABLE = "unreadable"
"""In place of the hash of a file that cannot be read."""


@dataclass(frozen=True)
class Item:
    """One image of a source, not yet read."""

    key: str
    """Its path within the source; the lineage of a training image ends here."""
    label: int | None
    sha256: str


@dataclass(frozen=True)
class Source:
    """What a scan found."""

    uri: str
    class_names: list[str]
    items: list[Item]

    def fingerprint(self) -> list[tuple[str, int | None, str]]:
        """What the images are, whatever the place they lie in or the time they were written."""
        return [(item.key, item.label, item.sha256) for item in self.items]


@dataclass(frozen=True)
class InputShard:
    """A run of a source's items, preprocessed by one task into one part."""

    index: int
    source: str
    items: list[Item]


FileIndex = dict[str, tuple[int, str, str]]
"""key -> (size, modification mark, sha256) of the files of a source, as of the last scan."""


def absolute(source: str) -> str:
    """The source with a local path made absolute: Ray's workers run in folders of their own."""
    if source.startswith(BUILTIN):
        return source
    if source.startswith(IDX):
        return IDX + storage.absolute(source.removeprefix(IDX))
    return storage.absolute(source)


def scan(
    source: str, index: FileIndex | None = None, class_names: Sequence[str] | None = None
) -> tuple[Source, FileIndex]:
    """List a source's images with their labels and hashes, in the order of their keys.

    Args:
        index: the result of an earlier scan; files whose size and modification mark stand in it
            are not read again.
        class_names: in place of the source's own.

    Raises:
        DataError: the source is missing, damaged, empty, or holds no image; or it has another
            number of classes than `class_names`.
    """
    entries: FileIndex = {}
    if source.startswith(BUILTIN):
        found = _scan_builtin(source)
    elif source.startswith(IDX):
        found = _scan_idx(source)
    else:
        found, entries = _scan_folder(source, index or {})
    if class_names is None:
        return found, entries
    if len(class_names) != len(found.class_names):
        raise DataError(
            f"data.class_names has {len(class_names)} names, but data.source={source!r} has "
            f"{len(found.class_names)} classes: give one name a class, in the order of the labels"
        )
    return replace(found, class_names=list(class_names)), entries


def cut(source: Source, images_per_shard: int) -> list[InputShard]:
    """The source's items in runs of `images_per_shard`."""
    starts = range(0, len(source.items), images_per_shard)
    return [
        InputShard(i, source.uri, source.items[start : start + images_per_shard])
        for i, start in enumerate(starts)
    ]


def read(shard: InputShard) -> Iterator[tuple[Item, bytes | np.ndarray | None]]:
    """Each item of a shard with its content: an encoded file, or (H, W, C) uint8 pixels.

    A file that cannot be read comes as None.

    Raises:
        DataError: a file is not what the scan found.
    """
    if shard.source.startswith(BUILTIN):
        pixels, _ = _digits()
        for item in shard.items:
            yield item, pixels[_number(item)]
        return
    if shard.source.startswith(IDX):
        yield from _read_idx(shard)
        return
    fs, root = url_to_fs(shard.source)
    for item in shard.items:
        raw = _read_file(fs, f"{root.rstrip('/')}/{item.key}")
        if (UNREADABLE if raw is None else hashlib.sha256(raw).hexdigest()) != item.sha256:
            raise _changed(shard, item)
        yield item, raw


def _changed(shard: InputShard, item: Item) -> DataError:
    return DataError(
        f"data.source={shard.source!r}: the image {item.key!r} changed while the source was being "
        "read; run the same command again"
    )


def _number(item: Item) -> int:
    """12 of `train/00012`."""
    return int(item.key.rsplit("/", 1)[1])


def _read_file(fs: Any, path: str) -> bytes | None:
    try:
        data: bytes = fs.cat_file(path)
    except OSError:  # a dangling link, no permission
        return None
    return data


# --- builtin:digits -----------------------------------------------------------------------------


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """The 1,797 handwritten digits of scikit-learn (UCI optdigits): (N, 8, 8, 1) uint8, (N,)."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    pixels = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]  # 0..16 -> 0..255
    return pixels, bunch.target


def _scan_builtin(source: str) -> Source:
    if source != "builtin:digits":
        raise DataError(f"data.source={source!r} is not a builtin source; there is builtin:digits")
    pixels, labels = _digits()
    items = [
        Item(f"digits/{i:04d}", int(label), hashlib.sha256(image.tobytes()).hexdigest())
        for i, (image, label) in enumerate(zip(pixels, labels, strict=True))
    ]
    return Source(source, [str(digit) for digit in range(10)], items)


# --- idx:FOLDER -------------------------------------------------------------------------------

IDX_IMAGES, IDX_LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"
"""The training files of MNIST, Fashion-MNIST, KMNIST ..., each as it is or with .gz.

An IDX file is the bytes 0, 0, 8 (for unsigned bytes) and the number of axes, the length of each
axis as a big-endian 32-bit integer, and the values (LeCun's page of MNIST).
"""


def _scan_idx(source: str) -> Source:
    pixels = _idx_values(source, IDX_IMAGES, 3)  # (N, H, W)
    labels = _idx_values(source, IDX_LABELS, 1)  # (N,)
    if not pixels.size:
        raise DataError(
            f"data.source={source!r} holds no image: {IDX_IMAGES} has the shape {pixels.shape}"
        )
    if len(pixels) != len(labels):
        raise DataError(
            f"data.source={source!r} has {len(pixels)} images in {IDX_IMAGES} but {len(labels)} "
            f"labels in {IDX_LABELS}: the two files do not belong together"
        )
    items = [
        Item(f"train/{i:05d}", int(label), hashlib.sha256(image).hexdigest())
        for i, (image, label) in enumerate(zip(pixels, labels, strict=True))
    ]
    return Source(source, [str(label) for label in range(int(labels.max()) + 1)], items)


def _read_idx(shard: InputShard) -> Iterator[tuple[Item, np.ndarray]]:
    """The images of a shard alone; what lies before them in a .gz is decompressed and dropped."""
    with _open_idx(shard.source, IDX_IMAGES) as file:
        _, height, width = _idx_shape(shard.source, IDX_IMAGES, file, 3)
        begin, size = file.tell(), height * width
        for item in shard.items:
            file.seek(begin + _number(item) * size)
            raw = file.read(size)
            if hashlib.sha256(raw).hexdigest() != item.sha256:
                raise _changed(shard, item)
            yield item, np.frombuffer(raw, np.uint8).reshape(height, width, 1)


def _idx_values(source: str, name: str, ndim: int) -> np.ndarray:
    with _open_idx(source, name) as file:
        shape = _idx_shape(source, name, file, ndim)
        values = np.frombuffer(file.read(), np.uint8)
    size = int(np.prod(shape, dtype=object))
    if len(values) != size:
        raise DataError(
            f"data.source={source!r}: {name} holds {len(values)} bytes after its header, which "
            f"announces {size} ({' x '.join(map(str, shape))}): it is truncated or damaged"
        )
    return values.reshape(shape)


def _idx_shape(source: str, name: str, file: IO[bytes], ndim: int) -> tuple[int, ...]:
    magic, wanted = file.read(4), bytes([0, 0, 8, ndim])
    if magic != wanted:
        raise DataError(
            f"data.source={source!r}: {name} begins with the bytes {magic.hex(' ') or 'none'}, an "
            f"IDX file of unsigned bytes with {ndim} axes begins with {wanted.hex(' ')}"
        )
    sizes = file.read(4 * ndim)
    if len(sizes) < 4 * ndim:
        raise DataError(f"data.source={source!r}: {name} ends within its header: it is truncated")
    return tuple(int(size) for size in np.frombuffer(sizes, ">u4"))


@contextlib.contextmanager
def _open_idx(source: str, name: str) -> Iterator[IO[bytes]]:
    """The file of that name in the folder, with or without .gz; what goes wrong is a DataError."""
    try:
        fs, root = url_to_fs(source.removeprefix(IDX))
        path = f"{root.rstrip('/')}/{name}"
        there = [p for p in (path, f"{path}.gz") if fs.exists(p)]
        if not there:
            raise DataError(
                f"data.source={source!r}: there is no {name} or {name}.gz in that folder; idx: "
                f"reads {IDX_IMAGES} and {IDX_LABELS}, as MNIST names them"
            )
        with fs.open(there[0], "rb", compression="infer") as file:
            yield file
    except DataError:
        raise
    except (EOFError, zlib.error) as error:  # gzip's own; the rest is the file system's
        raise DataError(
            f"data.source={source!r}: {name}.gz is truncated or damaged ({error})"
        ) from error
    except Exception as error:  # whatever the package of that scheme raises
        raise DataError(f"data.source={source!r}: {name} cannot be read: {error}") from error


# --- a folder of image files --------------------------------------------------------------------


def _scan_folder(source: str, index: FileIndex) -> tuple[Source, FileIndex]:
    try:
        fs, root = url_to_fs(source)
        if not fs.exists(root):
            raise DataError(
                f"data.source={source!r} does not exist: give a folder of images, idx:FOLDER, or "
                "builtin:digits"
            )
        if fs.isfile(root):
            raise DataError(f"data.source={source!r} is a file: give a folder of images")
        found: dict[str, dict[str, Any]] = fs.find(root, detail=True)
    except DataError:
        raise
    except Exception as error:  # whatever the package of that scheme raises
        raise DataError(f"data.source={source!r} cannot be read: {error}") from error

    root = root.rstrip("/")
    files = {path[len(root) + 1 :]: info for path, info in found.items()}
    keys = sorted(key for key in files if _is_image_name(key))
    if not keys:
        raise DataError(
            f"data.source={source!r} holds no image ({len(files)} files looked at; images end in "
            f"{', '.join(IMAGE_SUFFIXES)})"
        )

    def entry(key: str) -> tuple[int, str, str]:
        info = files[key]
        size = int(info["size"] or 0)
        mark = str(info.get("ETag") or info.get("mtime") or info.get("LastModified"))
        known = index.get(key)
        if known is not None and tuple(known[:2]) == (size, mark):
            return size, mark, known[2]
        raw = _read_file(fs, f"{root}/{key}")
        return size, mark, UNREADABLE if raw is None else hashlib.sha256(raw).hexdigest()

    with ThreadPoolExecutor(max_workers=16) as pool:
        entries = dict(zip(keys, pool.map(entry, keys), strict=True))

    class_names = sorted({key.split("/", 1)[0] for key in keys if "/" in key})
    label = {name: i for i, name in enumerate(class_names)}
    items = [Item(key, label.get(key.split("/", 1)[0]), entries[key][2]) for key in keys]
    return Source(source, class_names, items), entries


def _is_image_name(key: str) -> bool:
    hidden = any(part.startswith(".") for part in key.split("/"))
    return key.lower().endswith(IMAGE_SUFFIXES) and not hidden
