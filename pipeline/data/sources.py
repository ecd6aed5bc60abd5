"""Where images come from: what there is, with a content hash each, and how to read it.

A source is scanned once, on the driver, into items in a stable order; the items are cut into input
shards, and each shard is read by whoever preprocesses it. The scan remembers the hash of a file by
its size and modification time, so that a second run does not read everything again.
"""

import functools
import hashlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from fsspec.core import url_to_fs
from pydantic import BaseModel, Field

from pipeline.errors import DataError

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff")


class DataConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """Which images, and the form in which they are stored."""

    source: str = Field(min_length=1)
    """`builtin:digits`, or a folder (path or fsspec URI); its sub-folders are the classes."""
    image_size: int = Field(ge=4, le=4096)
    """Height and width in pixels: the shortest side is resized to it, the centre is cropped."""
    channels: Literal[1, 3]
    """1 for grey, 3 for RGB."""
    holdout: float = Field(default=0.1, ge=0.0, lt=1.0)
    """Share of the images that training never sees, chosen by the hash of their key."""
    max_bad_fraction: float = Field(default=0.01, ge=0.0, le=1.0)
    """More undecodable images than this share stop the stage."""
    images_per_shard: int = Field(default=512, ge=1)


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


def scan(source: str, index: FileIndex | None = None) -> tuple[Source, FileIndex]:
    """List a source's images with their labels and hashes, in the order of their keys.

    Args:
        index: the result of an earlier scan; files whose size and modification mark stand in it
            are not read again.

    Raises:
        DataError: the source is missing, empty, or holds no image.
    """
    if source.startswith("builtin:"):
        return _scan_builtin(source), {}
    return _scan_folder(source, index or {})


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
    if shard.source.startswith("builtin:"):
        pixels, _ = _digits()
        for item in shard.items:
            yield item, pixels[int(item.key.rsplit("/", 1)[1])]
        return
    fs, root = url_to_fs(shard.source)
    for item in shard.items:
        raw = _read_file(fs, f"{root.rstrip('/')}/{item.key}")
        if (UNREADABLE if raw is None else hashlib.sha256(raw).hexdigest()) != item.sha256:
            raise DataError(
                f"data.source={shard.source!r}: the image {item.key!r} changed while the source "
                "was being read; run the same command again"
            )
        yield item, raw


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


# --- a folder of image files --------------------------------------------------------------------


def _scan_folder(source: str, index: FileIndex) -> tuple[Source, FileIndex]:
    try:
        fs, root = url_to_fs(source)
        if not fs.exists(root):
            raise DataError(
                f"data.source={source!r} does not exist: give a folder of images, or builtin:digits"
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
