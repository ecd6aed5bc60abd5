"""Which format reads a file."""

from types import ModuleType

from pipeline.data.formats import arrays, cifar, digits, idx, loose, parquet, tar_files, zip_files
from pipeline.data.formats.common import IMAGE_SUFFIXES
from pipeline.data.place import BUILTIN, Place

FORMATS: tuple[tuple[tuple[str, ...], ModuleType], ...] = (
    ((".tar", ".tar.gz", ".tgz"), tar_files),
    ((".zip",), zip_files),
    ((".parquet",), parquet),
    ((".npy", ".npz"), arrays),
    ((".bin",), cifar),
)
"""By the end of a file's name; besides, image files and IDX files, whose names are known whole."""


def format_of(place: Place, name: str) -> ModuleType | None:
    """The module of `pipeline.data.formats` that reads a file of this name, if there is one."""
    if place.uri == BUILTIN:
        return digits
    low = name.lower()
    if low.endswith(IMAGE_SUFFIXES):
        return loose
    if idx.is_images(low):
        return idx
    return next((module for suffixes, module in FORMATS if low.endswith(suffixes)), None)
