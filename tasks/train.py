"""Train: a ShardSet to a checkpoint, data-parallel on Ray Train.

Ray Train starts the workers, joins them in a process group and starts them again when one is lost.
What survives is ours: checkpoints written to storage by rank 0, found again by their name and their
hashes, so that it makes no difference whether a worker, the driver or the whole cluster went away.

The workers send what they log to a small actor; the driver takes it from there to the terminal and
to MLflow, which only the driver writes to.
"""

import contextlib
import importlib.metadata
import logging
import math
import os
import platform
import secrets
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import ray.train
import ray.train.collective
import ray.train.torch
import torch
import yaml
from ray.train import FailureConfig, RunConfig, ScalingConfig
from ray.train.torch import TorchConfig, TorchTrainer

from pipeline import storage
from pipeline.config import RunConfig as PipelineConfig
from pipeline.data.batches import Batches, FullShuffle, Shuffle, prefetch
from pipeline.data.cache import memory_mapped
from pipeline.data.images import grid
from pipeline.data.parts import keys_at, read_parts
from pipeline.data.shards import read_split
from pipeline.data.summary import CONTACT_SHEET
from pipeline.data.windows import WindowedShuffle
from pipeline.diffusion.schedules import make_schedule
from pipeline.errors import ConfigError, PipelineError, StorageError, TrainingDiverged
from pipeline.evaluation.metrics import holdout_loss
from pipeline.networks.backbone import set_checkpointing
from pipeline.registry.models import load_model
from pipeline.samplers.model import ModelSpec
from pipeline.samplers.plan import SamplingConfig
from pipeline.seeding import key
from pipeline.serving.engine import Engine, ImageRequest
from pipeline.storage import FileEntry
from pipeline.training import checkpoint, parallel, posthoc
from pipeline.training.config import HALF, TrainingConfig
from pipeline.training.loop import TrainState, make_state, train
from pipeline.training.watch import Watch, measured_peak, training_flops
from tasks.stage import Outcome, StageContext

NAMED_IMAGES = 3
"""In the sentence that says which step is not finite."""
MLFLOW_PAUSE, MLFLOW_PATIENCE = 5.0, 600.0
"""Seconds between tries to reach MLflow, and until a trained model gives up."""
PREVIEW_STEPS = 25
PREVIEW_IMAGES_PER_CLASS = 4


def model_spec(config: PipelineConfig, class_names: list[str]) -> ModelSpec:
    """The model that a config trains on images of these classes."""
    return ModelSpec(
        network=config.network,
        diffusion=config.diffusion,
        channels=config.data.channels,
        image_size=config.data.image_size,
        class_names=class_names,
        has_null_label=bool(class_names) and config.training.label_dropout > 0,
    )


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


@dataclass(frozen=True)
class Job:
    """What a training worker is told."""

    config: PipelineConfig
    folder: str
    shard_set: str
    class_names: list[str]
    reporter: Any


def train_worker(job: dict[str, Job]) -> None:
    """The life of one rank. An error of ours would come again after a restart: it is reported."""
    try:
        _train_rank(job["job"])
    except PipelineError as error:
        ray.get(job["job"].reporter.push.remote({"error": error}))
        # the other ranks may wait for this one, so the group must end with it
        raise


def _train_rank(job: Job) -> None:
    config, training = job.config, job.config.training
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(config.cluster.cpus_per_worker)
    # by itself, cuDNN would round the factors of its convolutions
    fp32 = "tf32" if training.precision == "tf32" else "ieee"
    torch.backends.cudnn.fp32_precision = fp32
    torch.backends.cuda.matmul.fp32_precision = fp32
    rank, world_size = parallel.rank_and_world_size()

    spec = model_spec(config, job.class_names)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(config.seed, "init"))
        network = spec.make_network().to(device)
    set_checkpointing(network, training.recompute)
    if training.parallel == "fsdp" and world_size > 1:
        parallel.cut(network, device)
    state = make_state(network, training, config.diffusion.timesteps)
    found = checkpoint.latest_sound(job.folder) if rank == 0 else None
    # rank 0 decides: a checkpoint may appear or go while the others look
    step = parallel.from_rank_zero(found.step if found else 0, device)
    attempt = parallel.from_rank_zero(secrets.randbits(63), device)
    history: list[dict[str, float]] = []
    if step:
        info = found or checkpoint.read(job.folder, step)
        checkpoint.load(info, state)
        history = info.history
    if rank == 0:
        job.reporter.push.remote({"resumed_at": step, "history": history})

    shuffle = open_shuffle(job)
    batches = Batches(shuffle, rank, world_size, training.label_dropout, training.augmentation)
    # one node may have to decode the data for longer than the process group's operations may take
    ray.train.collective.barrier()
    forward = parallel.wrap(network, device)
    schedule = None if config.diffusion.schedule == "learned" else make_schedule(config.diffusion)
    watch = make_watch(spec, training, device)

    def written(info: checkpoint.CheckpointInfo) -> None:
        job.reporter.push.remote({"checkpoint": info.uri, "step": info.step})

    with (
        checkpoint.Writer(
            job.folder, spec.model_dump(), training.keep_checkpoints, written, attempt
        ) as writer,
        contextlib.closing(shuffle),
        contextlib.closing(prefetch(batches, step, training.steps)) as coming,
    ):
        for record in train(
            state,
            forward,
            coming,
            config.diffusion,
            schedule,
            training,
            spec.num_classes,
            config.seed,
            device,
        ):
            watch.add(record)
            last = record.step == training.steps
            if record.step % training.log_every == 0 or last:
                figures, bad_step = watch.take()
                if bad_step is not None:  # the same on all ranks; nothing of it is saved
                    raise TrainingDiverged(why_diverged(job, bad_step, shuffle))
                history.append({"step": record.step, **figures})
                if rank == 0:
                    job.reporter.push.remote({"history": history[-1:]})
            if record.step % training.checkpoint_every == 0 or last:
                writer.save(state, history)
            if snapshot_falls_on(record.step, training):
                save_snapshots(job, state, rank)


def make_watch(spec: ModelSpec, training: TrainingConfig, device: torch.device) -> Watch:
    with torch.device("meta"):  # to count operations nothing need be computed
        network = spec.make_network()
    shape = (spec.channels, spec.image_size, spec.image_size)
    dtype = HALF.get(training.precision, torch.float32)
    return Watch(
        training.batch_size,
        training_flops(network, shape, spec.num_classes),
        measured_peak(device, dtype),
        may_overflow=training.precision == "float16",
    )


def save_snapshots(job: Job, state: TrainState, rank: int) -> None:
    """Keep the power averages of this step; all ranks call it."""
    widths = job.config.training.ema.sigma_rel
    averages = {
        sigma_rel: {name: parallel.whole(tensor) for name, tensor in weights.items()}
        for sigma_rel, weights in zip(widths, state.ema.averages.values(), strict=True)
    }
    if rank == 0:
        posthoc.save_snapshots(job.folder, state.step, averages)


def snapshot_falls_on(step: int, training: TrainingConfig) -> bool:
    """Whether the averages after `step` steps are kept, for others to be made from them."""
    ema = training.ema
    return ema.kind == "power" and posthoc.snapshot_due(step, training.steps, ema.num_snapshots)


def why_diverged(job: Job, step: int, shuffle: Shuffle) -> str:
    """What to say of a step (from 1) that is not finite; its images are listed in a file."""
    keys = keys_at(read_parts(job.shard_set, "train"), shuffle.indices(step - 1))
    listed = storage.join(job.folder, f"diverged-{step:09d}.json")
    storage.write_json(listed, {"step": step, "images": keys})
    return (
        f"the training loss or its gradient is not finite at step {step}, on the images "
        f"{', '.join(keys[:NAMED_IMAGES])}, ... (all {len(keys)} are in {listed}); the checkpoints "
        "before it are kept: try a lower training.lr, more training.warmup_steps or less "
        "training.grad_clip"
    )


def open_shuffle(job: Job) -> Shuffle:
    """The training images in the order that the config asks for."""
    config, training = job.config, job.config.training
    if training.shuffle == "full":
        images, labels = memory_mapped(job.shard_set, "train", config.cluster.cache)
        return FullShuffle(images, labels, config.seed, training.batch_size)
    parts = read_parts(job.shard_set, "train")
    window, lanes = training.shuffle_window, training.shuffle_lanes
    return WindowedShuffle(parts, config.seed, training.batch_size, window, lanes)


def preview(uri: str, shard_set: str, guidance: float, seed: int) -> tuple[bytes, float]:
    """A grid of samples from a checkpoint's EMA weights, and their loss on held-out images."""
    torch.set_num_threads(1)  # beside the training workers
    model = load_model(uri)
    num_classes = model.spec.num_classes
    steps = min(PREVIEW_STEPS, model.schedule.timesteps)
    sampling = model.spec.admissible(SamplingConfig(steps=steps, guidance=guidance))
    labels: list[int | None] = [None] * 16
    if num_classes:
        labels = [c for c in range(min(num_classes, 10)) for _ in range(PREVIEW_IMAGES_PER_CLASS)]
    requests = [
        ImageRequest(key(seed, "preview") >> 1, i, label, sampling)
        for i, label in enumerate(labels)
    ]
    pixels = Engine(model).draw(requests)
    columns = PREVIEW_IMAGES_PER_CLASS * 2 if num_classes else 4
    loss, _ = holdout_loss(model, read_split(shard_set, "holdout"), seed)
    return grid(pixels, columns), loss


class Previews:
    """Previews of checkpoints as they appear, one at a time, outside the training ranks."""

    def __init__(self, ctx: StageContext) -> None:
        self.ctx = ctx
        self._waiting: deque[tuple[int, str]] = deque()
        self._running: tuple[int, Any] | None = None
        self._task = ray.remote(num_cpus=0, max_retries=1)(preview)

    def add(self, step: int, uri: str) -> None:
        self._waiting.append((step, uri))

    def poll(self, wait: bool = False) -> None:
        """Log what is done and start what is next; with `wait`, until there is no more.

        Raises:
            StorageError: MLflow cannot be used; the next call takes up where this one stopped.
        """
        while self._running or self._waiting:
            if self._running is None:
                step, uri = self._waiting[0]
                is_there = self.ctx.tracked_run().has_image("samples", step)
                self._waiting.popleft()
                if is_there:
                    continue
                config = self.ctx.config
                result = self._task.remote(
                    uri, self.ctx.inputs["preprocess"], config.sampling.guidance, config.seed
                )
                self._running = (step, result)
            step, result = self._running
            if not ray.wait([result], timeout=None if wait else 0)[0]:
                return
            try:
                png, loss = ray.get(result)
            except ray.exceptions.RayError as error:
                # such as a checkpoint pruned before it was read: training goes on, a preview less
                logging.getLogger(__name__).warning("no preview of step %d: %s", step, error)
            else:
                run = self.ctx.tracked_run()
                if math.isfinite(loss):
                    run.log_history([{"step": step, "holdout_loss": loss}])
                run.log_image("samples", step, png)  # last: its presence says that both are there
            self._running = None  # only now: MLflow may be away


def run(ctx: StageContext) -> Outcome:
    """Train to config.training.steps, from the last checkpoint if there is one.

    Raises:
        ConfigError: there are fewer training images than a batch has.
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
    tracked = ctx.tracked_run()
    tracked.log_dataset(
        config.name,
        shards.id,
        ctx.inputs["preprocess"],
        {name: value for name, value in shards.stats.items() if name not in ("bad", "duplicates")},
    )
    sheet = storage.join(ctx.inputs["preprocess"], f"{CONTACT_SHEET}.png")
    tracked.log_image(CONTACT_SHEET, 0, storage.read_bytes(sheet))
    for name, content in (
        ("config.yaml", yaml.safe_dump(config.model_dump(), sort_keys=False)),
        ("environment.txt", environment()),
    ):
        tracked.log_artifact("", name, content.encode())
    ctx.progress.start(config.training.steps, "steps")
    reporter = Reporter.remote()  # type: ignore[attr-defined]
    job = Job(config, ctx.folder, ctx.inputs["preprocess"], shards.stats["class_names"], reporter)
    cluster = config.cluster
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        torch_config=TorchConfig(timeout_s=300),
        scaling_config=ScalingConfig(
            num_workers=cluster.workers,
            use_gpu=cluster.gpus_per_worker > 0,
            resources_per_worker={
                "CPU": cluster.cpus_per_worker,
                **({"GPU": cluster.gpus_per_worker} if cluster.gpus_per_worker else {}),
            },
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=ctx.folder,
            failure_config=FailureConfig(
                max_failures=cluster.max_failures, controller_failure_limit=3
            ),
        ),
    )
    previews = Previews(ctx)
    for info in checkpoint.complete_checkpoints(ctx.folder):
        previews.add(info.step, info.uri)

    failure: list[BaseException] = []

    def fit() -> None:
        try:
            trainer.fit()
        except BaseException as error:  # handed to the thread that waits below
            failure.append(error)

    thread = threading.Thread(target=fit, name="fit", daemon=True)
    thread.start()
    history: deque[dict[str, float]] = deque()
    while True:
        alive = thread.is_alive()
        for record in ray.get(reporter.take.remote()):
            if "error" in record:
                raise record["error"]
            if "resumed_at" in record:
                ctx.progress.start(config.training.steps, "steps", record["resumed_at"])
            if "checkpoint" in record:
                previews.add(record["step"], record["checkpoint"])
            history.extend(record.get("history", []))
            if history:
                ctx.progress.update(int(history[-1]["step"]), f"loss {history[-1]['loss']:.4f}")
        try:
            _log(ctx, history)
            previews.poll()
        except StorageError as error:
            # training does not wait for it, and what was not logged is logged later
            logging.getLogger(__name__).warning("%s", error)
            time.sleep(MLFLOW_PAUSE)
        if not alive:
            break
        thread.join(timeout=0.5)
    if failure:
        raise failure[0]
    ctx.progress.update(config.training.steps, "previews")
    info = checkpoint.read(ctx.folder, config.training.steps)
    begin = time.monotonic()
    while True:
        try:
            _log(ctx, deque(info.history))  # with what a lost reporter did not pass on
            previews.poll(wait=True)
            break
        except StorageError:
            if time.monotonic() - begin > MLFLOW_PATIENCE:
                raise
            ctx.progress.update(config.training.steps, "waits for MLflow")
            time.sleep(MLFLOW_PAUSE)
    storage.remove(storage.join(ctx.folder, "ray"))
    return _outcome(ctx, info)


def environment() -> str:
    """The machine of the driver, and the packages it has with their versions."""
    packages = {f"{d.name}=={d.version}" for d in importlib.metadata.distributions()}
    machine = (
        f"# Python {platform.python_version()}, {platform.platform()}, {os.cpu_count()} cores, "
        f"{torch.cuda.device_count()} GPUs"
    )
    return "\n".join([machine, *sorted(packages, key=str.lower), ""])


def _log(ctx: StageContext, history: deque[dict[str, float]]) -> None:
    """Log records to MLflow and take them from `history`; all of them stay if it is away."""
    if history:
        ctx.tracked_run().log_history(list(history))
        history.clear()


def _outcome(ctx: StageContext, info: checkpoint.CheckpointInfo) -> Outcome:
    name = checkpoint.checkpoint_name(info.step)
    files = []
    for file in [*info.state["files"], checkpoint.STATE]:
        data = storage.read_bytes(storage.join(info.uri, file))
        files.append(FileEntry(path=f"{name}/{file}", bytes=len(data), sha256=storage.sha256(data)))
    spec = ModelSpec.model_validate(info.state["spec"])
    parameters = sum(parameter.numel() for parameter in spec.make_network().parameters())
    rates = [record["images_per_second"] for record in info.history]
    stats = {
        "step": info.step,
        "loss": info.history[-1]["loss"],
        "num_parameters": parameters,
        "images_per_second": float(np.median(rates)),
        "mlflow_run_id": ctx.tracked_run().run_id,
    }
    return Outcome(files, stats)
