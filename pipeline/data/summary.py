"""What a person should know of a ShardSet: figures, and a picture of it."""

from collections import Counter
from typing import Any

import numpy as np
import pyarrow.compute as pc

from pipeline.data.config import DataConfig
from pipeline.data.images import grid, thumbnail
from pipeline.data.parts import Parts
from pipeline.data.shard_list import Row, row_of
from pipeline.data.source import Source

CONTACT_SHEET = "contact_sheet"
"""The name of the picture, in the ShardSet and in the MLflow run."""
MAX_NAMED = 1000
"""Bad images and duplicates that the manifest names."""
SHEET_COLUMNS, SHEET_ROWS, SHEET_PARTS = 16, 10, 16
"""Of the contact sheet; its images come from so many parts at most."""
SHEET_PIXELS = 128
"""Of a side of an image on it, at most: of larger ones it would be too large to look at."""


class Tally:
    """What the records of shards come to, and of each shard a row.

    The records are not kept: each has the sizes of its images and three histograms, some 100 kB in
    memory, and of a shard there may be one of a hundred thousand.
    """

    def __init__(self) -> None:
        self.rows: dict[int, Row] = {}
        """By the index of the shard, see shard_list.py."""
        self.counts: Counter[str] = Counter()
        self.num_images: Counter[str] = Counter()
        self.class_counts = np.zeros(0, np.int64)
        self.histograms = np.zeros((0, 256), np.int64)
        self.sizes: Counter[tuple[int, int]] = Counter()
        """(width, height) -> images"""
        self._bad: dict[int, list[dict[str, str]]] = {}

    def add(self, index: int, record: dict[str, Any]) -> None:
        """Count a record of `preprocess_shard`, once."""
        if not self.rows:
            self.class_counts = np.zeros(len(record["class_counts"]), np.int64)
            self.histograms = np.zeros((len(record["histograms"]), 256), np.int64)
        self.rows[index] = row_of(record)
        for name in ("num_unlabelled", "num_too_small", "num_too_narrow"):
            self.counts[name] += record[name]
        self.num_images.update(record["num_images"])
        self.class_counts += np.array(record["class_counts"], np.int64)  # of no classes, too
        self.histograms += record["histograms"]
        for width, height, count in record["sizes"]:
            self.sizes[width, height] += count
        if record["bad"]:
            self._bad[index] = record["bad"]

    @property
    def bad(self) -> list[dict[str, str]]:
        """The key and reason of each image that could not be used, in the order of the shards."""
        return [image for index in sorted(self._bad) for image in self._bad[index]]


def summary(config: DataConfig, source: Source, tally: Tally) -> dict[str, Any]:
    """What is worth knowing of the ShardSet: the `stats` of its manifest."""
    bad, duplicates = bad_and_duplicates(source, tally.bad)
    sizes = np.array([[*size, count] for size, count in tally.sizes.items()]).reshape(-1, 3)
    histograms = tally.histograms  # (C, 256)
    share = histograms / np.maximum(histograms.sum(1, keepdims=True), 1)
    mean = share @ np.arange(256)
    return {
        "source": config.source,
        "source_sha256": source.fingerprint,
        "num_images": dict(tally.num_images),
        "image_shape": [config.image_size, config.image_size, config.channels],
        "class_names": source.class_names,
        "class_counts": tally.class_counts.tolist(),
        "source_sizes": _spread(sizes),
        "pixel_mean": mean.round(3).tolist(),
        "pixel_std": np.sqrt(share @ np.arange(256) ** 2 - mean**2).round(3).tolist(),
        "num_bad": len(bad),
        "bad": bad[:MAX_NAMED],
        "num_duplicates": len(duplicates),
        "duplicates": [list(pair) for pair in duplicates[:MAX_NAMED]],
        **tally.counts,
    }


def bad_and_duplicates(
    source: Source, bad: list[dict[str, str]]
) -> tuple[list[dict[str, str]], list[tuple[str, str]]]:
    """The key and reason of each image that cannot be used, and the doubles of those that can.

    Doubles were dropped unread: where the image that was kept turned out to be bad, so are they.

    Args:
        bad: those that were read.
    """
    # what the scan knew to be bad has no doubles, but an archive may hold its name twice
    of_scan = source.items.filter(pc.not_equal(source.items["bad"], ""))
    known = set(zip(of_scan["key"].to_pylist(), of_scan["bad"].to_pylist(), strict=True))
    reasons = {
        image["key"]: image["reason"]
        for image in bad
        if (image["key"], image["reason"]) not in known
    }
    doubles = [
        {"key": key, "reason": reasons[kept]} for key, kept in source.duplicates if kept in reasons
    ]
    return bad + doubles, [pair for pair in source.duplicates if pair[1] not in reasons]


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


def contact_sheet(of: Parts, num_classes: int) -> bytes:
    """A PNG of training images of the whole set: a column a class, or as they come without.

    Of its parts the labels are read first, and then the images that it shows, one after the other.
    """
    chosen = np.unique(np.linspace(0, len(of) - 1, SHEET_PARTS).astype(int))
    parts = [of[int(i)] for i in chosen]
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
