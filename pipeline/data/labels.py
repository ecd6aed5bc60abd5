"""Labels that stand in a file of their own, beside the images."""

import csv
import io
import json
from collections.abc import Sequence
from typing import Any

from pipeline import storage
from pipeline.errors import DataError

Label = int | str
"""A number, or the name of a class."""

FILE_COLUMNS = ("file", "file_name", "filename", "path", "image", "image_id", "name", "key", "id")
LABEL_COLUMNS = ("label", "labels", "class", "class_name", "category", "target")
REMEDY = "name another file with --set data.labels=FILE"


def read_labels(uri: str) -> dict[str, Label]:
    """File name -> label, of a .csv, .tsv, .json or .jsonl file.

    A table has a column with the file's name and one with its label, found by their headings, or
    is two columns without a heading. JSON is an object {name: label}, a list of [name, label], a
    list of objects with such columns, or an object that holds one of these as `labels`. Labels
    that are all whole numbers are numbers, others the names of classes.

    Raises:
        DataError: it does not exist, or is not of that form.
        StorageError: it cannot be read.
    """
    try:
        text = storage.read_bytes(uri, REMEDY).decode("utf-8-sig")
    except FileNotFoundError as error:
        raise DataError(f"data.labels={uri!r} does not exist") from error
    except UnicodeDecodeError as error:
        raise DataError(f"data.labels={uri!r} is not UTF-8 text ({error.reason})") from error
    suffix = uri.rpartition(".")[2].lower()
    try:
        if suffix in ("csv", "tsv"):
            rows = csv.reader(io.StringIO(text), delimiter="\t" if suffix == "tsv" else ",")
            pairs = _of_table([row for row in rows if row])
        elif suffix == "jsonl":
            pairs = _of_json([json.loads(line) for line in text.splitlines() if line.strip()])
        elif suffix == "json":
            pairs = _of_json(json.loads(text))
        else:
            raise ValueError("its name ends in none of .csv, .tsv, .json and .jsonl")
        return _checked(pairs)
    except (ValueError, csv.Error) as error:
        raise DataError(f"data.labels={uri!r} cannot be used: {error}") from error


def find_label(labels: dict[str, Label], key: str) -> Label | None:
    """The label of an image: by its path, or its name alone, each with or without its suffix."""
    name = key.rpartition("/")[2]
    for candidate in (key, _without_suffix(key), name, _without_suffix(name)):
        if candidate in labels:
            return labels[candidate]
    return None


def _without_suffix(path: str) -> str:
    stem, dot, suffix = path.rpartition(".")
    return stem if dot and "/" not in suffix else path


def _of_table(rows: list[list[str]]) -> list[tuple[str, Any]]:
    if not rows:
        raise ValueError("it is empty")
    heading = [name.strip().lower() for name in rows[0]]
    if len(heading) == 2 and not any(name in LABEL_COLUMNS for name in heading):
        file, label = 0, 1
    else:
        file, label = _column(heading, FILE_COLUMNS), _column(heading, LABEL_COLUMNS)
        rows = rows[1:]
    if short := next((row for row in rows if len(row) <= max(file, label)), None):
        raise ValueError(f"the line {','.join(short)!r} has too few columns")
    pairs = [(row[file].strip(), row[label].strip()) for row in rows]
    if all(_is_whole(value) for _, value in pairs):
        return [(name, int(value)) for name, value in pairs]
    return list(pairs)


def _is_whole(value: str) -> bool:
    return value.isascii() and value.isdigit()


def _column(heading: Sequence[str], names: Sequence[str]) -> int:
    for name in names:
        if name in heading:
            return heading.index(name)
    raise ValueError(f"none of its columns {', '.join(heading)} is named {names[0]}")


def _of_json(value: Any) -> list[tuple[str, Any]]:
    if isinstance(value, dict) and isinstance(value.get("labels"), dict | list):
        value = value["labels"]
    if isinstance(value, dict):
        return list(value.items())
    if isinstance(value, list) and all(isinstance(row, list) and len(row) == 2 for row in value):
        return [(name, label) for name, label in value]
    if isinstance(value, list) and all(isinstance(row, dict) for row in value):
        heading = list(dict.fromkeys(name for row in value for name in row))
        file, label = (heading[_column(heading, names)] for names in (FILE_COLUMNS, LABEL_COLUMNS))
        return [(row[file], row[label]) for row in value if file in row and label in row]
    raise ValueError("it is neither {name: label} nor a list of [name, label]")


def _checked(pairs: list[tuple[Any, Any]]) -> dict[str, Label]:
    labels: dict[str, Label] = {}
    for name, label in pairs:
        if not isinstance(name, str) or isinstance(label, bool):
            raise ValueError(f"{name!r}: {label!r} is not a file's name and its label")
        if not isinstance(label, int | str) or label == "" or str(label).startswith("-"):
            raise ValueError(
                f"{name!r} has the label {label!r}: a label is a number from 0 or a class's name"
            )
        if labels.setdefault(name, label) != label:
            raise ValueError(f"{name!r} stands twice, as {labels[name]!r} and as {label!r}")
    if not labels:
        raise ValueError("it holds no label")
    return labels
