"""Augmentation of uint8 images, drawn by address like all randomness."""

from dataclasses import dataclass

import numpy as np

from pipeline.seeding import key, uniforms


@dataclass(frozen=True)
class Augmentation:
    """How images are varied in training; by default they are not."""

    horizontal_flip: float = 0.0
    """Probability of left for right."""
    vertical_flip: float = 0.0
    """Probability of top for bottom."""
    shift: int = 0
    """The image is moved by up to so many pixels along each axis, its edges reflected."""


UNCHANGED = Augmentation()


def augment(
    images: np.ndarray, what: Augmentation, seed: int, step: int, batch_size: int, rows: range
) -> np.ndarray:
    """The images (b, H, W, C) of `rows` of global batch `step`, varied: (b, H, W, C).

    Each image is moved first and flipped then. One draw serves all rows of the global batch, of
    which a rank takes its own, so the number of workers has no part in it.
    """
    if what == UNCHANGED:
        return images
    b, H, W, C = images.shape
    draws = uniforms(key(seed, "augment", step), (batch_size, 4))[rows.start : rows.stop]
    y = _places(H, draws[:, 0] < what.vertical_flip, draws[:, 1], what.shift)
    x = _places(W, draws[:, 2] < what.horizontal_flip, draws[:, 3], what.shift)
    nth = np.arange(b)[:, None, None]
    pixel = (nth * H + y[:, :, None]) * W + x[:, None, :]
    # `take` copies a pixel at a time, several times faster than an index for each axis
    varied: np.ndarray = images.reshape(-1, C).take(pixel.ravel(), axis=0)
    return varied.reshape(b, H, W, C)


def _places(size: int, flip: np.ndarray, draw: np.ndarray, shift: int) -> np.ndarray:
    """Which of `size` places along an axis each place of each image shows: (b, size)."""
    by = np.floor(draw * (2 * shift + 1)).astype(np.int64) - shift
    place = np.arange(size)
    place = np.where(flip[:, None], place[::-1], place) - by[:, None]
    last = size - 1
    reflected: np.ndarray = np.abs((place + last) % max(1, 2 * last) - last)
    return reflected
