"""Figures of held-out images: the loss and the likelihoods of a checkpoint, in tasks."""

import numpy as np
import ray

from pipeline import storage
from pipeline.data.parts import choose, images_at
from pipeline.diffusion.elbo import Elbo
from pipeline.evaluation.config import Trace
from pipeline.evaluation.figures import Figures
from pipeline.evaluation.likelihood import (
    OdeBits,
    choose_chunks,
    elbo_of,
    ode_bits_of,
    summarise_elbo,
    summarise_ode,
)
from pipeline.evaluation.metrics import MOST_HELD_OUT, HoldoutLoss, holdout_loss
from pipeline.loading import load_model
from tasks.cluster import worker_device
from tasks.stages.drawing import cached_model
from tasks.stages.stage import StageContext


def measure_holdout(uri: str, shard_set: str, held_out: int, seed: int) -> HoldoutLoss:
    """The loss of a checkpoint on held-out images."""
    images = images_at(shard_set, "holdout", choose(held_out, MOST_HELD_OUT, seed))
    return holdout_loss(load_model(uri), images, seed, worker_device())


def measure_elbo(uri: str, shard_set: str, positions: np.ndarray, seed: int) -> Elbo:
    """The variational bound of some held-out images."""
    images = images_at(shard_set, "holdout", positions)
    return elbo_of(cached_model(uri, None), images, positions, seed, worker_device())


def measure_ode_bits(
    uri: str, shard_set: str, positions: np.ndarray, seed: int, trace: Trace, draws: int
) -> OdeBits:
    """The likelihood of some held-out images by the ODE."""
    images, device = images_at(shard_set, "holdout", positions), worker_device()
    return ode_bits_of(cached_model(uri, None), images, positions, seed, trace, draws, device)


class HeldOut:
    """They are computed while the caller does something else."""

    def __init__(self, ctx: StageContext, uri: str) -> None:
        self.ctx = ctx
        config, shard_set = ctx.config.evaluation, ctx.inputs["preprocess"]
        shards = storage.read_manifest(shard_set)
        assert shards is not None
        seed, gpus = ctx.config.seed, ctx.config.cluster.gpus_per_worker
        self.held_out = int(shards.stats["num_images"]["holdout"])
        loss, elbo, ode = (
            ray.remote(num_cpus=1, num_gpus=gpus, max_retries=3)(measure)
            for measure in (measure_holdout, measure_elbo, measure_ode_bits)
        )
        self.loss = loss.remote(uri, shard_set, self.held_out, seed) if self.held_out else None
        self.elbo = [
            elbo.remote(uri, shard_set, positions, seed)
            for positions in choose_chunks(config.elbo_images, self.held_out, seed)
        ]
        self.ode = [
            ode.remote(uri, shard_set, positions, seed, config.ode_trace, config.ode_draws)
            for positions in choose_chunks(config.ode_images, self.held_out, seed)
        ]

    def figures(self) -> tuple[Figures, dict[str, str]]:
        """Waits for them."""
        config = self.ctx.config
        if self.loss is None:
            return {}, {"holdout_loss": "no image was held out: raise data.holdout"}
        running = [self.loss, *self.elbo, *self.ode]
        self.ctx.progress.start(len(running), "parts of held-out figures")
        for done in range(1, len(running) + 1):
            ray.wait(running, num_returns=done)
            self.ctx.progress.update(done)
        loss: HoldoutLoss = ray.get(self.loss)
        found: Figures = {
            "holdout_loss": {
                **loss.estimate().to_json(),
                "per_timestep": loss.curve(),
                "n": min(self.held_out, MOST_HELD_OUT),
                # it is the loss in the model's own parameterisation
                "prediction": config.diffusion.prediction,
            }
        }
        if self.elbo:
            found["bits_per_dim_elbo"] = summarise_elbo(ray.get(self.elbo))
        if self.ode:
            found["bits_per_dim_ode"] = summarise_ode(
                ray.get(self.ode), config.evaluation.ode_trace
            )
        same = ("n", "prediction", "trace", "draws", "clip_x_0", "rtol", "atol")
        measured = {
            "held_out": self.ctx.inputs["preprocess"].rsplit("/", 1)[-1],
        }
        for figure in found.values():
            figure["better"] = "lower"
            figure["measured"] = measured | {name: figure[name] for name in same if name in figure}
        return found, {}
