"""Register: an evaluated checkpoint to a version in the MLflow registry, with its lineage."""

import json
from typing import Any

import ray

from pipeline import storage
from pipeline.config import RunConfig
from pipeline.registry.models import (
    MODEL_JSON,
    SERVING_TAG,
    ModelReference,
    find_version,
    model_files,
    read_checkpoint,
    register,
    set_alias,
)
from pipeline.training import checkpoint
from tasks.stage import Outcome, StageContext

REFERENCE_JSON = "registered.json"
"""The stage's output: name, version, digest and registry of the model."""


def read_reference(folder: str) -> ModelReference:
    """The version that a finished registration made."""
    return ModelReference(**storage.read_json(storage.join(folder, REFERENCE_JSON)))


def still_registered(folder: str, tracking_uri: str) -> bool:
    """Whether the version that the output speaks of is in the registry that is used now."""
    reference = read_reference(folder)
    found = find_version(reference.name, reference.digest, tracking_uri)
    return found is not None and reference.tracking_uri == tracking_uri


def run(ctx: StageContext) -> Outcome:
    """Copy the EMA weights into the registry and point the alias at the version."""
    ctx.progress.start(1, "model")
    train = storage.read_manifest(ctx.inputs["train"])
    shards = storage.read_manifest(ctx.inputs["preprocess"])
    scores = storage.read_manifest(ctx.inputs["evaluate"])
    assert train is not None and shards is not None and scores is not None
    info = checkpoint.read(ctx.inputs["train"], train.stats["step"])
    spec, weights = read_checkpoint(info.uri)

    run = ctx.tracked_run()
    run.log_history(info.history)  # a store that is new to this training has none of it
    lineage = {
        "mlflow_run_id": run.run_id,
        "train_id": train.id,
        "step": info.step,
        "shard_set_id": shards.id,
        "source": shards.stats["source"],
        "source_sha256": shards.stats["source_sha256"],
        "evaluate_id": scores.id,
        "config": ctx.config.model_dump(exclude={"storage", "tracking", "cluster", "serving"}),
        "ray": ray.__version__,
    }
    files = model_files(spec, weights, lineage)
    reference = register(run, ctx.config.name, files, _tags(ctx.config, lineage, scores.stats))
    set_alias(reference, ctx.config.registry.alias)
    ctx.progress.update(1)
    entries = [
        storage.write_json(storage.join(ctx.folder, REFERENCE_JSON), vars(reference)),
        storage.write_bytes(storage.join(ctx.folder, MODEL_JSON), files[MODEL_JSON]),
    ]
    return Outcome(entries, {"version": reference.version, "model_digest": reference.digest})


def _tags(config: RunConfig, lineage: dict[str, Any], scores: dict[str, Any]) -> dict[str, str]:
    names = ("train_id", "shard_set_id", "source", "source_sha256", "evaluate_id", "step")
    serving = json.dumps(config.serving.model_dump())
    tags = {f"ddpm.{name}": str(lineage[name]) for name in names} | {SERVING_TAG: serving}
    if "class_accuracy" in scores:
        tags["ddpm.class_accuracy"] = f"{scores['class_accuracy']['value']:.4f}"
    return tags
