"""What evaluation costs: the statistics of features, and the shell around the sampler.

    python -m tests.benchmarks.evaluate [--quick]

- Moments of features of 2,048 dimensions, as those of Inception, that come 8,192 at a time: of
  25,000 and of 100,000 images, each in a process of its own, with its peak memory, which is not to
  grow; beside torchmetrics, which is given the same features in the same chunks.
- Samples of the network of configs/fashion_mnist.yaml, untrained, with 20 DDIM steps, drawn as
  evaluation draws them (Ray tasks of 48 images, features by the classifier, files), against the
  sampler alone, as many bare processes at the same time, in turn.
"""

import argparse
import itertools
import os
import tempfile
import time
from collections.abc import Iterator
from multiprocessing.synchronize import Barrier
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; workers have it too

import torch
from safetensors.torch import save as save_tensors
from torch import Tensor

from pipeline import storage
from pipeline.evaluation.extractors import keep_classifier
from pipeline.evaluation.features import Classifier, TrainedClassifier
from pipeline.evaluation.figures import gather
from pipeline.loading import load_model
from pipeline.registry.folder import model_files
from pipeline.samplers.config import SamplingConfig
from pipeline.serving import offline
from pipeline.serving.engine import ImageRequest
from tests.benchmarks import program
from tests.benchmarks.engine import CONFIG, QUICK_NETWORK, untrained
from tests.benchmarks.own_ray import started_ray
from tests.benchmarks.processes import alone, at_once
from tests.benchmarks.program import Figure, figure

WORKERS = 2
DIM, CHUNK = 2048, 8192
COUNTS, QUICK_COUNTS = (25_000, 100_000), (17_000, 34_000)
IMAGES, QUICK_IMAGES, ROUNDS = 960, 192, 3
SAMPLING = SamplingConfig(steps=20)
GOAL_SAMPLER, GOAL_MEMORY = 0.95, 0.98


def main() -> None:
    program.run(program.parser(__doc__), measure, "torch", "numpy", "torchmetrics", "ray")


def measure(options: argparse.Namespace) -> list[Figure]:
    counts = QUICK_COUNTS if options.quick else COUNTS
    return [*measure_moments(counts), *measure_sampling(options.quick)]


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


def measure_moments(counts: tuple[int, ...]) -> list[Figure]:
    print(f"moments of {DIM}-dimensional features       images   seconds   peak MB")
    found = {}
    for count in counts:
        for which in ("ours", "torchmetrics"):
            found[which, count] = alone(timed, which, count)
            seconds, memory = found[which, count]
            print(f"  {which:<38}{count:>8,}{seconds:>10.1f}{memory:>10,.0f}", flush=True)
    few, many = counts
    peaks = [found["ours", count][1] for count in counts]
    what = f"peak memory of the moments of {few:,} images"
    rates = [many / found[which, many][0] for which in ("ours", "torchmetrics")]
    return [
        figure(what, *peaks, f"of {many:,} images", GOAL_MEMORY, "MB"),
        figure(f"moments of {many:,} images", *rates, "torchmetrics"),
    ]


# --- sampling -----------------------------------------------------------------------------------


def write_model(folder: Path, quick: bool) -> str:
    """A model's folder with weights that were never trained."""
    model = untrained(str(CONFIG), QUICK_NETWORK if quick else [])
    weights = save_tensors(model.network.state_dict())
    for name, data in model_files(model.spec, weights, {}).items():
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

    from tasks.stages import in_flight
    from tasks.stages.drawing import IMAGES_PER_TASK
    from tasks.stages.evaluate import draw_to_file

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


def measure_sampling(quick: bool) -> list[Figure]:
    count, rounds = (QUICK_IMAGES, 1) if quick else (IMAGES, ROUNDS)
    with tempfile.TemporaryDirectory() as folder, started_ray(WORKERS):
        uri, reference = write_model(Path(folder, "model"), quick), f"{folder}/reference"
        torch.manual_seed(0)
        classifier = TrainedClassifier(Classifier(1, 10).eval(), 0.0, 0)
        keep_classifier(reference, "fashion_mnist", classifier)
        as_evaluated(uri, reference, f"{folder}/first", 96)  # workers start, and load the model
        turns = itertools.count()
        shares = [(uri, range(first, count, WORKERS)) for first in range(WORKERS)]
        arms = {
            "evaluation": lambda: (
                count / as_evaluated(uri, reference, f"{folder}/{next(turns)}", count)
            ),
            "the sampler alone": lambda: count / max(at_once(sampler_alone, shares)),
        }
        rates = program.rates_in_turn(arms, rounds)
    print(f"samples of 28x28 with {SAMPLING.steps} steps, {WORKERS} at once    images/s, median")
    for name, of in rates.items():
        print(f"  {name:<38}{program.spread(of)}")
    medians = program.medians(rates).values()
    peer = f"the sampler alone, {WORKERS} at once"
    return [figure("sampling for evaluation", *medians, peer, GOAL_SAMPLER)]


if __name__ == "__main__":
    main()
