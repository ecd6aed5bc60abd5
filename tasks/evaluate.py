"""Evaluate: a checkpoint to scores, with n, sampler, steps, guidance and weights stated."""

import json
import math
from typing import Any

import numpy as np
import ray

from pipeline import storage
from pipeline.data.images import grid
from pipeline.data.shards import read_split
from pipeline.diffusion.elbo import Elbo
from pipeline.evaluation.features import TrainedClassifier, from_files
from pipeline.evaluation.likelihood import (
    OdeBits,
    Trace,
    choose,
    elbo_of,
    ode_bits_of,
    summarise_elbo,
    summarise_ode,
)
from pipeline.evaluation.metrics import class_accuracy, holdout_loss
from pipeline.registry.models import load_model
from pipeline.samplers.model import ModelSpec
from pipeline.seeding import key
from pipeline.serving.engine import ImageRequest
from pipeline.training.checkpoint import checkpoint_name
from tasks.cluster import worker_device
from tasks.fanout import cached_model, draw_on_cluster
from tasks.stage import Outcome, StageContext

GRID_COLUMNS = 10


def checkpoint_uri(train_folder: str) -> str:
    """The final checkpoint of a finished training."""
    manifest = storage.read_manifest(train_folder)
    assert manifest is not None
    return storage.join(train_folder, checkpoint_name(manifest.stats["step"]))


def measure_holdout(uri: str, shard_set: str, seed: int) -> tuple[float, float, int]:
    """The loss of a checkpoint on held-out images, its standard error, and their number."""
    images = read_split(shard_set, "holdout")
    loss, error = holdout_loss(load_model(uri), images, seed)
    return loss, error, len(images)


def measure_elbo(uri: str, shard_set: str, positions: np.ndarray, seed: int) -> Elbo:
    """The variational bound of some held-out images, in this process."""
    images = read_split(shard_set, "holdout")
    return elbo_of(cached_model(uri, None), images, positions, seed, worker_device())


def measure_ode_bits(
    uri: str, shard_set: str, positions: np.ndarray, seed: int, trace: Trace, draws: int
) -> OdeBits:
    """The likelihood of some held-out images by the ODE, in this process."""
    images, device = read_split(shard_set, "holdout"), worker_device()
    return ode_bits_of(cached_model(uri, None), images, positions, seed, trace, draws, device)


def run(ctx: StageContext) -> Outcome:
    """Draw samples of every class in turn and judge them; write metrics.json and grid.png."""
    config = ctx.config
    uri = checkpoint_uri(ctx.inputs["train"])
    spec = ModelSpec.model_validate(storage.read_json(storage.join(uri, "state.json"))["spec"])
    n, num_classes = config.evaluation.samples, spec.num_classes
    sampling = spec.admissible(config.sampling)
    labels = [i % num_classes if num_classes else None for i in range(n)]
    seed = key(config.seed, "evaluation") >> 1  # within the 63 bits that a request may use
    requests = [ImageRequest(seed, i, label, sampling) for i, label in enumerate(labels)]

    ctx.progress.start(n, "samples")
    holdout = ray.remote(num_cpus=1, max_retries=3)(measure_holdout).remote(
        uri, ctx.inputs["preprocess"], config.seed
    )
    pixels = np.empty((n, spec.image_size, spec.image_size, spec.channels), np.uint8)
    drawn = 0
    gpus = config.cluster.gpus_per_worker
    evaluations = np.empty(n, np.int64)
    for start, chunk in draw_on_cluster(uri, None, requests, "exact", gpus):
        rows = slice(start, start + len(chunk.pixels))
        pixels[rows], evaluations[rows] = chunk
        drawn += len(chunk.pixels)
        ctx.progress.update(drawn)
    protocol = {
        "n": n,
        "weights": "ema",
        "seed": seed,
        "sampling": sampling.model_dump(),
        "network_evaluations": float(evaluations.mean()),  # a guided one counts twice
    }
    metrics: dict[str, Any] = {"protocol": protocol}
    loss, error, count = ray.get(holdout)
    if count:
        metrics["holdout_loss"] = {
            "value": loss,
            "standard_error": error if math.isfinite(error) else None,
            "n": count,
        }
    if bits := _bits_per_dim(ctx, uri, count):
        metrics["bits_per_dim"] = bits
    judge = _judge(ctx.inputs["reference"])
    if judge is not None:
        metrics["class_accuracy"] = _accuracy(judge, pixels, labels, spec, ctx.inputs["reference"])

    contents = {
        "metrics.json": json.dumps(metrics, indent=1).encode(),
        "grid.png": _sheet(pixels, labels),
    }
    files = [
        storage.write_bytes(storage.join(ctx.folder, name), data) for name, data in contents.items()
    ]
    _record(ctx, metrics, contents)
    return Outcome(files, metrics)


def _bits_per_dim(ctx: StageContext, uri: str, held_out: int) -> dict[str, Any]:
    """The likelihoods that the config asks for, of `held_out` images at most, on the cluster."""
    config, shard_set = ctx.config.evaluation, ctx.inputs["preprocess"]
    seed, gpus = ctx.config.seed, ctx.config.cluster.gpus_per_worker
    elbo, ode = (
        ray.remote(num_cpus=1, num_gpus=gpus, max_retries=3)(measure)
        for measure in (measure_elbo, measure_ode_bits)
    )
    parts: dict[str, list[Any]] = {
        "elbo": [
            elbo.remote(uri, shard_set, positions, seed)
            for positions in choose(config.elbo_images, held_out, seed)
        ],
        "ode": [
            ode.remote(uri, shard_set, positions, seed, config.ode_trace, config.ode_draws)
            for positions in choose(config.ode_images, held_out, seed)
        ],
    }
    running = [part for chunks in parts.values() for part in chunks]
    if running:
        ctx.progress.start(len(running), "likelihoods")
    for done in range(1, len(running) + 1):
        ray.wait(running, num_returns=done)
        ctx.progress.update(done)
    result = {}
    if parts["elbo"]:
        result["elbo"] = summarise_elbo(ray.get(parts["elbo"]))
    if parts["ode"]:
        result["ode"] = summarise_ode(ray.get(parts["ode"]), config.ode_trace)
    return result


def _judge(folder: str) -> TrainedClassifier | None:
    manifest = storage.read_manifest(folder)
    if manifest is None or not manifest.files:
        return None
    names = [entry.path for entry in manifest.files]
    return from_files({name: storage.read_bytes(storage.join(folder, name)) for name in names})


def _accuracy(
    judge: TrainedClassifier,
    pixels: np.ndarray,
    labels: list[int | None],
    spec: ModelSpec,
    reference: str,
) -> dict[str, Any]:
    wanted = np.array(labels)
    share, error, predicted = class_accuracy(judge, pixels, wanted)
    by_class = {
        name: float((predicted[wanted == i] == i).mean())
        for i, name in enumerate(spec.class_names)
        if (wanted == i).any()
    }
    ceiling = judge.holdout_accuracy
    return {
        "value": share,
        "standard_error": error,
        "by_class": by_class,
        "judge": "a classifier trained on the real training images",
        "judge_id": reference.rsplit("/", 1)[-1],
        "judge_accuracy_on_holdout": ceiling if math.isfinite(ceiling) else None,
        "judge_holdout_n": judge.holdout_n,
    }


def _sheet(pixels: np.ndarray, labels: list[int | None]) -> bytes:
    """Samples in rows of a class, or just in rows if there are no classes."""
    classes = sorted({label for label in labels if label is not None})
    if not classes:
        return grid(pixels[: GRID_COLUMNS**2], GRID_COLUMNS)
    rows = [np.flatnonzero(np.array(labels) == label) for label in classes]
    width = min(GRID_COLUMNS, *(len(row) for row in rows))
    return grid(pixels[np.concatenate([row[:width] for row in rows])], width)


def _record(ctx: StageContext, metrics: dict[str, Any], files: dict[str, bytes]) -> None:
    """Add the figures and the files to the MLflow run."""
    run = ctx.tracked_run()
    figures = {
        f"bits_per_dim_{name}": found["value"]
        for name, found in metrics.get("bits_per_dim", {}).items()
    }
    if "class_accuracy" in metrics:
        figures["class_accuracy"] = metrics["class_accuracy"]["value"]
    if figures:
        run.log_figures(ctx.config.training.steps, figures)
    for name, data in files.items():
        run.log_artifact("evaluation", name, data)
