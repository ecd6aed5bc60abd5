"""The life of a training worker: one rank of a data-parallel training under Ray Train.

What it has to say goes to the job's reporter, an actor that the driver listens to.
"""

import contextlib
import secrets
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal

import ray
import ray.train.torch
import torch
from ray.train.collective import barrier, broadcast_from_rank_zero

from pipeline import storage
from pipeline.config import RunConfig
from pipeline.data.batches import Batches, FullShuffle, Shuffle
from pipeline.data.cache import memory_mapped
from pipeline.data.parts import keys_at, read_parts
from pipeline.data.windows import WindowedShuffle
from pipeline.diffusion.schedules import make_schedule
from pipeline.errors import PipelineError, TrainingDiverged
from pipeline.networks.backbone import set_checkpointing
from pipeline.samplers.model import ModelSpec
from pipeline.seeding import key
from pipeline.training import checkpoint, parallel, posthoc
from pipeline.training.config import Precision, TrainingConfig
from pipeline.training.inputs import step_inputs
from pipeline.training.loop import StepRecord, TrainState, make_state, train
from pipeline.training.precision import (
    HALF,
    computes_natively,
    is_small,
    prefers_bfloat16,
    resolve,
)
from pipeline.training.watch import Watch, measured_peak, slowdown, training_flops
from tasks.cluster import gpus_of_this_node, num_cores
from tasks.stages import notices

NAMED_IMAGES = 3
"""In the sentence that says which step is not finite."""


@dataclass(frozen=True)
class Job:
    """What a training worker is told."""

    config: RunConfig
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
    asked = job.config.training.precision
    device = ray.train.torch.get_device()
    if device.type == "cpu":
        torch.set_num_threads(job.config.cluster.cpus_per_worker)
    rank, world_size = parallel.rank_and_world_size()
    found = checkpoint.latest_sound(job.folder) if rank == 0 else None
    # rank 0 decides: a checkpoint may appear or go while the others look
    step, kept, attempt = broadcast_from_rank_zero(
        (*((found.step, found.precision) if found else (0, None)), secrets.randbits(63))
    )
    spec = model_spec(job.config, job.class_names)
    flops = flops_of(spec)
    everywhere = parallel.true_on_all_ranks(prefers_bfloat16(device, flops), device)
    job = with_precision(job, resolve(asked, kept, everywhere))
    config, training = job.config, job.config.training
    # by itself, cuDNN would round the factors of its convolutions
    fp32 = "tf32" if training.precision == "tf32" else "ieee"
    torch.backends.cudnn.fp32_precision = fp32
    torch.backends.cuda.matmul.fp32_precision = fp32

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(config.seed, "init"))
        network = spec.make_network().to(device)
    set_checkpointing(network, training.recompute)
    torch.backends.cudnn.benchmark = True  # each step has the shapes of the one before
    if training.parallel == "fsdp" and world_size > 1:
        parallel.cut(network, device)
    state = make_state(network, training, config.diffusion.timesteps)
    history: list[dict[str, float]] = []
    if step:
        info = found or checkpoint.read(job.folder, step)
        checkpoint.load(info, state)
        history = info.history
    if rank == 0:
        job.reporter.push.remote(
            {"resumed_at": step, "history": history, "precision": training.precision}
        )
        if found:  # the attempt that wrote it may have died before it could say so
            job.reporter.push.remote({"checkpoint": found.uri, "step": step})

    shuffle = open_shuffle(job)
    batches = Batches(shuffle, rank, world_size, training.label_dropout, training.augmentation)
    # one node may have to decode the data for longer than `peer_timeout`
    barrier()
    if training.compile != "none":
        network.compile(mode=training.compile)
    forward = parallel.wrap(network, device)
    schedule = None if config.diffusion.schedule == "learned" else make_schedule(config.diffusion)
    watch = make_watch(flops, training, device)
    job.reporter.push.remote(
        {"notices": notices_of(job, asked, kept is not None, spec, flops, device)}
    )

    def written(info: checkpoint.CheckpointInfo) -> None:
        job.reporter.push.remote({"checkpoint": info.uri, "step": info.step})

    with (
        checkpoint.Writer(
            job.folder, spec.model_dump(), training.keep_checkpoints, written, attempt
        ) as writer,
        contextlib.closing(shuffle),
        contextlib.closing(
            step_inputs(batches, spec.num_classes, step, training.steps, device)
        ) as inputs,
    ):
        records = train(
            state, forward, inputs, config.diffusion, schedule, training, config.seed, device
        )
        for record in with_images_named(records, job, state, shuffle):
            watch.add(record)
            last = record.step == training.steps
            if record.step % training.log_every == 0 or last:
                figures, bad_step = watch.take()
                if bad_step is not None:  # the same on all ranks; no checkpoint has it
                    raise TrainingDiverged(
                        "the training loss or its gradient is not finite at step "
                        f"{bad_step}, {its_images(job, bad_step, shuffle)}; the checkpoints before "
                        "it are kept: try a lower training.lr, more training.warmup_steps or less "
                        "training.grad_clip"
                    )
                history.append({"step": record.step, **figures})
                if rank == 0:
                    job.reporter.push.remote({"history": history[-1:]})
            if snapshot_falls_on(record.step, training):
                # before the checkpoint, after which a run that was killed goes on
                save_snapshots(job, state, rank)
                barrier()
            if record.step % training.checkpoint_every == 0 or last:
                writer.wait()  # an upload may take longer than `peer_timeout`
                barrier()
                writer.save(state, history)


def with_precision(job: Job, precision: Precision) -> Job:
    training = job.config.training.model_copy(update={"precision": precision})
    return replace(job, config=job.config.model_copy(update={"training": training}))


def notices_of(
    job: Job,
    asked: Literal["auto"] | Precision,
    kept: bool,
    spec: ModelSpec,
    flops: int,
    device: torch.device,
) -> dict[str, str]:
    """What this rank has to say of where it is, see tasks/stages/notices.py."""
    cluster, precision = job.config.cluster, job.config.training.precision
    assert precision != "auto"
    workers_here = ray.train.get_context().get_local_world_size()
    said = {
        **notices.crowded(workers_here, cluster.cpus_per_worker, num_cores()),
        **notices.idle_gpus(cluster.gpus_per_worker, gpus_of_this_node()),
    }
    if asked == "auto":
        said |= notices.chosen(precision, kept, is_small(device, flops))
    if not computes_natively(device, precision):
        name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
        shape = (spec.channels, spec.image_size, spec.image_size)
        network = spec.make_network().to(device)
        factor = slowdown(network, shape, spec.num_classes, HALF[precision])
        said |= notices.emulated(asked, precision, name, factor)
    return said


def flops_of(spec: ModelSpec) -> int:
    """Of a forward and backward pass of one image."""
    with torch.device("meta"):  # to count operations nothing need be computed
        return training_flops(spec.make_network(), spec.image_shape, spec.num_classes)


def make_watch(flops: int, training: TrainingConfig, device: torch.device) -> Watch:
    assert training.precision != "auto"
    # what is emulated has the peak of what it is made of
    native = computes_natively(device, training.precision)
    dtype = HALF.get(training.precision, torch.float32) if native else torch.float32
    return Watch(
        training.batch_size,
        flops,
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


def with_images_named(
    records: Iterator[StepRecord], job: Job, state: TrainState, shuffle: Shuffle
) -> Iterator[StepRecord]:
    """The records; where the loop itself gives up, with the step and its images in the sentence."""
    try:
        yield from records
    except TrainingDiverged as error:
        step = state.step + 1
        raise TrainingDiverged(f"step {step}, {its_images(job, step, shuffle)}: {error}") from error


def its_images(job: Job, step: int, shuffle: Shuffle) -> str:
    """`on the images A, B, C, ...` of a step (from 1); all of them are listed in a file."""
    keys = keys_at(read_parts(job.shard_set, "train"), shuffle.indices(step - 1))
    listed = storage.join(job.folder, f"diverged-{step:09d}.json")
    storage.write_json(listed, {"step": step, "images": keys})
    named = ", ".join(keys[:NAMED_IMAGES])
    return f"on the images {named}, ... (all {len(keys)} are in {listed})"


def open_shuffle(job: Job) -> Shuffle:
    """The training images in the order that the config asks for."""
    config, training = job.config, job.config.training
    if training.shuffle == "full":
        images, labels = memory_mapped(job.shard_set, "train", config.cluster.cache)
        return FullShuffle(images, labels, config.seed, training.batch_size)
    parts = read_parts(job.shard_set, "train")
    window, lanes = training.shuffle_window, training.shuffle_lanes
    return WindowedShuffle(parts, config.seed, training.batch_size, window, lanes)


def model_spec(config: RunConfig, class_names: list[str]) -> ModelSpec:
    """The model that a config trains on images of these classes."""
    return ModelSpec(
        network=config.network,
        diffusion=config.diffusion,
        channels=config.data.channels,
        image_size=config.data.image_size,
        class_names=class_names,
        has_null_label=bool(class_names) and config.training.label_dropout > 0,
    )
