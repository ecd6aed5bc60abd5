"""The figures that features give: samples against real images, and real ones against each other.

A name says which features: FID, KID and inception score are those of Inception alone; of others the
name of the extractor stands in that of the figure, as in fd_cnn_digits, since they compare with no
published ones.
"""

import functools
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from pipeline.errors import DataError
from pipeline.evaluation.estimate import Estimate
from pipeline.evaluation.extractors import INCEPTION
from pipeline.evaluation.frechet import (
    Moments,
    frechet_distance,
    frechet_error,
    gaussian,
    merged,
    moments,
)
from pipeline.evaluation.kernel import kernel_distance
from pipeline.evaluation.neighbours import memorised, nearest, neighbourhood
from pipeline.evaluation.score import class_score

MOST_KEPT = 5000
"""Vectors of a set that are held at once and compared one by one, at a cost of their square."""

Better = Literal["lower", "higher"]
Figures = dict[str, dict[str, Any]]
"""Of each figure: value, standard_error, interval (95 %), n, and which is better."""


@dataclass(frozen=True, eq=False)
class FeatureSet:
    """What is kept of the features of many images."""

    moments: Moments
    """Of all of them."""
    some: Tensor
    """(K, D) float32 of MOST_KEPT of them, or of all."""
    log_probs: Tensor | None = None
    """(N, classes) float32 of all, from an extractor that is a classifier."""


def gather(chunks: Iterable[Tensor], keep: Callable[[int], Tensor] | None = None) -> FeatureSet:
    """Features (n, D) that come in chunks; no more than one chunk and what is kept is held.

    Args:
        keep: of the number of a chunk, which of its rows are kept; by default the first of all.
    """
    kept: list[Tensor] = []

    def pass_on() -> Iterator[Moments]:
        count = 0
        for number, chunk in enumerate(chunks):
            rows = chunk[: max(0, MOST_KEPT - count)] if keep is None else chunk[keep(number)]
            kept.append(rows.float().clone())
            count += len(rows)
            yield moments(chunk)

    of_all = merged(pass_on())
    return FeatureSet(of_all, torch.cat(kept))


def compare(name: str, samples: FeatureSet, real: FeatureSet) -> tuple[Figures, dict[str, str]]:
    """All figures of features by the extractor `name`, and why those that are missing are.

    n is the number of the samples; of what compares vectors one by one at most MOST_KEPT.
    """
    figures: Figures = {}
    skipped: dict[str, str] = {}
    prefix = {"fd": "fid", "kd": "kid", "score": "inception_score"} if name == INCEPTION else {}

    def called(short: str) -> str:
        return prefix.get(short, f"{short}_{name}")

    def add(short: str, n: int, better: Better, compute: Callable[[], Estimate]) -> None:
        try:
            figures[called(short)] = {**compute().to_json(), "n": n, "better": better}
        except DataError as error:
            skipped[called(short)] = str(error)

    def distance() -> Estimate:
        p, q = gaussian(samples.moments), gaussian(real.moments)
        error = frechet_error(samples.some, samples.moments.n, p, q)
        return Estimate(frechet_distance(p, q), error)

    add("fd", samples.moments.n, "lower", distance)
    kept = len(samples.some)
    add("kd", kept, "lower", lambda: kernel_distance(samples.some, real.some))
    count = min(kept, len(real.some))  # both sets are to have as many
    shorts = ("precision", "recall", "density", "coverage")
    try:
        found = neighbourhood(real.some[:count], samples.some[:count])._asdict()
    except DataError as error:
        skipped |= {called(short): str(error) for short in shorts}
    else:
        for short in shorts:
            add(short, count, "higher", functools.partial(found.__getitem__, short))
    if samples.log_probs is not None:
        of_classes = samples.log_probs
        add("score", len(of_classes), "higher", lambda: class_score(of_classes))
    return figures, skipped


def nearest_in_chunks(x: Tensor, chunks: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
    """`nearest` of x (N, D) among features that come in chunks, by their rows over all of them."""
    distances = torch.full((len(x),), torch.inf, dtype=torch.float64)
    rows = torch.zeros(len(x), dtype=torch.int64)
    start = 0
    for chunk in chunks:
        here, row = nearest(x, chunk)
        closer = here < distances
        distances = torch.where(closer, here, distances)
        rows = torch.where(closer, row + start, rows)
        start += len(chunk)
    return distances, rows


def memorisation(name: str, samples: Tensor, held_out: Tensor) -> tuple[Figures, dict[str, str]]:
    """The share of memorised samples, from squared distances to the nearest training image."""
    called = f"memorised_{name}"
    try:
        estimate = memorised(samples, held_out)
    except DataError as error:
        return {}, {called: str(error)}
    return {called: {**estimate.to_json(), "n": len(samples), "better": "lower"}}, {}
