"""What evaluation costs: the statistics of features, and the shell around the sampler.

    python -m tests.benchmarks.evaluate [--quick]

- Moments of features of 2,048 dimensions, as those of Inception, that come 8,192 at a time: of
  25,000 and of 100,000 images, each in a process of its own, with its peak memory, which is not to
  grow; beside torchmetrics, which is given the same features in the same chunks.
- Samples of the network of configs/fashion_mnist.yaml, untrained, with 20 DDIM steps, drawn as
  evaluation draws them (Ray tasks of 48 images, features by the classifier, files), against the
  sampler alone, as many bare processes at the same time, in turn.

The last line is JSON: [{"what", "ours", "peer", "peer_name", "unit", "ratio", "goal"}], ratio above
1 where ours is better.
"""

import argparse
import json
import multiprocessing
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Barrier
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; workers have it too

import numpy as np
import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from pipeline import storage
from pipeline.config import load_config
from pipeline.evaluation.extractors import keep_classifier
from pipeline.evaluation.features import Classifier, TrainedClassifier
from pipeline.evaluation.figures import gather
from pipeline.registry.folder import model_files
from pipeline.registry.models import load_model
from pipeline.samplers.config import SamplingConfig
from pipeline.samplers.model import ModelSpec
from pipeline.serving import offline
from pipeline.serving.engine import ImageRequest
from tests.benchmarks.as_worker import as_worker
from tests.benchmarks.preprocess import WORKERS, at_once, result, started_ray

CONFIG = Path(__file__).parents[2] / "configs" / "fashion_mnist.yaml"
DIM, CHUNK = 2048, 8192
COUNTS, QUICK_COUNTS = (25_000, 100_000), (17_000, 34_000)
IMAGES, QUICK_IMAGES, ROUNDS = 960, 192, 3
SAMPLING = SamplingConfig(steps=20)
GOAL_SAMPLER, GOAL_MEMORY = 0.95, 0.98


def main() -> None:
    as_worker()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few images, one repeat")
    quick = parser.parse_args().quick
    print(
        f"torch {torch.__version__}, numpy {np.__version__}; {os.cpu_count()} cores, "
        f"{platform.processor() or platform.machine()}, load {os.getloadavg()[0]:.2f}"
    )
    results = [*measure_moments(QUICK_COUNTS if quick else COUNTS), *measure_sampling(quick)]
    print(f"load at the end {os.getloadavg()[0]:.2f}")
    print(json.dumps(results))


# --- moments ------------------------------------------------------------------------------------


def chunks(count: int) -> Iterator[Tensor]:
    """Made one after the other, of `count` vectors in all."""
    for start in range(0, count, CHUNK):
        generator = torch.Generator().manual_seed(start)
        yield torch.rand(min(CHUNK, count - start), DIM, generator=generator)


def ours(count: int) -> None:
    gather(chunks(count))


def theirs(count: int) -> None:
    from torchmetrics.image.fid import FrechetInceptionDistance

    class Given(torch.nn.Module):
        num_features = DIM

        def forward(self, images: Tensor) -> Tensor:
            return images.flatten(1)

    metric = FrechetInceptionDistance(Given(), normalize=True, input_img_size=(DIM, 1, 1))
    for chunk in chunks(count):
        metric.update(chunk[:, :, None, None], real=True)


def timed(which: str, count: int) -> tuple[float, float]:
    """(seconds, peak memory in MB) of a process; the making of the features is in both."""
    ours(256) if which == "ours" else theirs(256)  # imports
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak
    begin = time.perf_counter()
    ours(count) if which == "ours" else theirs(count)
    seconds = time.perf_counter() - begin
    (line,) = [
        line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line
    ]
    return seconds, int(line.split()[1]) / 1000


def measure_moments(counts: tuple[int, ...]) -> list[dict[str, Any]]:
    print(f"moments of {DIM}-dimensional features       images   seconds   peak MB")
    found = {}
    for count in counts:
        for which in ("ours", "torchmetrics"):
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                found[which, count] = pool.apply(timed, (which, count))
            seconds, memory = found[which, count]
            print(f"  {which:<38}{count:>8,}{seconds:>10.1f}{memory:>10,.0f}", flush=True)
    few, many = counts
    return [
        result(
            f"peak memory of the moments of {few:,} images",
            found["ours", few][1],
            found["ours", many][1],
            f"of {many:,} images",
            GOAL_MEMORY,
            "MB",
        ),
        result(
            f"moments of {many:,} images",
            many / found["ours", many][0],
            many / found["torchmetrics", many][0],
            "torchmetrics",
            None,
        ),
    ]


# --- sampling -----------------------------------------------------------------------------------


def write_model(folder: Path) -> str:
    """A model's folder with weights that were never trained; every layer takes part."""
    config = load_config(str(CONFIG))
    spec = ModelSpec(
        network=config.network,
        diffusion=config.diffusion,
        channels=config.data.channels,
        image_size=config.data.image_size,
        class_names=[str(i) for i in range(10)],
        has_null_label=True,
    )
    torch.manual_seed(0)
    weights = {
        name: 0.02 * torch.randn_like(tensor) if tensor.ndim > 1 else tensor
        for name, tensor in spec.make_network().state_dict().items()
    }
    for name, data in model_files(spec, save_tensors(weights), {}).items():
        storage.write_bytes(str(folder / name), data)
    return str(folder)


def requests_of(rows: range) -> list[ImageRequest]:
    return [ImageRequest(0, i, i % 10, SAMPLING) for i in rows]


def sampler_alone(uri: str, rows: range, ready: Barrier) -> float:
    """The seconds that the sampler takes for some images in this process."""
    torch.set_num_threads(1)
    model = load_model(uri)
    offline.draw(model, requests_of(range(2)))
    ready.wait()
    begin = time.perf_counter()
    offline.draw(model, requests_of(rows))
    return time.perf_counter() - begin


def as_evaluated(uri: str, reference: str, folder: str, count: int) -> float:
    """The seconds from the first task to the last file."""
    import ray

    from tasks import in_flight
    from tasks.evaluate import draw_to_file
    from tasks.fanout import IMAGES_PER_TASK

    task = ray.remote(num_cpus=1)(draw_to_file)
    starts = range(0, count, IMAGES_PER_TASK)
    calls = [
        (
            uri,
            requests_of(range(start, min(start + IMAGES_PER_TASK, count))),
            reference,
            f"{folder}/{start}.safetensors",
        )
        for start in starts
    ]
    begin = time.perf_counter()
    for _ in in_flight.results(task, calls):
        pass
    return time.perf_counter() - begin


def measure_sampling(quick: bool) -> list[dict[str, Any]]:
    count, rounds = (QUICK_IMAGES, 1) if quick else (IMAGES, ROUNDS)
    rates: dict[str, list[float]] = {"evaluation": [], "the sampler alone": []}
    with tempfile.TemporaryDirectory() as folder, started_ray():
        uri, reference = write_model(Path(folder, "model")), f"{folder}/reference"
        torch.manual_seed(0)
        classifier = TrainedClassifier(Classifier(1, 10).eval(), 0.0, 0)
        keep_classifier(reference, "fashion_mnist", classifier)
        as_evaluated(uri, reference, f"{folder}/first", 96)  # workers start, and load the model
        for turn in range(rounds):
            seconds = as_evaluated(uri, reference, f"{folder}/{turn}", count)
            rates["evaluation"].append(count / seconds)
            shares = [range(first, count, WORKERS) for first in range(WORKERS)]
            seconds = at_once(sampler_alone, [(uri, share) for share in shares])
            rates["the sampler alone"].append(count / seconds)
    print(f"samples of 28x28 with {SAMPLING.steps} steps, {WORKERS} at once    images/s, median")
    for name, of in rates.items():
        print(f"  {name:<38}{statistics.median(of):.1f} ({min(of):.1f} to {max(of):.1f})")
    ours, peer = (statistics.median(of) for of in rates.values())
    what = "sampling for evaluation"
    return [result(what, ours, peer, f"the sampler alone, {WORKERS} at once", GOAL_SAMPLER)]


if __name__ == "__main__":
    main()
