"""What a person should know of a ShardSet: figures, and a picture of it."""

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import storage
from pipeline.data.images import grid
from pipeline.data.shards import SPLITS, images_of
from pipeline.data.sources import DataConfig, Source
from pipeline.storage import FileEntry

CONTACT_SHEET = "contact_sheet"
"""The name of the picture, in the ShardSet and in the MLflow run."""
MAX_NAMED = 1000
"""Bad images and duplicates that the manifest names."""
SHEET_COLUMNS, SHEET_ROWS, SHEET_PARTS = 16, 10, 16
"""Of the contact sheet; its images come from so many parts at most."""


def summary(config: DataConfig, source: Source, records: list[dict[str, Any]]) -> dict[str, Any]:
    """What is worth knowing of the ShardSet: the `stats` of its manifest."""
    bad = [image for record in records for image in record["bad"]]
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
        "num_duplicates": len(source.duplicates),
        "duplicates": [list(pair) for pair in source.duplicates[:MAX_NAMED]],
        "num_too_small": sum(record["num_too_small"] for record in records),
        "num_too_narrow": sum(record["num_too_narrow"] for record in records),
    }


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
    """A PNG of training images of the whole set: a column a class, or as they come without."""
    paths = [file.path for file in files if file.path.startswith("train/")]
    chosen = [paths[i] for i in np.unique(np.linspace(0, len(paths) - 1, SHEET_PARTS).astype(int))]
    columns = min(num_classes, SHEET_COLUMNS) or SHEET_COLUMNS
    tables = [
        pq.read_table(pa.BufferReader(storage.read_bytes(storage.join(folder, path))))
        for path in chosen
    ]
    images = np.concatenate([images_of(table) for table in tables])
    labels = np.concatenate([table["label"].fill_null(-1).to_numpy() for table in tables])
    if not num_classes:
        rows = np.unique(np.linspace(0, len(images) - 1, columns * SHEET_ROWS).astype(int))
        return grid(images[rows], columns)
    sheet = np.full((SHEET_ROWS, columns, *images.shape[1:]), 128, np.uint8)
    for column in range(columns):
        of_class = np.flatnonzero(labels == column)[:SHEET_ROWS]
        sheet[: len(of_class), column] = images[of_class]
    return grid(sheet.reshape(-1, *images.shape[1:]), columns)
