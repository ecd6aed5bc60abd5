"""Reference: what samples are compared with, computed once of a ShardSet; runs beside training.

The extractor of features is the user's file or a classifier fitted to the training images, which is
also the judge of conditional samples. Of every image its features are found, in tasks of a few
thousand images each, and of these what is kept; see pipeline/evaluation/real_images.py. What is
finished stands in files, so a killed run goes on.
"""

import itertools
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import ray

from pipeline import storage
from pipeline.data.parts import Part, Parts, choose, images_at, read_parts
from pipeline.data.shards import NO_LABEL, SPLITS
from pipeline.evaluation import extractors, real_images
from pipeline.evaluation.features import train_classifier
from tasks.cluster import gpus_beside_training, worker_device
from tasks.stages import in_flight
from tasks.stages.stage import Outcome, StageContext

IMAGES_PER_FILE = 8192
MOST_TO_FIT, MOST_TO_JUDGE = 60_000, 10_000
"""Images that the classifier is fitted to, and that its accuracy is of."""


def fit_classifier(
    shard_set: str, folder: str, name: str, num_classes: int, seed: int, epochs: int
) -> None:
    """Fit the classifier and keep it as the extractor of `folder`, unless no image has a label."""
    manifest = storage.read_manifest(shard_set)
    assert manifest is not None
    train, holdout = (
        images_at(shard_set, split, choose(manifest.stats["num_images"][split], most, seed))
        for split, most in (("train", MOST_TO_FIT), ("holdout", MOST_TO_JUDGE))
    )
    if (train.labels != NO_LABEL).any():
        classifier = train_classifier(train, holdout, num_classes, seed, epochs, worker_device())
        extractors.keep_classifier(folder, name, classifier)


def extract(folder: str, parts: list[Part], path: str) -> None:
    """The features of some parts, on the device of the task."""
    real_images.extract(folder, parts, path, worker_device())


def run(ctx: StageContext) -> Outcome:
    """Make the extractor, then the features; images without classes may have neither."""
    config, shard_set = ctx.config.evaluation, ctx.inputs["preprocess"]
    manifest = storage.read_manifest(shard_set)
    assert manifest is not None
    ctx.progress.start(1, "extractor")
    gpus = gpus_beside_training(ctx.config.cluster)
    if config.extractor is not None:
        extractors.keep_file(ctx.folder, config.extractor)
    elif len(manifest.stats["class_names"]) >= 2 and not extractors.describe(ctx.folder):
        fit = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=3)(fit_classifier)
        num_classes, epochs = len(manifest.stats["class_names"]), config.classifier_epochs
        arguments = (shard_set, ctx.folder, ctx.config.name, num_classes, ctx.config.seed, epochs)
        ray.get(fit.remote(*arguments))
    facts = extractors.describe(ctx.folder)
    if not facts:
        return Outcome([], {"extractor": None})

    files = {}
    for split in [split for split in SPLITS if manifest.stats["num_images"][split]]:
        for number, group in enumerate(_in_groups(read_parts(shard_set, split))):
            files[real_images.features_path(split, number)] = group
    calls = [
        (ctx.folder, group, path)
        for path, group in files.items()
        if real_images.read_tensors(storage.join(ctx.folder, path)) is None
    ]
    done = len(files) - len(calls)
    ctx.progress.start(len(files), "files of features", done)
    task = ray.remote(num_cpus=1, num_gpus=gpus, max_retries=3)(extract)
    for _ in in_flight.results(task, calls):
        done += 1
        ctx.progress.update(done)
    summarise = ray.remote(num_cpus=1, max_retries=3)(real_images.summarise)
    ray.get(summarise.remote(ctx.folder, ctx.config.seed))

    paths = [extractors.DESCRIPTION, real_images.TRAIN, *files]
    if manifest.stats["num_images"]["holdout"]:
        paths.append(real_images.HOLDOUT)
    stats: dict[str, Any] = {"extractor": facts}
    if config.extractor is not None:
        paths.append(extractors.WEIGHTS)
    else:
        paths += extractors.CLASSIFIER
        classifier = extractors.load_classifier(ctx.folder)
        accuracy = classifier.holdout_accuracy
        stats["holdout_accuracy"] = accuracy if math.isfinite(accuracy) else None
        stats["holdout_n"] = classifier.holdout_n
    return Outcome([storage.entry_of(ctx.folder, path) for path in paths], stats)


def _in_groups(parts: Parts) -> Iterator[list[Part]]:
    """Parts that follow each other, of about IMAGES_PER_FILE images together."""
    number = (np.cumsum(parts.num_images) - parts.num_images) // IMAGES_PER_FILE
    pairs = zip(number.tolist(), parts, strict=True)
    for _, group in itertools.groupby(pairs, key=lambda pair: pair[0]):
        yield [part for _, part in group]
