"""Parquet files: encoded images as Hugging Face writes them, and the parts of a ShardSet.

The images are the column `image` or `img`, or the only one that can be: a struct with `bytes`, or
binary; or pixels of fixed length, with their `shape` in the schema's metadata. The labels are the
column `label`, `labels` or `cls`, of whole numbers or names. The names of numbers come from the
schema's metadata: Hugging Face's ClassLabel, or `class_names` of a ShardSet.
"""

import contextlib
import itertools
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.data.formats.common import MAX_IMAGE_BYTES, TOO_LARGE, Member, label_of
from pipeline.data.place import Place
from pipeline.data.shards import NO_LABEL
from pipeline.storage import sha256

IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "labels", "cls")
BATCH = 32
"""Rows that are decoded at once: dictionaries and runs can make much of a small file."""
LABELS_AT_ONCE = 2**16
BUFFER_BYTES = 2**20
"""Of a column that are read at once, or a page where that is larger; else it would be what a whole
row group has of it."""
DAMAGE = (pa.ArrowException, ValueError, LookupError)
"""What pyarrow raises on a file that is damaged; also an OSError without a number, see _opened."""


def index(place: Place, name: str, hashed: bool = True) -> Iterator[Member]:
    with _opened(place, name) as file:
        columns = _columns(place, name, file.schema_arrow)
        number = itertools.count()
        for group in range(file.num_row_groups):
            for row, (image, label) in enumerate(_values(file, group, columns, hashed, True)):
                yield _member(f"{next(number):05d}", image, label, (group, row), columns, hashed)


def read(place: Place, name: str, wheres: list[tuple[int, ...]]) -> Iterator[bytes | np.ndarray]:
    """The images of those row groups alone, one group after the other."""
    with _opened(place, name) as file:
        columns = _columns(place, name, file.schema_arrow)
        for group, run in itertools.groupby(wheres, key=lambda where: where[0]):
            values, at = _values(file, group, columns, True, False), -1
            for _, row in run:
                if row <= at:  # back to the beginning
                    values, at = _values(file, group, columns, True, False), -1
                image, _ = next(itertools.islice(values, row - at - 1, None), (None, None))
                at = row
                if image is None:
                    raise place.changed(name)
                if columns.shape is None:
                    yield image
                else:
                    yield np.frombuffer(image, np.uint8).reshape(columns.shape)


@dataclass(frozen=True)
class _Columns:
    """Which columns to read, and what their values mean."""

    image: str
    shape: tuple[int, ...] | None
    """(H, W, C) of pixels, None for encoded images."""
    is_struct: bool
    label: str | None
    class_names: list[str] | None


@contextlib.contextmanager
def _opened(place: Place, name: str) -> Iterator[pq.ParquetFile]:
    with place.explained(name, *DAMAGE), place.open(name) as raw:
        try:
            with pq.ParquetFile(
                raw, page_checksum_verification=True, pre_buffer=False, buffer_size=BUFFER_BYTES
            ) as file:
                yield file
        except OSError as error:
            if type(error) is OSError and error.errno is None:  # pyarrow's own, of damaged pages
                raise pa.ArrowInvalid(str(error).strip()) from error
            raise


def _values(
    file: pq.ParquetFile, group: int, columns: _Columns, with_image: bool, with_label: bool
) -> Iterator[tuple[bytes | None, Any]]:
    """(image, label) of each row of a row group, None for what is not there.

    What is not asked for is not read: b"" stands for each image, None for each label.
    """
    image = f"{columns.image}.bytes" if columns.is_struct else columns.image
    label = columns.label if with_label else None
    wanted = [*([image] if with_image else []), *([label] if label else [])]
    if not wanted:
        yield from itertools.repeat((b"", None), file.metadata.row_group(group).num_rows)
        return
    rows = BATCH if with_image else LABELS_AT_ONCE
    for batch in file.iter_batches(rows, row_groups=[group], columns=wanted, use_threads=False):
        labels = batch.column(label).to_pylist() if label else [None] * batch.num_rows
        if not with_image:
            yield from zip(itertools.repeat(b""), labels)
            continue
        for cell, value in zip(batch.column(columns.image), labels, strict=True):
            content = cell.as_py()
            if columns.is_struct and content is not None:
                content = content["bytes"]
            yield content, value


def _member(
    name: str,
    image: bytes | None,
    label: Any,
    where: tuple[int, ...],
    columns: _Columns,
    hashed: bool,
) -> Member:
    if image is None:
        return Member(name, None, "", where, "it is null")
    if len(image) > MAX_IMAGE_BYTES:
        return Member(name, None, "", where, TOO_LARGE)
    digest = sha256(image) if hashed else ""
    names = columns.class_names
    if label is None or label == NO_LABEL:
        return Member(name, None, digest, where)
    if names is None or isinstance(label, str):
        return Member(name, label_of(label), digest, where)
    if not 0 <= label < len(names):
        return Member(name, None, digest, where, f"its label is {label}, of {len(names)} classes")
    return Member(name, label_of(names[label]), digest, where)


def _columns(place: Place, name: str, schema: pa.Schema) -> _Columns:
    """
    Raises:
        DataError: there is no column of images, or several and none has the name of one.
    """
    shape = _shape(schema)
    candidates = {field.name: field.type for field in schema if _holds_images(field.type, shape)}
    image = next((column for column in IMAGE_COLUMNS if column in candidates), None)
    if image is None and len(candidates) != 1:
        found = f"several ({', '.join(candidates)})" if candidates else "none"
        raise place.error(
            name,
            f"has {found} of its columns {', '.join(schema.names)} as images: name one image, a "
            "struct with bytes, or binary",
        )
    image = image or next(iter(candidates))
    kind = candidates[image]
    label = next(
        (
            column
            for column in LABEL_COLUMNS
            if column in schema.names and _holds_labels(schema.field(column).type)
        ),
        None,
    )
    return _Columns(
        image,
        shape if pa.types.is_fixed_size_binary(kind) else None,
        pa.types.is_struct(kind),
        label,
        _class_names(schema, label),
    )


def _holds_images(kind: pa.DataType, shape: tuple[int, ...] | None) -> bool:
    if pa.types.is_struct(kind):
        return any(field.name == "bytes" and _is_binary(field.type) for field in kind)
    if pa.types.is_fixed_size_binary(kind):
        return shape is not None and kind.byte_width == math.prod(shape)
    return _is_binary(kind)


def _is_binary(kind: pa.DataType) -> bool:
    return bool(
        pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_binary_view(kind)
    )


def _holds_labels(kind: pa.DataType) -> bool:
    kind = kind.value_type if pa.types.is_dictionary(kind) else kind
    return bool(
        pa.types.is_integer(kind) or pa.types.is_string(kind) or pa.types.is_large_string(kind)
    )


def _shape(schema: pa.Schema) -> tuple[int, ...] | None:
    """(H, W, C) of the pixels of a ShardSet's part."""
    shape = _metadata(schema, b"shape")
    sound = isinstance(shape, list) and len(shape) == 3
    return tuple(shape) if sound and all(isinstance(n, int) and n > 0 for n in shape) else None


def _class_names(schema: pa.Schema, label: str | None) -> list[str] | None:
    names = _metadata(schema, b"class_names")
    if names is None:
        names = _metadata(schema, b"huggingface")
        for key in ("info", "features", label, "names"):
            names = names.get(key) if isinstance(names, dict) else None
    sound = isinstance(names, list) and all(isinstance(name, str) for name in names)
    return names if sound and names else None


def _metadata(schema: pa.Schema, key: bytes) -> Any:
    """A value of the schema's metadata, None if it is missing or no JSON."""
    try:
        return json.loads((schema.metadata or {})[key])
    except (KeyError, ValueError, RecursionError):
        return None
