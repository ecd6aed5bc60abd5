"""What a person should know of a ShardSet: figures, and a picture of it."""

from typing import Any

import numpy as np
import pyarrow.compute as pc

from pipeline.data.images import grid, thumbnail
from pipeline.data.parts import read_footer
from pipeline.data.shards import SPLITS
from pipeline.data.sources import DataConfig, Source
from pipeline.storage import FileEntry

CONTACT_SHEET = "contact_sheet"
"""The name of the picture, in the ShardSet and in the MLflow run."""
MAX_NAMED = 1000
"""Bad images and duplicates that the manifest names."""
SHEET_COLUMNS, SHEET_ROWS, SHEET_PARTS = 16, 10, 16
"""Of the contact sheet; its images come from so many parts at most."""
SHEET_PIXELS = 128
"""Of a side of an image on it, at most: of larger ones it would be too large to look at."""


def summary(config: DataConfig, source: Source, records: list[dict[str, Any]]) -> dict[str, Any]:
    """What is worth knowing of the ShardSet: the `stats` of its manifest."""
    bad, duplicates = bad_and_duplicates(source, records)
    sizes = np.array([size for record in records for size in record["sizes"]]).reshape(-1, 3)
    histograms = np.sum([record["histograms"] for record in records], axis=0)  # (C, 256)
    share = histograms / np.maximum(histograms.sum(1, keepdims=True), 1)
    mean = share @ np.arange(256)
    return {
        "source": config.source,
        "source_sha256": source.fingerprint,
        "num_images": {
            split: sum(record["num_images"][split] for record in records) for split in SPLITS
        },
        "image_shape": [config.image_size, config.image_size, config.channels],
        "class_names": source.class_names,
        "class_counts": np.sum([record["class_counts"] for record in records], axis=0).tolist()
        if source.class_names
        else [],
        "num_unlabelled": sum(record["num_unlabelled"] for record in records),
        "source_sizes": _spread(sizes),
        "pixel_mean": mean.round(3).tolist(),
        "pixel_std": np.sqrt(share @ np.arange(256) ** 2 - mean**2).round(3).tolist(),
        "num_bad": len(bad),
        "bad": bad[:MAX_NAMED],
        "num_duplicates": len(duplicates),
        "duplicates": [list(pair) for pair in duplicates[:MAX_NAMED]],
        "num_too_small": sum(record["num_too_small"] for record in records),
        "num_too_narrow": sum(record["num_too_narrow"] for record in records),
    }


def bad_and_duplicates(
    source: Source, records: list[dict[str, Any]]
) -> tuple[list[dict[str, str]], list[tuple[str, str]]]:
    """The key and reason of each image that cannot be used, and the doubles of those that can.

    Doubles were dropped unread: where the image that was kept turned out to be bad, so are they.
    """
    bad = [image for record in records for image in record["bad"]]
    # what the scan knew to be bad has no doubles, but an archive may hold its name twice
    of_scan = source.items.filter(pc.not_equal(source.items["bad"], ""))
    known = set(zip(of_scan["key"].to_pylist(), of_scan["bad"].to_pylist(), strict=True))
    reasons = {
        image["key"]: image["reason"]
        for image in bad
        if (image["key"], image["reason"]) not in known
    }
    for key, kept in source.duplicates:
        if kept in reasons:
            bad.append({"key": key, "reason": reasons[kept]})
    return bad, [pair for pair in source.duplicates if pair[1] not in reasons]


def _spread(sizes: np.ndarray) -> dict[str, list[int]]:
    """Smallest, median and largest width and height of (width, height, count) rows."""
    found = {}
    for name, column in (("width", 0), ("height", 1)):
        order = np.argsort(sizes[:, column], kind="stable")
        values, counts = sizes[order, column], sizes[order, 2].cumsum()
        if len(values):
            middle = values[np.searchsorted(counts, (counts[-1] + 1) // 2)]
            found[name] = [int(values[0]), int(middle), int(values[-1])]
    return found


def left_out(stats: dict[str, Any]) -> str:
    parts = (
        ("num_bad", "unusable"),
        ("num_duplicates", "duplicated"),
        ("num_too_small", "too small"),
        ("num_too_narrow", "too narrow"),
    )
    return ", ".join(f"{stats[name]:,} {what}" for name, what in parts if stats[name])


def contact_sheet(folder: str, files: list[FileEntry], num_classes: int) -> bytes:
    """A PNG of training images of the whole set: a column a class, or as they come without.

    Of its parts the labels are read first, and then the images that it shows, one after the other.
    """
    entries = [file for file in files if file.path.startswith("train/")]
    chosen = np.unique(np.linspace(0, len(entries) - 1, SHEET_PARTS).astype(int))
    parts = [read_footer(folder, entries[i]) for i in chosen]
    columns = min(num_classes, SHEET_COLUMNS) or SHEET_COLUMNS
    if num_classes:
        labels = np.concatenate([part.read_labels() for part in parts])
        cells = {
            int(n): row * columns + column
            for column in range(columns)
            for row, n in enumerate(np.flatnonzero(labels == column)[:SHEET_ROWS])
        }
        num_cells = SHEET_ROWS * columns
    else:
        total = sum(part.num_images for part in parts)
        rows = np.unique(np.linspace(0, total - 1, columns * SHEET_ROWS).astype(int))
        cells = {int(n): cell for cell, n in enumerate(rows)}
        num_cells = len(cells)
    blank = thumbnail(np.full(parts[0].shape, 128, np.uint8), SHEET_PIXELS)
    sheet = np.stack([blank] * num_cells)
    start = 0
    for part in parts:
        here = sorted(n for n in cells if start <= n < start + part.num_images)
        images = part.read_images([n - start for n in here])
        for n, image in zip(here, images, strict=True):
            sheet[cells[n]] = thumbnail(image, SHEET_PIXELS)
        start += part.num_images
    return grid(sheet, columns)
