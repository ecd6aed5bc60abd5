"""Evaluate: a checkpoint to figures, each with n, its uncertainty, and how it was measured.

Samples are drawn over the cluster in chunks, whose pixels and features stand in files until the
figures are known: a killed evaluation goes on where it was. Image i of a seed is always the same,
so no figure depends on the number of workers.
"""

import itertools
import json
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import ray
import torch
from torch import Tensor

from pipeline import storage
from pipeline.data.images import grid
from pipeline.data.parts import images_at
from pipeline.evaluation.estimate import share_of
from pipeline.evaluation.figures import (
    Figures,
    compare,
    gather,
    memorisation,
    nearest_in_chunks,
)
from pipeline.evaluation.real_images import (
    extractor_of,
    read_features,
    read_held_out,
    read_tensors,
    read_train,
    write_tensors,
)
from pipeline.pictures.curves import draw_over_steps, draw_timesteps
from pipeline.registry.folder import model_digest
from pipeline.samplers.config import SamplingConfig
from pipeline.samplers.model import ModelSpec
from pipeline.seeding import key
from pipeline.serving.engine import ImageRequest
from tasks.cluster import worker_device
from tasks.stages import averages, in_flight, tracking
from tasks.stages.drawing import IMAGES_PER_TASK, draw
from tasks.stages.held_out import HeldOut
from tasks.stages.stage import Outcome, StageContext

GRID_COLUMNS = 10
SAMPLES = "samples"
"""Files of drawn images, until the figures are known."""
ROWS = IMAGES_PER_TASK
"""Of a network call: full calls whether the images are guided or not, and more rows than a service
takes at once, whose images are to come soon."""
MOST_NEAREST = 500
"""Samples whose nearest training image is looked for."""


# --- in tasks -----------------------------------------------------------------------------------


def draw_to_file(uri: str, requests: list[ImageRequest], reference: str, target: str) -> int:
    """Draw some samples, find their features, and write both; returns how many."""
    drawn = draw(uri, None, requests, "exact", ROWS)
    tensors = {
        "pixels": torch.from_numpy(drawn.pixels),
        "evaluations": torch.from_numpy(drawn.evaluations),
    }
    if extractor := extractor_of(reference, worker_device()):
        found = extractor(drawn.pixels)
        tensors["features"] = found.features
        if found.log_probs is not None:
            tensors["log_probs"] = found.log_probs
    write_tensors(target, tensors)
    return len(requests)


def measure_samples(
    samples: list[str], reference: str, shard_set: str
) -> tuple[Figures, dict[str, str], bytes]:
    """The figures of features, why others are missing, and a sheet of the nearest neighbours."""
    extractor = extractor_of(reference)
    assert extractor is not None
    drawn = gather(_stored(samples, "features"))
    log_probs = list(_stored(samples, "log_probs"))
    if log_probs:
        drawn = replace(drawn, log_probs=torch.cat(log_probs))
    train = read_train(reference)
    figures, skipped = compare(extractor.name, drawn, train)

    held_out, held_out_distances = read_held_out(reference)
    if n := min(len(drawn.some), len(held_out)):  # real images in place of samples, as many
        floor, _ = compare(extractor.name, gather([held_out[:n]]), train)
        as_many, _ = compare(extractor.name, gather([drawn.some[:n]]), train)
        for name in floor:
            figures[name]["floor"] = {
                "n": n,
                "real": floor[name]["value"],
                "samples": as_many[name]["value"],
            }

    few = drawn.some[:MOST_NEAREST]
    distances, rows = nearest_in_chunks(few, read_features(reference, "train"))
    found, missing = memorisation(extractor.name, distances, held_out_distances)
    nearest = distances.argsort()[:GRID_COLUMNS]
    pixels = torch.cat(list(_stored(samples[: -(-len(few) // IMAGES_PER_TASK)], "pixels")))
    real = images_at(shard_set, "train", rows[nearest].numpy()).images
    sheet = grid(np.concatenate([pixels[nearest].numpy(), real]), len(nearest))
    return figures | found, skipped | missing, sheet


def measure_distances(samples: list[str], reference: str) -> tuple[Figures, float]:
    """The figures of features of some samples, and the evaluations that one of them took."""
    extractor = extractor_of(reference)
    assert extractor is not None
    drawn = gather(_stored(samples, "features"))
    figures, _ = compare(extractor.name, drawn, read_train(reference))
    evaluations = torch.cat(list(_stored(samples, "evaluations"))).double().mean()
    return figures, float(evaluations)


def _stored(samples: list[str], name: str) -> Iterator[Tensor]:
    """A tensor of each file of samples that has it."""
    for uri in samples:
        tensors = read_tensors(uri)
        assert tensors is not None  # it was, before any is read
        if name in tensors:
            yield tensors[name]


# --- the stage ----------------------------------------------------------------------------------


def run(ctx: StageContext) -> Outcome:
    """Draw samples of every class in turn and measure them; write metrics.json and pictures."""
    config = ctx.config
    uri, weights = averages.to_measure(ctx)
    info = averages.last_checkpoint(ctx.inputs["train"])
    spec = ModelSpec.model_validate(info.state["spec"])
    sampling = spec.admissible(config.sampling)
    n = config.evaluation.samples
    requests = _requests(config.seed, spec, sampling, n)
    labels, seed = [request.label for request in requests], requests[0].seed

    held_out = HeldOut(ctx, uri)
    samples = _draw(ctx, uri, requests, storage.join(ctx.folder, SAMPLES, "figures"))
    evaluations = torch.cat(list(_stored(samples, "evaluations")))
    protocol: dict[str, Any] = {
        "n": n,
        "weights": weights,
        "seed": seed,
        "sampling": sampling.model_dump(mode="json"),
        "network_evaluations": float(evaluations.double().mean()),  # a guided one counts twice
    }
    pictures = {"grid.png": _sheet(samples, labels)}
    figures, skipped = held_out.figures()
    if "holdout_loss" in figures:
        bits = figures.get("bits_per_dim_elbo", {}).get("per_timestep")
        pictures["timesteps.png"] = draw_timesteps(figures["holdout_loss"]["per_timestep"], bits)
    of_reference = storage.read_manifest(ctx.inputs["reference"])
    assert of_reference is not None
    if of_reference.stats["extractor"] is None:
        skipped["fd"] = (
            "the images have no classes to fit an extractor to: give one, evaluation.extractor"
        )
    else:
        ctx.progress.start(1, "comparison with real images")
        shard_set = ctx.inputs["preprocess"]
        measure = ray.remote(num_cpus=1, max_retries=3)(measure_samples)
        found, missing, pictures["neighbours.png"] = ray.get(
            measure.remote(samples, ctx.inputs["reference"], shard_set)
        )
        if "holdout_accuracy" in of_reference.stats:
            found |= _accuracy(samples, labels, spec, of_reference.stats)
        elif spec.num_classes:
            skipped["class_accuracy"] = (
                "evaluation.extractor takes the place of the classifier that would judge it"
            )
        measured = {
            "sampling": protocol["sampling"],
            "extractor": of_reference.stats["extractor"]["digest"],
            "reference": shard_set.rsplit("/", 1)[-1],
        }
        for figure in found.values():
            figure["measured"] = {"n": figure["n"], **measured}
        figures |= found
        skipped |= missing

        if config.evaluation.over_steps is not None:
            protocol["over_steps"] = _over_steps(ctx, uri, spec)
            pictures["over_steps.png"] = draw_over_steps(protocol["over_steps"])

    metrics = {"protocol": protocol, "figures": figures, "skipped": skipped}
    contents = {"metrics.json": json.dumps(metrics, indent=1).encode(), **pictures}
    files = [
        storage.write_bytes(storage.join(ctx.folder, name), data) for name, data in contents.items()
    ]
    if config.evaluation.sigma_rel is not None:
        files += [storage.entry_of(ctx.folder, path) for path in averages.FILES]
    digest = model_digest(*averages.measured(ctx.inputs["train"], ctx.folder))
    tracking.log_scores(ctx, digest, info.step, weights, figures)
    for name, data in contents.items():
        ctx.tracked_run().log_artifact("evaluation", name, data)
    storage.remove(storage.join(ctx.folder, SAMPLES))
    return Outcome(files, metrics)


def _requests(
    config_seed: int, spec: ModelSpec, sampling: SamplingConfig, n: int
) -> list[ImageRequest]:
    """Images of every class in turn."""
    labels = [i % spec.num_classes if spec.num_classes else None for i in range(n)]
    seed = key(config_seed, "evaluation") >> 1  # within the 63 bits that a request may use
    return [ImageRequest(seed, i, label, sampling) for i, label in enumerate(labels)]


def _draw(ctx: StageContext, uri: str, requests: list[ImageRequest], folder: str) -> list[str]:
    """Files of samples, in their order; those that an earlier run has drawn are there."""
    chunks = [
        requests[start : start + IMAGES_PER_TASK]
        for start in range(0, len(requests), IMAGES_PER_TASK)
    ]
    places = [storage.join(folder, f"{i:05d}.safetensors") for i in range(len(chunks))]
    todo = [i for i, place in enumerate(places) if not _holds(place, len(chunks[i]))]
    drawn = len(requests) - sum(len(chunks[i]) for i in todo)
    ctx.progress.start(len(requests), "samples", drawn)
    task = ray.remote(max_retries=3)(draw_to_file)
    remote = task.options(num_cpus=1, num_gpus=ctx.config.cluster.gpus_per_worker)
    calls = [(uri, chunks[i], ctx.inputs["reference"], places[i]) for i in todo]
    for _, count in in_flight.results(remote, calls):
        drawn += count
        ctx.progress.update(drawn)
    return places


def _over_steps(ctx: StageContext, uri: str, spec: ModelSpec) -> list[dict[str, Any]]:
    """The distances of samples by each sampler with each number of steps that the config names."""
    config = ctx.config.evaluation.over_steps
    assert config is not None
    measure = ray.remote(num_cpus=1, max_retries=3)(measure_distances)
    points = []
    for sampler, steps in itertools.product(config.samplers, config.steps):
        sampling = spec.admissible(config.at(ctx.config.sampling, sampler, steps))
        requests = _requests(ctx.config.seed, spec, sampling, config.samples)
        folder = storage.join(ctx.folder, SAMPLES, f"{sampler}-{steps}")
        samples = _draw(ctx, uri, requests, folder)
        figures, evaluations = ray.get(measure.remote(samples, ctx.inputs["reference"]))
        points.append(
            {"sampler": sampler, "steps": steps, "evaluations": evaluations, "figures": figures}
        )
    return points


def _holds(uri: str, count: int) -> bool:
    """Whether a file of so many samples is there."""
    tensors = read_tensors(uri)
    return tensors is not None and len(tensors["pixels"]) == count


def _accuracy(
    samples: list[str], labels: list[int | None], spec: ModelSpec, reference: dict[str, Any]
) -> Figures:
    """The share of samples that the classifier takes for their class, if there is one."""
    log_probs = list(_stored(samples, "log_probs"))
    if not log_probs or spec.num_classes == 0:
        return {}
    predicted, wanted = torch.cat(log_probs).argmax(1), torch.tensor(labels)
    right = predicted == wanted
    by_class = {
        name: float(right[wanted == i].double().mean())
        for i, name in enumerate(spec.class_names)
        if (wanted == i).any()
    }
    return {
        "class_accuracy": {
            **share_of(right).to_json(),
            "n": len(right),
            "better": "higher",
            "by_class": by_class,
            "judge": "a classifier trained on the real training images",
            "judge_accuracy_on_holdout": reference["holdout_accuracy"],
            "judge_holdout_n": reference["holdout_n"],
        }
    }


def _sheet(samples: list[str], labels: list[int | None]) -> bytes:
    """Samples in rows of a class, or just in rows if there are no classes."""
    classes = sorted({label for label in labels if label is not None})
    if classes:
        rows = [np.flatnonzero(np.array(labels) == label) for label in classes]
        width = min(GRID_COLUMNS, *(len(row) for row in rows))
        shown = np.concatenate([row[:width] for row in rows])
    else:
        width = GRID_COLUMNS
        shown = np.arange(min(len(labels), GRID_COLUMNS**2))
    needed = samples[: int(shown.max()) // IMAGES_PER_TASK + 1]
    return grid(torch.cat(list(_stored(needed, "pixels"))).numpy()[shown], width)
