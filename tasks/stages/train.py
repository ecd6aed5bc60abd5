"""Train: a ShardSet to a checkpoint, data-parallel on Ray Train.

Ray Train starts the workers, joins them in a process group and starts them again when one is lost.
What survives is ours: checkpoints written to storage, found again by their name and their hashes,
so that it makes no difference whether a worker, the driver or the whole cluster went away.

The workers send what they log to a small actor; the driver takes it from there to the terminal and
to MLflow, which only the driver writes to.
"""

import importlib.metadata
import logging
import os
import platform
import threading
import time
from collections import deque
from typing import Any

import numpy as np
import ray
import ray.train
import torch
import yaml
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer
from ray.train.v2._internal.exceptions import WorkerGroupStartupTimeoutError
from ray.util.placement_group import (
    PlacementGroup,
    placement_group_table,
    remove_placement_group,
)
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from pipeline import storage
from pipeline.data.summary import CONTACT_SHEET
from pipeline.errors import ClusterError, ConfigError, StorageError
from pipeline.samplers.model import ModelSpec
from pipeline.training import checkpoint, posthoc
from tasks.cluster import check_room, num_workers, worker_needs
from tasks.stages import tracking
from tasks.stages.previews import Previews
from tasks.stages.stage import Outcome, StageContext
from tasks.stages.train_worker import Job, model_spec, train_worker

MLFLOW_PAUSE, MLFLOW_PATIENCE = 5.0, 600.0
"""Seconds between tries to reach MLflow, and until a trained model gives up."""


@ray.remote(num_cpus=0)
class Reporter:
    """What the workers have to say, kept until the driver asks."""

    def __init__(self) -> None:
        self._records: list[dict[str, Any]] = []

    def push(self, record: dict[str, Any]) -> None:
        self._records.append(record)

    def take(self) -> list[dict[str, Any]]:
        records, self._records = self._records, []
        return records


def run(ctx: StageContext) -> Outcome:
    """Train to config.training.steps, from the last checkpoint if there is one.

    Raises:
        ConfigError: there are fewer training images than a batch has.
        ClusterError: the workers cannot be started.
        TrainingDiverged: the loss or its gradient is not finite.
        StorageError: MLflow is away, and still is MLFLOW_PATIENCE after the last step.
    """
    config = ctx.config
    shards = storage.read_manifest(ctx.inputs["preprocess"])
    assert shards is not None
    num_images = shards.stats["num_images"]["train"]
    if num_images < config.training.batch_size:
        raise ConfigError(
            f"training.batch_size={config.training.batch_size} is more than the {num_images} "
            f"training images of data.source={config.data.source!r}: an epoch would not fill a "
            "batch; lower it, or give more images"
        )
    check_room(config.cluster)
    tracked = ctx.tracked_run()
    class_names = shards.stats["class_names"]
    tracking.log_inputs(ctx, shards, num_parameters(model_spec(config, class_names)))
    sheet = storage.join(ctx.inputs["preprocess"], f"{CONTACT_SHEET}.png")
    tracked.log_image(CONTACT_SHEET, 0, storage.read_bytes(sheet))
    for name, content in (
        ("config.yaml", yaml.safe_dump(config.model_dump(), sort_keys=False)),
        ("environment.txt", environment()),
    ):
        tracked.log_artifact("", name, content.encode())
    ctx.progress.start(config.training.steps, "steps")
    ctx.progress.update(0, "waits for workers")
    reporter = Reporter.options(  # type: ignore[attr-defined]
        # it stays or goes with the driver, whatever becomes of other nodes
        scheduling_strategy=NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=False
        ),
        max_restarts=-1,
        max_task_retries=-1,
    ).remote()
    job = Job(config, ctx.folder, ctx.inputs["preprocess"], class_names, reporter)
    previews = Previews(ctx)
    for info in checkpoint.complete_checkpoints(ctx.folder):
        previews.add(info.step, info.uri)

    failure: list[BaseException] = []

    def fit() -> None:
        try:
            _fit(job)
        except BaseException as error:  # handed to the thread that waits below
            failure.append(error)

    thread = threading.Thread(target=fit, name="fit", daemon=True)
    thread.start()
    history: deque[dict[str, float]] = deque()
    precisions: list[str] = []
    said: set[str] = set()
    try_again = 0.0
    while True:
        alive = thread.is_alive()
        for record in ray.get(reporter.take.remote()):
            if "error" in record:
                raise record["error"]
            if "resumed_at" in record:
                ctx.progress.start(config.training.steps, "steps", record["resumed_at"])
                precisions = [record["precision"]]
            if "checkpoint" in record:
                previews.add(record["step"], record["checkpoint"])
            for name, sentence in record.get("notices", {}).items():
                if name not in said:  # by another worker, or before a restart
                    ctx.progress.say(sentence)
                    said.add(name)
            history.extend(record.get("history", []))
            if history:
                ctx.progress.update(int(history[-1]["step"]), f"loss {history[-1]['loss']:.4f}")
        previews.make()
        if time.monotonic() >= try_again:
            try:
                _log(ctx, history, precisions)
                previews.log()
            except StorageError as error:
                # training does not wait for it, and what was not logged is logged later
                logging.getLogger(__name__).warning("%s", error)
                try_again = time.monotonic() + MLFLOW_PAUSE
        if not alive:
            break
        thread.join(timeout=0.5)
    if failure:
        raise failure[0]
    ctx.progress.update(config.training.steps, "previews")
    info = checkpoint.read(ctx.folder, config.training.steps)
    # a reporter that was lost has not told of all of them
    for kept in checkpoint.complete_checkpoints(ctx.folder):
        previews.add(kept.step, kept.uri)
    previews.make(wait=True)
    begin = time.monotonic()
    while True:
        try:
            # with what a lost reporter did not pass on
            _log(ctx, deque(info.history), [_precision(ctx, info)])
            previews.log()
            break
        except StorageError:
            if time.monotonic() - begin > MLFLOW_PATIENCE:
                raise
            ctx.progress.update(config.training.steps, "waits for MLflow")
            time.sleep(MLFLOW_PAUSE)
    storage.remove(storage.join(ctx.folder, "ray"))
    return _outcome(ctx, info)


def _fit(job: Job) -> None:
    """Train on Ray Train. It restarts lost workers; should its own controller be lost, we do."""
    cluster = job.config.cluster
    workers = num_workers(cluster)
    for remaining in reversed(range(cluster.max_failures + 1)):
        trainer = TorchTrainer(
            train_worker,
            train_loop_config={"job": job},
            torch_config=TorchConfig(timeout_s=cluster.peer_timeout),
            scaling_config=ScalingConfig(
                num_workers=workers,
                use_gpu=cluster.gpus_per_worker > 0,
                resources_per_worker={
                    "CPU": cluster.cpus_per_worker,
                    **({"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {}),
                },
                elastic_resize_monitor_interval_s=cluster.resize_seconds,
            ),
            run_config=RunConfig(
                name="ray",
                storage_path=job.folder,
                failure_config=FailureConfig(
                    max_failures=cluster.max_failures, controller_failure_limit=3
                ),
            ),
        )
        try:
            trainer.fit()
            return
        except ray.exceptions.ActorDiedError:
            if not remaining:
                raise
            _give_back_workers()
        except ray.train.ControllerError as error:
            if not isinstance(error.controller_failure, WorkerGroupStartupTimeoutError):
                raise
            if isinstance(workers, tuple):  # Ray counts whole nodes, whatever else runs there
                workers = workers[0]
                continue
            raise ClusterError(
                f"training could not be started: it {worker_needs(cluster)}, and other work holds "
                "what Ray has: wait for it, or ask for less; the same command goes on"
            ) from error


def _give_back_workers() -> None:
    """Free what a lost controller held for its workers.

    A helper of Ray's does so where there is a dashboard, which a local Ray has not.
    """
    job = ray.get_runtime_context().get_job_id()
    for name, group in placement_group_table().items():
        if name.endswith(job) and group["state"] != "REMOVED":
            remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(name))))


def environment() -> str:
    """The machine of the driver, and the packages it has with their versions."""
    packages = {f"{d.name}=={d.version}" for d in importlib.metadata.distributions()}
    machine = (
        f"# Python {platform.python_version()}, {platform.platform()}, {os.cpu_count()} cores, "
        f"{torch.cuda.device_count()} GPUs"
    )
    return "\n".join([machine, *sorted(packages, key=str.lower), ""])


def _log(ctx: StageContext, history: deque[dict[str, float]], precisions: list[str]) -> None:
    """Log to MLflow and take what is logged from what is given; it stays if MLflow is away."""
    for precision in precisions:
        tracking.log_precision(ctx.tracked_run(), precision)
    precisions.clear()
    if history:
        ctx.tracked_run().log_history(list(history))
        history.clear()


def _precision(ctx: StageContext, info: checkpoint.CheckpointInfo) -> str:
    return info.precision or ctx.config.training.precision


def num_parameters(spec: ModelSpec) -> int:
    """Of the network of a model."""
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in spec.make_network().parameters())


def _outcome(ctx: StageContext, info: checkpoint.CheckpointInfo) -> Outcome:
    name = checkpoint.checkpoint_name(info.step)
    paths = [f"{name}/{file}" for file in [*info.state["files"], checkpoint.STATE]]
    paths += posthoc.snapshot_files(ctx.folder)
    files = [storage.entry_of(ctx.folder, path) for path in paths]
    spec = ModelSpec.model_validate(info.state["spec"])
    rates = [record["images_per_second"] for record in info.history]
    best = checkpoint.read_best(ctx.folder)
    stats = {
        "step": info.step,
        "precision": _precision(ctx, info),
        "loss": info.history[-1]["loss"],
        "num_parameters": num_parameters(spec),
        "images_per_second": float(np.median(rates)),
        "best_step": best.step if best else None,
        "mlflow_run_id": ctx.tracked_run().run_id,
    }
    return Outcome(files, stats)
