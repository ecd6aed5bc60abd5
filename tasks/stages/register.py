"""Register: an evaluated checkpoint to a version in the MLflow registry, with its lineage.

Whether the alias moves to it is the gate's to say: see pipeline/registry/gate.py.
"""

import json
from typing import Any

from pipeline import storage
from pipeline.config import RunConfig
from pipeline.registry.aliases import decide
from pipeline.registry.folder import MODEL_JSON, model_digest, model_files
from pipeline.registry.registration import register
from pipeline.registry.versions import FIGURES_TAG, SERVING_TAG, write_reference
from tasks.stages import averages, tracking
from tasks.stages.stage import Outcome, StageContext


def run(ctx: StageContext) -> Outcome:
    """Copy what was measured into the registry; point the alias at it if the rules hold."""
    ctx.progress.start(1, "model")
    train = storage.read_manifest(ctx.inputs["train"])
    shards = storage.read_manifest(ctx.inputs["preprocess"])
    scores = storage.read_manifest(ctx.inputs["evaluate"])
    assert train is not None and shards is not None and scores is not None
    info = averages.last_checkpoint(ctx.inputs["train"])
    spec, weights = averages.measured(ctx.inputs["train"], ctx.inputs["evaluate"])

    run = ctx.tracked_run()
    # a store that is new to this training has none of it
    tracking.log_inputs(ctx, shards, train.stats["num_parameters"])
    tracking.log_precision(run, info.precision or ctx.config.training.precision)
    run.log_history(info.history)
    lineage = {
        "mlflow_run_id": run.run_id,
        "train_id": train.id,
        "step": info.step,
        "shard_set_id": shards.id,
        "source": shards.stats["source"],
        "source_sha256": shards.stats["source_sha256"],
        "num_images": shards.stats["num_images"],
        "evaluate_id": scores.id,
        "config": ctx.config.model_dump(
            exclude={"storage", "tracking", "cluster", "serving", "registry"}
        ),
        "versions": train.versions,
    }
    grid = storage.read_bytes(storage.join(ctx.inputs["evaluate"], "grid.png"))
    files = model_files(spec, weights, lineage, scores.stats, grid)
    figures = _comparable(scores.stats["figures"])
    words = scores.stats["protocol"]["weights"]
    tracking.log_scores(ctx, model_digest(spec, weights), info.step, words, figures)
    reference = register(run, ctx.config.name, files, _tags(ctx.config, lineage, figures))
    rules = ctx.config.registry
    decision = decide(reference, rules.alias, rules.promote_if, figures, scores.stats["skipped"])
    ctx.progress.update(1)
    entries = [
        write_reference(ctx.folder, reference),
        storage.write_bytes(storage.join(ctx.folder, MODEL_JSON), files[MODEL_JSON]),
    ]
    stats = {
        "version": reference.version,
        "model_digest": reference.digest,
        "promotion": json.loads(decision.to_json()),
    }
    return Outcome(entries, stats, decision.sentence)


def _comparable(figures: dict[str, Any]) -> dict[str, Any]:
    """Of each figure, what the gate compares; a tag has no room for what lists every class."""
    names = ("value", "standard_error", "interval", "n", "better", "measured")
    return {
        name: {key: figure[key] for key in names if key in figure}
        for name, figure in figures.items()
    }


def _tags(config: RunConfig, lineage: dict[str, Any], figures: dict[str, Any]) -> dict[str, str]:
    names = ("train_id", "shard_set_id", "source", "source_sha256", "evaluate_id", "step")
    return {f"ddpm.{name}": str(lineage[name]) for name in names} | {
        SERVING_TAG: json.dumps(config.serving.model_dump()),
        FIGURES_TAG: json.dumps(figures),
    }
