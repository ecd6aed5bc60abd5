"""Reference: the judge of samples, a classifier fitted to the real images; runs beside training."""

import math
from typing import Any

import ray

from pipeline import storage
from pipeline.data.shards import NO_LABEL, read_split
from pipeline.evaluation.features import to_files, train_classifier
from pipeline.storage import FileEntry
from tasks.stage import Outcome, StageContext


def fit_reference(
    shard_set: str, folder: str, num_classes: int, seed: int, epochs: int
) -> tuple[list[FileEntry], dict[str, Any]]:
    """Fit the classifier and write it below `folder`."""
    train, holdout = read_split(shard_set, "train"), read_split(shard_set, "holdout")
    if (train.labels == NO_LABEL).all():
        return [], {"holdout_accuracy": None}
    classifier = train_classifier(train, holdout, num_classes, seed, epochs)
    files = [
        storage.write_bytes(storage.join(folder, name), data)
        for name, data in to_files(classifier).items()
    ]
    accuracy = classifier.holdout_accuracy
    stats = {
        "holdout_accuracy": accuracy if math.isfinite(accuracy) else None,
        "holdout_n": classifier.holdout_n,
        "train_n": len(train),
    }
    return files, stats


def run(ctx: StageContext) -> Outcome:
    """Fit the judge; images without classes have none, and the output is empty."""
    manifest = storage.read_manifest(ctx.inputs["preprocess"])
    assert manifest is not None
    num_classes = len(manifest.stats["class_names"])
    ctx.progress.start(1, "classifier")
    if num_classes < 2:
        return Outcome([], {"holdout_accuracy": None})
    task = ray.remote(num_cpus=1, max_retries=3)(fit_reference)
    files, stats = ray.get(
        task.remote(
            ctx.inputs["preprocess"],
            ctx.folder,
            num_classes,
            ctx.config.seed,
            ctx.config.evaluation.classifier_epochs,
        )
    )
    ctx.progress.update(1)
    return Outcome(files, stats)
