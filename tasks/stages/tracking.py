"""What MLflow is told of a run beside its curves: parameters, a note, the data, the model."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pipeline.config import RunConfig
from pipeline.registry.logged_models import log_model
from pipeline.registry.origin import Origin
from pipeline.registry.runs import TrackedRun
from pipeline.storage import Manifest
from pipeline.training.config import EMA_OWNERS
from tasks.stages.stage import StageContext

if TYPE_CHECKING:
    from tasks.stages.plan import Plan

COMPARED = (
    "seed",
    *(f"data.{key}" for key in ("source", "image_size", "channels")),
    *(f"network.{key}" for key in ("kind", "base_channels", "channel_multipliers", "attention_at")),
    *(f"network.{key}" for key in ("patch_size", "width", "depth")),
    *(f"diffusion.{key}" for key in ("schedule", "timesteps", "prediction")),
    *(f"training.{key}" for key in ("objective", "loss_weight", "steps", "batch_size")),
    *(f"training.{key}" for key in ("lr", "lr_schedule")),
    *(f"training.ema.{key}" for key in ("decay", "half_life", "sigma_rel")),
)
"""The keys of the config by which a person tells trainings apart; config.yaml has all of them."""
PRECISION = "ddpm.precision"
"""Tag of the MLflow run: what it computes in, whatever the config asks for."""


def tracked_run(plan: "Plan", origin: Origin | None = None, command: str = "") -> TrackedRun:
    """The MLflow run of a plan: that of its training, whatever else the config says.

    Args:
        command: that started it, as a person would type it.
    """
    config = plan.config
    note = _note(config, command)
    train_id = plan["train"].id
    return TrackedRun(plan.tracking_uri, config.name, train_id, parameters(config), origin, note)


def parameters(config: RunConfig) -> dict[str, Any]:
    """What of the config a person compares, by its keys; of the average its own kind's settings."""
    values = _flat(config.model_dump())
    kind = config.training.ema.kind
    others = {f"training.ema.{key}" for key, (_, owner) in EMA_OWNERS.items() if owner != kind}
    return {
        # MLflow's pages show what reads as JSON on a line for each of its values
        key: ", ".join(map(str, value)) if isinstance(value := values[key], list) else value
        for key in COMPARED
        if key in values and key not in others
    }


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        flat |= (
            _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        )
    return flat


def _note(config: RunConfig, command: str) -> str:
    """The run's description in MLflow's pages, in Markdown."""
    data, training = config.data, config.training
    size = f"{data.image_size}x{data.image_size}x{data.channels}"
    return "\n\n".join(
        [
            f"Training of the diffusion model `{config.name}` on images of {size} from "
            f"`{data.source}`: {training.steps:,} steps of {training.batch_size:,} images.",
            *([f"```sh\n{command}\n```"] if command else []),
            "Grids of samples are among the model metrics, the whole configuration is in "
            "`config.yaml` among the artifacts.",
        ]
    )


def log_inputs(ctx: StageContext, shards: Manifest, num_parameters: int) -> None:
    """Record what a training starts with: the ShardSet, and the sizes that it and the network have.

    The same again is harmless.
    """
    run, stats = ctx.tracked_run(), shards.stats
    facts = {name: value for name, value in stats.items() if name not in ("bad", "duplicates")}
    run.log_dataset(ctx.config.name, shards.id, ctx.inputs["preprocess"], facts)
    run.log_params(
        {
            "data.num_images": stats["num_images"]["train"],
            "network.num_parameters": num_parameters,
        }
    )


def log_precision(run: TrackedRun, precision: str) -> None:
    """Record what a training computes in, which is known once its workers have seen each other."""
    run.set_tags({PRECISION: precision})
    run.log_params({"training.precision": precision})


def log_figures(
    ctx: StageContext,
    digest: str,
    step: int,
    weights: str,
    figures: Mapping[str, float],
    sigma_rel: float | None = None,
) -> None:
    """Record figures of a model of a training, at the step that gave it.

    Args:
        weights: which they are, in words.
        sigma_rel: of weights that are not the checkpoint's own average.
    """
    run, name = ctx.tracked_run(), f"{ctx.config.name}-step-{step}"
    if sigma_rel is not None:
        name += f"-sigma_rel-{sigma_rel:g}"
    note = (
        f"The model after {step:,} steps ({weights}). Its weights are among the artifacts if it is "
        "registered, and else with the checkpoints of its run."
    )
    params = {"step": step, "weights": weights}
    model_id = log_model(run, name, digest, step, params, note)
    data = (ctx.config.name, ctx.inputs["preprocess"].rsplit("/", 1)[-1])
    run.log_figures(step, figures, model_id, data)


def log_scores(
    ctx: StageContext, digest: str, step: int, weights: str, figures: Mapping[str, Any]
) -> None:
    """Record the figures of an evaluation, as metrics.json has them. The same again is harmless."""
    # the loss on held-out images has a curve of its own, of all checkpoints
    values = {f"eval/{name}": of["value"] for name, of in figures.items() if name != "holdout_loss"}
    log_figures(ctx, digest, step, weights, values, ctx.config.evaluation.sigma_rel)
