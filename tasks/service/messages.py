"""What a dealer and a replica send each other over an image: an order, previews, the image."""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from pipeline.registry.versions import ModelReference
from pipeline.serving.config import Mode
from pipeline.serving.engine import Caller, ImageRequest


@dataclass(frozen=True)
class Order:
    """An image that a request asks for."""

    image: ImageRequest
    model: ModelReference
    mode: Mode
    caller: Caller
    rows: int
    """Of network calls that it takes, about."""
    frames: int = 0
    avoid: frozenset[str] = frozenset()
    """Replicas that have failed to draw it."""


class ReplicaFailed(Exception):
    """A replica could not load the model of an image, or failed to draw it; another may not."""

    def __init__(self, replica: str, why: Exception) -> None:
        super().__init__(replica, why)
        self.replica = replica
        self.why = why


class Preview(NamedTuple):
    """An image on its way, (H, W, C) uint8."""

    evaluation: int
    evaluations: int
    x_t: np.ndarray
    x_0: np.ndarray


class Drawn(NamedTuple):
    """An image, (H, W, C) uint8, and the replica that drew it."""

    pixels: np.ndarray
    replica: str
