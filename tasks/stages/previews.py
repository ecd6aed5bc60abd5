"""Previews of checkpoints: samples, the loss on held-out images and a small evaluation.

They are made beside the training, which does not wait for them. The small evaluation is of a few
images of few steps, so its figures compare among the checkpoints of a training, and with nothing
else. It starts with the first checkpoint that finds the stage `reference` finished.
"""

import logging
import math
from collections import deque
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import ray
import torch

from pipeline import storage
from pipeline.data.images import grid
from pipeline.data.parts import choose, images_at
from pipeline.errors import StorageError
from pipeline.evaluation.figures import FeatureSet, compare
from pipeline.evaluation.frechet import moments
from pipeline.evaluation.metrics import MOST_HELD_OUT, holdout_loss
from pipeline.evaluation.real_images import extractor_of, read_train
from pipeline.loading import load_model
from pipeline.samplers.config import SamplingConfig
from pipeline.seeding import key
from pipeline.serving.engine import Engine, ImageRequest
from pipeline.training import checkpoint
from tasks.cluster import gpus_beside_training, worker_device
from tasks.stages import averages, tracking
from tasks.stages.stage import StageContext

PREVIEW_STEPS = 25
PREVIEW_IMAGES_PER_CLASS = 4
ROWS = 64
"""Of a network call: nobody waits for a single image of these."""


@dataclass(frozen=True)
class Preview:
    """What is made of a checkpoint."""

    digest: str
    """Of the model that the checkpoint is."""
    png: bytes
    """A grid of samples."""
    loss: float
    """Of held-out images; NaN if there are none."""
    figures: dict[str, float]
    """Of the small evaluation, by their names in MLflow."""


@dataclass(frozen=True)
class Wanted:
    """What a preview is made of, beside the checkpoint."""

    shard_set: str
    num_held_out: int
    reference: str
    """Where that stage's output lies, or will."""
    num_measured: int
    """Images of the small evaluation; 0 for none."""
    guidance: float
    seed: int


def preview(uri: str, wanted: Wanted) -> Preview:
    """Samples of a checkpoint's EMA weights, and figures of it."""
    torch.set_num_threads(1)  # beside the training workers
    model = load_model(uri)
    num_classes = model.spec.num_classes
    steps = min(PREVIEW_STEPS, model.schedule.timesteps)
    sampling = model.spec.admissible(SamplingConfig(steps=steps, guidance=wanted.guidance))
    shown: list[int | None] = [None] * 16
    if num_classes:
        shown = [c for c in range(min(num_classes, 10)) for _ in range(PREVIEW_IMAGES_PER_CLASS)]
    device = worker_device()
    engine, seed = Engine(model, rows=ROWS, device=device), key(wanted.seed, "preview") >> 1

    def draw(labels: list[int | None]) -> np.ndarray:
        return engine.draw(
            [ImageRequest(seed, i, label, sampling) for i, label in enumerate(labels)]
        )

    columns = PREVIEW_IMAGES_PER_CLASS * 2 if num_classes else 4
    png = grid(draw(shown), columns)
    held_out = images_at(
        wanted.shard_set, "holdout", choose(wanted.num_held_out, MOST_HELD_OUT, wanted.seed)
    )
    loss = holdout_loss(model, held_out, wanted.seed, device).estimate().value
    figures = {}
    reference = storage.read_manifest(wanted.reference) if wanted.num_measured else None
    if reference is not None and reference.stats["extractor"] is not None:
        labels = [i % num_classes if num_classes else None for i in range(wanted.num_measured)]
        judged = "holdout_accuracy" in reference.stats and num_classes > 0
        found = small_evaluation(draw(labels), labels if judged else None, wanted.reference, device)
        group = f"eval_n{wanted.num_measured}"
        figures = {f"{group}/{name}": value for name, value in found.items()}
    return Preview(model.digest, png, loss, figures)


def small_evaluation(
    pixels: np.ndarray, labels: list[int | None] | None, reference: str, device: torch.device
) -> dict[str, float]:
    """The figures that can be had of a few samples.

    Args:
        labels: what the extractor is to take them for, if it is a judge of their classes.
    """
    extractor = extractor_of(reference, device)
    assert extractor is not None
    found = extractor(pixels)
    drawn = FeatureSet(moments(found.features), found.features, found.log_probs)
    figures, _ = compare(extractor.name, drawn, read_train(reference))
    values = {name: float(figure["value"]) for name, figure in figures.items()}
    if labels is not None and found.log_probs is not None:
        right = found.log_probs.argmax(1) == torch.tensor(labels)
        values["class_accuracy"] = float(right.double().mean())
    return values


class Made(NamedTuple):
    """A preview that is to be logged."""

    step: int
    preview: Preview


class Previews:
    """Previews of checkpoints as they appear, one at a time, outside the training ranks.

    They are made whether MLflow answers or not: the checkpoint may be gone when it does.
    """

    def __init__(self, ctx: StageContext) -> None:
        """Raises StorageError where MLflow cannot say which previews an earlier run has made."""
        self.ctx = ctx
        shards = storage.read_manifest(ctx.inputs["preprocess"])
        assert shards is not None
        config, reference = ctx.config, ctx.beside.get("reference")
        self._wanted = Wanted(
            ctx.inputs["preprocess"],
            int(shards.stats["num_images"]["holdout"]),
            reference or "",
            config.evaluation.during_training if reference else 0,
            config.sampling.guidance,
            config.seed,
        )
        self._added = set(ctx.tracked_run().image_steps("samples"))
        self._waiting: deque[tuple[int, str]] = deque()
        self._running: tuple[int, Any] | None = None
        self._made: deque[Made] = deque()
        gpus = gpus_beside_training(config.cluster)
        self._task = ray.remote(num_cpus=0, num_gpus=gpus, max_retries=3)(preview)

    def add(self, step: int, uri: str) -> None:
        """A checkpoint; the same step again is harmless."""
        if step not in self._added:
            self._added.add(step)
            self._waiting.append((step, uri))

    def make(self, wait: bool = False) -> None:
        """Take in what is done and start what is next; with `wait`, until there is no more."""
        while self._running or self._waiting:
            if self._running is None:
                step, uri = self._waiting.popleft()
                self._running = step, self._task.remote(uri, self._wanted)
            step, result = self._running
            if not ray.wait([result], timeout=None if wait else 0)[0]:
                return
            self._running = None
            try:
                made: Preview = ray.get(result)
                self._made.append(Made(step, made))
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
        weights = averages.of_checkpoints(self.ctx.config.training.ema)
        while self._made:
            step, made = self._made[0]
            figures = {"eval/holdout_loss": made.loss, **made.figures}
            figures = {name: value for name, value in figures.items() if math.isfinite(value)}
            tracking.log_figures(self.ctx, made.digest, step, weights, figures)
            run.log_image("samples", step, made.png)  # last: its presence says that all is there
            self._made.popleft()
