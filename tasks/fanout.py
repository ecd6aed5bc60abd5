"""Sampling over the cluster: requests in, images out, in order.

Images are addressed by (seed, index), so how they are dealt to tasks has no part in their pixels.
"""

import functools
from collections.abc import Callable, Sequence

import numpy as np
import ray

from pipeline.registry.models import load_model
from pipeline.samplers.model import Model
from pipeline.serving.engine import Engine, ImageRequest, Mode
from tasks.cluster import worker_device

IMAGES_PER_TASK = 48
"""Enough to keep the engine's rows full and to bear the start of a task."""


@functools.lru_cache(maxsize=2)  # a worker process draws from one model many times
def _model(uri: str, tracking_uri: str | None) -> Model:
    return load_model(uri, tracking_uri)


def draw(
    uri: str, tracking_uri: str | None, requests: Sequence[ImageRequest], mode: Mode
) -> np.ndarray:
    """The images of `requests`, in order, drawn in this process: (N, H, W, C) uint8."""
    engine = Engine(_model(uri, tracking_uri), mode, device=worker_device())
    images: list[np.ndarray] = [np.empty(0)] * len(requests)
    for i, pixels in engine.generate(requests):
        images[i] = pixels
    return np.stack(images)


_draw_task = ray.remote(max_retries=3)(draw)


def draw_on_cluster(
    uri: str,
    tracking_uri: str | None,
    requests: Sequence[ImageRequest],
    mode: Mode,
    gpus_per_task: int = 0,
    on_done: Callable[[int], None] = lambda n: None,
) -> np.ndarray:
    """The images of `requests`, in order: (N, H, W, C) uint8.

    Args:
        uri: of the model, see `load_model`.
        on_done: called with the number of finished images as tasks end.
    """
    tasks = {}
    remote = _draw_task.options(num_cpus=1, num_gpus=gpus_per_task)
    for start in range(0, len(requests), IMAGES_PER_TASK):
        chunk = list(requests[start : start + IMAGES_PER_TASK])
        tasks[remote.remote(uri, tracking_uri, chunk, mode)] = start
    parts: dict[int, np.ndarray] = {}
    pending = list(tasks)
    while pending:
        (ready, *_), pending = ray.wait(pending, num_returns=1)
        parts[tasks[ready]] = ray.get(ready)
        on_done(sum(len(part) for part in parts.values()))
    return np.concatenate([parts[start] for start in sorted(parts)])
