"""Data that fits on a node: a split as two arrays in files, mapped into memory by every worker.

The parts of a split are decoded once per node, into `images.npy` and `labels.npy` of a folder of
the node. Its workers map these files, so that the node's memory holds each page of them once, and
gives it up when it is short. The folder is named after the hashes of the parts: whatever run,
configuration or storage they belong to, the same parts are decoded once. Nothing is deleted here;
a folder may be removed whenever no training uses it.
"""

import errno
import os
import shutil
import stat
import tempfile
from pathlib import Path
from typing import IO, Any

import numpy as np

from pipeline import storage
from pipeline.data.parts import COLUMNS, Part, Parts, arrays_of, read_parts
from pipeline.data.shards import read_part
from pipeline.errors import StorageError

LABEL = np.dtype(np.int64)
REMEDY = (
    "choose another folder with --set cluster.cache=FOLDER, or read the data piece by piece with "
    "--set training.shuffle=windowed"
)


def memory_mapped(
    shard_set: str, split: str, cache: str | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The images (n, H, W, C) uint8 and labels (n,) int64 of a split, in the order of the parts.

    The first of a node's processes that asks makes the files, others wait for it. A process that is
    killed while it makes them leaves nothing that is used.

    Args:
        cache: a folder of this node; by default one of this user among the temporary files.

    Raises:
        FileNotFoundError: the ShardSet is not complete.
        DataError: the split is empty.
        CorruptArtifact: a part does not match the sha256 in the manifest.
        StorageError: a part cannot be read, or the cache's files cannot be written.
    """
    parts = read_parts(shard_set, split)
    root = Path(cache) if cache else _folder_of_this_user()
    folder = root / storage.digest([part.entry.sha256 for part in parts])
    with storage.exclusive(f"{folder}.lock", remedy=REMEDY):
        if not folder.exists():
            try:
                _make(parts, folder)
            except OSError as error:
                raise StorageError(
                    f"cannot write {folder}: {error.strerror or error}; {REMEDY}"
                ) from error
    return _mapped(folder / "images.npy", np.uint8), _mapped(folder / "labels.npy", LABEL)


def _folder_of_this_user() -> Path:
    """Among the temporary files, where anyone may make a folder of any name: hence the checks."""
    folder = Path(tempfile.gettempdir()) / f"ray-ddpm-cache-{os.getuid()}"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise StorageError(f"cannot make {folder}: {error.strerror}; {REMEDY}") from error
    info = folder.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o022:
        raise StorageError(
            f"{folder}, where training keeps decoded images, is not a folder that this user alone "
            f"can write to: remove it, or {REMEDY}"
        )
    return folder


def _make(parts: Parts, folder: Path) -> None:
    """Decode one part after the other; the folder appears when all is written."""
    making = folder.with_name(f".{folder.name}.tmp")
    shutil.rmtree(making, ignore_errors=True)  # of a process that was killed
    making.mkdir(parents=True)
    n, needed = int(parts.num_images.sum()), 0
    try:
        with open(making / "images.npy", "wb") as pixels, open(making / "labels.npy", "wb") as rest:
            for part in parts:
                images, labels = _read(part)
                if not needed:
                    needed = n * (images[0].nbytes + LABEL.itemsize)
                    if shutil.disk_usage(making).free < needed:
                        raise OSError(errno.ENOSPC, "")
                    _begin(pixels, images.dtype, (n, *images.shape[1:]))
                    _begin(rest, LABEL, (n,))
                pixels.write(np.ascontiguousarray(images).data)
                rest.write(labels.data)
            for file in (pixels, rest):  # or a power cut could leave a folder of empty files
                file.flush()
                os.fsync(file.fileno())
        making.rename(folder)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise StorageError(
            f"the decoded images need {needed:,} bytes at {folder.parent}, where "
            f"{shutil.disk_usage(folder.parent).free:,} are free: {REMEDY}"
        ) from error
    finally:
        shutil.rmtree(making, ignore_errors=True)


def _read(part: Part) -> tuple[np.ndarray, np.ndarray]:
    return arrays_of(read_part(part.shard_set, part.entry, COLUMNS))


def _begin(file: IO[bytes], dtype: np.dtype[Any], shape: tuple[int, ...]) -> None:
    header = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)


def _mapped(path: Path, dtype: Any) -> np.ndarray:
    try:
        array = np.load(path, mmap_mode="r")
    except (OSError, EOFError, ValueError) as error:
        raise StorageError(
            f"{path} is not as it was written ({error}): remove {path.parent}, and it is made anew"
        ) from error
    assert array.dtype == dtype
    return np.asarray(array)
