"""Previews of checkpoints: samples and the loss on held-out images, made beside the training."""

import logging
import math
from collections import deque
from typing import Any, NamedTuple

import ray
import torch

from pipeline import storage
from pipeline.data.images import grid
from pipeline.data.parts import choose, images_at
from pipeline.errors import StorageError
from pipeline.evaluation.metrics import MOST_HELD_OUT, holdout_loss
from pipeline.registry.models import load_model
from pipeline.samplers.plan import SamplingConfig
from pipeline.seeding import key
from pipeline.serving.engine import Engine, ImageRequest
from pipeline.training import checkpoint
from tasks.stage import StageContext

PREVIEW_STEPS = 25
PREVIEW_IMAGES_PER_CLASS = 4


def preview(
    uri: str, shard_set: str, num_held_out: int, guidance: float, seed: int
) -> tuple[bytes, float]:
    """A grid of samples from a checkpoint's EMA weights, and their loss on held-out images."""
    torch.set_num_threads(1)  # beside the training workers
    model = load_model(uri)
    num_classes = model.spec.num_classes
    steps = min(PREVIEW_STEPS, model.schedule.timesteps)
    sampling = model.spec.admissible(SamplingConfig(steps=steps, guidance=guidance))
    labels: list[int | None] = [None] * 16
    if num_classes:
        labels = [c for c in range(min(num_classes, 10)) for _ in range(PREVIEW_IMAGES_PER_CLASS)]
    requests = [
        ImageRequest(key(seed, "preview") >> 1, i, label, sampling)
        for i, label in enumerate(labels)
    ]
    pixels = Engine(model).draw(requests)
    columns = PREVIEW_IMAGES_PER_CLASS * 2 if num_classes else 4
    held_out = images_at(shard_set, "holdout", choose(num_held_out, MOST_HELD_OUT, seed))
    loss = holdout_loss(model, held_out, seed).estimate().value
    return grid(pixels, columns), loss


class Made(NamedTuple):
    """A preview that is to be logged."""

    step: int
    png: bytes
    loss: float


class Previews:
    """Previews of checkpoints as they appear, one at a time, outside the training ranks.

    They are made whether MLflow answers or not: the checkpoint may be gone when it does.
    """

    def __init__(self, ctx: StageContext) -> None:
        """Raises StorageError where MLflow cannot say which previews an earlier run has made."""
        self.ctx = ctx
        shards = storage.read_manifest(ctx.inputs["preprocess"])
        assert shards is not None
        self._num_held_out = int(shards.stats["num_images"]["holdout"])
        self._added = set(ctx.tracked_run().image_steps("samples"))
        self._waiting: deque[tuple[int, str]] = deque()
        self._running: tuple[int, Any] | None = None
        self._made: deque[Made] = deque()
        self._task = ray.remote(num_cpus=0, max_retries=1)(preview)

    def add(self, step: int, uri: str) -> None:
        """A checkpoint; the same step again is harmless."""
        if step not in self._added:
            self._added.add(step)
            self._waiting.append((step, uri))

    def make(self, wait: bool = False) -> None:
        """Take in what is done and start what is next; with `wait`, until there is no more."""
        config = self.ctx.config
        while self._running or self._waiting:
            if self._running is None:
                step, uri = self._waiting.popleft()
                shard_set, guidance = self.ctx.inputs["preprocess"], config.sampling.guidance
                call = (uri, shard_set, self._num_held_out, guidance, config.seed)
                self._running = step, self._task.remote(*call)
            step, result = self._running
            if not ray.wait([result], timeout=None if wait else 0)[0]:
                return
            self._running = None
            try:
                made = Made(step, *ray.get(result))
                self._made.append(made)
                if math.isfinite(made.loss):
                    checkpoint.note_loss(self.ctx.folder, step, made.loss)
            except ray.exceptions.RayError as error:
                # such as a checkpoint pruned before it was read: training goes on, a preview less
                logging.getLogger(__name__).warning("no preview of step %d: %s", step, error)
            except StorageError as error:
                logging.getLogger(__name__).warning("step %d is not compared: %s", step, error)

    def log(self) -> None:
        """Log those that are made.

        Raises:
            StorageError: MLflow cannot be used; the next call takes up where this one stopped.
        """
        run = self.ctx.tracked_run()
        while self._made:
            step, png, loss = self._made[0]
            if math.isfinite(loss):
                run.log_history([{"step": step, "holdout_loss": loss}])
            run.log_image("samples", step, png)  # last: its presence says that both are there
            self._made.popleft()
