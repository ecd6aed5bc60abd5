"""Feature extractors: what turns images into the vectors that figures of merit compare.

By default it is the classifier of features.py, trained on the images at hand, as published practice
has it for small grey images; its figures are named after the run and compare with no others. What
the config names takes its place, see extractor_files.py. Either is kept in a folder, whole, so that
no worker and no later run needs the file of the user's.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline import storage
from pipeline.data.images import to_unit
from pipeline.device import CPU, send
from pipeline.errors import CorruptArtifact
from pipeline.evaluation.config import ExtractorConfig
from pipeline.evaluation.extractor_files import config_of, find_by, read
from pipeline.evaluation.features import TrainedClassifier, from_files, to_files

INCEPTION = "inception"
"""An extractor of this name makes figures that are called FID, KID and inception score."""
DESCRIPTION = "extractor.json"
CLASSIFIER = ("classifier.safetensors", "classifier.json")
WEIGHTS = "extractor.bin"
"""The file of the user's, whatever its kind."""


class Found(NamedTuple):
    """What an extractor finds in images."""

    features: Tensor
    """(N, D) float32, on the CPU"""
    log_probs: Tensor | None
    """(N, classes) float32, on the CPU, if it is a classifier."""


@dataclass(frozen=True)
class Extractor:
    """A network that finds features in uint8 images (N, H, W, C)."""

    name: str
    digest: str
    find: Callable[[np.ndarray], Found]
    """Of at most `images_at_once`."""
    images_at_once: int

    def __call__(self, pixels: np.ndarray) -> Found:
        parts = [
            self.find(pixels[start : start + self.images_at_once])
            for start in range(0, len(pixels), self.images_at_once)
        ]
        log_probs = [part.log_probs for part in parts if part.log_probs is not None]
        return Found(
            torch.cat([part.features for part in parts]),
            torch.cat(log_probs) if log_probs else None,
        )


def keep_classifier(folder: str, name: str, classifier: TrainedClassifier) -> None:
    """Keep a classifier as the extractor of a folder, where `load_extractor` finds it."""
    digest = ""
    for file, data in to_files(classifier).items():
        entry = storage.write_bytes(storage.join(folder, file), data)
        digest = digest or entry.sha256  # that of the weights, which come first
    description = {"kind": "classifier", "name": f"cnn_{name}", "digest": digest}
    storage.write_json(storage.join(folder, DESCRIPTION), description)


def keep_file(folder: str, config: ExtractorConfig) -> None:
    """Keep what the config names as the extractor of a folder, unless it is there already.

    Raises:
        ConfigError: it is missing, is another one, or is not what its name says.
        StorageError: it cannot be read.
    """
    if describe(folder):
        return
    data = read(config)
    find_by(config, data)  # what is wrong with it is better said before it is kept
    entry = storage.write_bytes(storage.join(folder, WEIGHTS), data)
    facts = {"kind": "file", "name": config.name, "digest": config.digest, "kept": entry.sha256}
    description = {**facts, "config": config.model_dump(mode="json")}
    storage.write_json(storage.join(folder, DESCRIPTION), description)


def load_extractor(folder: str, device: torch.device = CPU) -> Extractor | None:
    """The extractor of a folder, on a device; None if it has none.

    Raises:
        CorruptArtifact: the file that was kept is damaged.
    """
    try:
        description = storage.read_json(storage.join(folder, DESCRIPTION))
    except FileNotFoundError:
        return None
    name, digest = description["name"], description["digest"]
    if description["kind"] == "classifier":
        return by_classifier(name, digest, load_classifier(folder), device)
    data = storage.read_bytes(storage.join(folder, WEIGHTS))
    if storage.sha256(data) != description["kept"]:
        raise CorruptArtifact(
            f"{storage.join(folder, WEIGHTS)} is damaged: delete its folder, and the same command "
            "makes it anew"
        )
    found = find_by(config_of(description["config"]), data, device)
    # such networks are wide, and their images large
    return Extractor(name, digest, lambda pixels: Found(*found(pixels)), images_at_once=32)


def load_classifier(folder: str) -> TrainedClassifier:
    """The classifier that `keep_classifier` kept."""
    return from_files({name: storage.read_bytes(storage.join(folder, name)) for name in CLASSIFIER})


def by_classifier(
    name: str, digest: str, classifier: TrainedClassifier, device: torch.device = CPU
) -> Extractor:
    """The penultimate layer of a classifier, which moves to the device, and its classes."""
    network = classifier.network.to(device)

    @torch.inference_mode()
    def find(pixels: np.ndarray) -> Found:
        features = network.features(to_unit(send(torch.from_numpy(pixels), device)))
        return Found(features.cpu(), network.out(features).log_softmax(1).cpu())

    return Extractor(name, digest, find, images_at_once=256)


def describe(folder: str) -> dict[str, str]:
    """The name and the digest of a folder's extractor; empty if it has none."""
    try:
        description = storage.read_json(storage.join(folder, DESCRIPTION))
    except FileNotFoundError:
        return {}
    return {name: description[name] for name in ("name", "digest")}
