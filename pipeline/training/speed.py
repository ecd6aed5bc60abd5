"""How long a step of a training takes on this machine, measured before there is any data."""

import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import torch
from torch import nn

from pipeline.data.batches import Batch
from pipeline.data.order import share
from pipeline.device import is_apart
from pipeline.diffusion.config import DiffusionConfig
from pipeline.diffusion.schedules import make_schedule
from pipeline.training.config import TrainingConfig
from pipeline.training.inputs import StepInputs, draw_inputs
from pipeline.training.loop import make_state, train
from pipeline.training.precision import HALF, prefers_bfloat16, resolve
from pipeline.training.watch import measured_peak, training_flops

MEASURED_SECONDS, MOST_STEPS = 2.0, 50
"""Steps are timed until so long has gone by, two at least."""
BEST_UTILISATION = 0.8
"""No network reaches a larger share of the peak of one product of matrices."""


@dataclass(frozen=True)
class Fitted:
    """What is to be fitted."""

    make_network: Callable[[], nn.Module]
    diffusion: DiffusionConfig
    """Not of a learned schedule."""
    image_shape: tuple[int, int, int]
    """(C, H, W)"""
    num_classes: int
    """0 for an unconditional network."""


def seconds_per_step(
    fitted: Fitted,
    training: TrainingConfig,
    workers: int,
    threads: int,
    device: torch.device,
    limit: float = math.inf,
) -> float:
    """The time of a step on random images, whose last part is the slowest worker's.

    On a CPU each worker is a thread of this process with a network of its own and its share of the
    batch, which computes on `threads` cores; what workers send each other is not measured. On GPUs
    it is one worker's share on one of them.

    Args:
        limit: where a step takes longer for certain, it is not measured.

    Returns:
        Seconds; infinite beyond `limit`, or where memory does not suffice.
    """
    rows = len(share(workers - 1, workers, training.batch_size))
    with torch.device("meta"):
        flops = training_flops(fitted.make_network(), fitted.image_shape, fitted.num_classes)
    precision = resolve(training.precision, None, prefers_bfloat16(device, flops))
    training = training.model_copy(update={"precision": precision})
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        peak = measured_peak(device, HALF.get(training.precision, torch.float32))
        if rows * flops > limit * BEST_UTILISATION * peak:
            return math.inf
        count = 1 if is_apart(device) else workers
        of_worker = training.model_copy(update={"batch_size": rows})
        with ThreadPoolExecutor(count) as pool:
            found = [
                pool.submit(_measure, fitted, of_worker, threads, device, limit)
                for _ in range(count)
            ]
            return max(of.result() for of in found)
    except torch.OutOfMemoryError:
        return math.inf
    finally:
        torch.set_num_threads(before)


def _measure(
    fitted: Fitted, training: TrainingConfig, threads: int, device: torch.device, limit: float
) -> float:
    """The median time of a step of one worker, after a first one."""
    torch.set_num_threads(threads)  # each thread of a process has its own number
    training = training.model_copy(update={"steps": 1 + MOST_STEPS, "warmup_steps": 0})
    state = make_state(fitted.make_network().to(device), training, fitted.diffusion.timesteps)
    steps = train(
        state,
        state.network,
        _inputs(fitted, training.batch_size),
        fitted.diffusion,
        make_schedule(fitted.diffusion),
        training,
        0,
        device,
    )
    began = time.monotonic()
    float(next(steps).loss)  # which waits for the device
    if (first := time.monotonic() - began) > 3 * limit:
        return first
    times = list[float]()
    while len(times) < 2 or (sum(times) < MEASURED_SECONDS and len(times) < MOST_STEPS):
        began = time.monotonic()
        float(next(steps).loss)
        times.append(time.monotonic() - began)
    return statistics.median(times)


def _inputs(fitted: Fitted, batch_size: int) -> Iterator[StepInputs]:
    """Random images with their noise, which other threads of a worker make ahead of its steps."""
    channels, height, width = fitted.image_shape
    pixels = torch.randint(0, 256, (batch_size, height, width, channels), dtype=torch.uint8)
    labels = torch.arange(batch_size) % max(1, fitted.num_classes)
    kept = torch.zeros(batch_size, dtype=torch.bool)
    for step in itertools.count():
        batch = Batch(step, range(batch_size), pixels, labels, kept)
        yield draw_inputs(batch, fitted.num_classes, 0)
