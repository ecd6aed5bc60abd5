"""Sampling over the cluster: requests in, images out.

Images are addressed by (seed, index), so how they are dealt to tasks has no part in their pixels.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import ray

from pipeline.loading import load_model
from pipeline.samplers.model import Model
from pipeline.serving import offline
from pipeline.serving.config import EXACT_ROWS, Mode
from pipeline.serving.engine import ImageRequest
from pipeline.serving.offline import Drawn
from pipeline.serving.recipe import fingerprint
from tasks.cluster import worker_device
from tasks.stages import in_flight

IMAGES_PER_TASK = 48
"""Enough to keep the engine's rows full and to bear the start of a task."""


@functools.lru_cache(maxsize=2)  # a worker process draws from one model many times
def cached_model(uri: str, tracking_uri: str | None) -> Model:
    """`load_model`, kept by the process."""
    return load_model(uri, tracking_uri)


def draw(
    uri: str,
    tracking_uri: str | None,
    requests: Sequence[ImageRequest],
    mode: Mode,
    rows: int = EXACT_ROWS,
) -> Drawn:
    """The images of `requests`, in order, drawn in this process by calls of `rows` rows."""
    return offline.draw(cached_model(uri, tracking_uri), requests, mode, rows, worker_device())


class DrawnThere(NamedTuple):
    """Images of a task, and with what software and processor they were drawn there."""

    drawn: Drawn
    made_with: dict[str, str]


def draw_there(
    uri: str, tracking_uri: str | None, requests: Sequence[ImageRequest], mode: Mode
) -> DrawnThere:
    """`draw`, as a task."""
    return DrawnThere(draw(uri, tracking_uri, requests, mode), fingerprint(worker_device().type))


_draw_task = ray.remote(max_retries=3)(draw_there)


def draw_on_cluster(
    uri: str,
    tracking_uri: str | None,
    requests: Sequence[ImageRequest],
    mode: Mode,
    gpus_per_task: int = 0,
) -> Iterator[tuple[int, DrawnThere]]:
    """Draw `requests` in chunks, in tasks; yields (start, images) as chunks finish.

    Args:
        uri: of the model, see `load_model`.
    """
    remote = _draw_task.options(num_cpus=1, num_gpus=gpus_per_task)
    starts = range(0, len(requests), IMAGES_PER_TASK)
    calls = [
        (uri, tracking_uri, list(requests[start : start + IMAGES_PER_TASK]), mode)
        for start in starts
    ]
    for i, found in in_flight.results(remote, calls):
        yield starts[i], found
