"""What the distributed shell costs: Ray Train, more workers, checkpoints, a lost worker.

    python -m tests.benchmarks.ray_overhead [--quick]

The training loop over handwritten digits at 28x28, with the network of configs/fashion_mnist.yaml
and a batch of 64, one thread a worker, as

- a bare loop, a process with pipeline/training/loop.py and no Ray; and two of them at the same
  time, with half of the batch each, by which one sees what the cores take from each other;
- the workers of tasks/stages/train_worker.py under Ray Train, one and two, that save no checkpoint
  before the last step; and two that save one every few steps, by which one knows what a checkpoint
  costs, and so what one a minute does.

They run in turn, several times. A rate is that of the median of all windows of a few steps, without
the first of each run. MLflow and the previews of checkpoints, which run beside the workers, have no
part in it.

Then a worker of two is killed with SIGKILL, and the clock runs until the first step is done by
those that take its place, and until the first step that had not been done before.
"""

import argparse
import contextlib
import itertools
import os
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from multiprocessing.synchronize import Barrier
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; workers have it too

import psutil
import torch

from pipeline import storage
from pipeline.config import RunConfig as PipelineConfig
from pipeline.config import load_config
from pipeline.data.batches import Batches, FullShuffle
from pipeline.data.cache import memory_mapped
from pipeline.diffusion.schedules import make_schedule
from pipeline.training import checkpoint
from pipeline.training.inputs import step_inputs
from pipeline.training.loop import make_state, train
from tests.benchmarks import program
from tests.benchmarks.own_ray import run_stage, started_ray
from tests.benchmarks.processes import Failed, at_once
from tests.benchmarks.program import CONFIGS, Figure, constant, figure

CONFIG = CONFIGS / "fashion_mnist.yaml"
WORKERS, BATCH, WINDOW = 2, 64, 5
"""Most workers; images a step of all of them; steps between two looks at the clock."""
STEPS, ROUNDS, KILLS = 40, 3, 3
QUICK_STEPS, QUICK_BATCH, QUICK_NETWORK = 15, 8, "network.base_channels=16"
SAVED_EVERY, KILLED_AT = 5, 8
"""Steps, of the runs in which a worker is killed."""
GOAL_RAY, GOAL_TWO, GOAL_CHECKPOINTS = 0.98, 1.8, 0.98


def main() -> None:
    program.run(program.parser(__doc__), measure, "torch", "ray")


def measure(options: argparse.Namespace) -> list[Figure]:
    with tempfile.TemporaryDirectory() as folder, started_ray(WORKERS):
        bench = Bench(Path(folder), options.quick)
        return [*bench.compare(), bench.recover()]


def bare_loop(config: PipelineConfig, shard_set: str, ready: Barrier) -> list[float]:
    """Seconds of each window of steps, without Ray."""
    from tasks.stages.train_worker import model_spec

    training = config.training
    torch.set_num_threads(1)
    manifest = storage.read_manifest(shard_set)
    assert manifest is not None
    spec = model_spec(config, manifest.stats["class_names"])
    network = spec.make_network()
    images, labels = memory_mapped(shard_set, "train", config.cluster.cache)
    shuffle = FullShuffle(images, labels, config.seed, training.batch_size)
    batches = Batches(shuffle, 0, 1, training.label_dropout, training.augmentation)
    seconds = []
    device = torch.device("cpu")
    inputs = step_inputs(batches, spec.num_classes, 0, training.steps, device)
    ready.wait()
    with contextlib.closing(inputs):
        since = time.monotonic()
        for record in train(
            make_state(network, training, config.diffusion.timesteps),
            network,
            inputs,
            config.diffusion,
            make_schedule(config.diffusion),
            training,
            config.seed,
            device,
        ):
            if record.step % training.log_every == 0:
                float(record.loss)
                seconds.append(time.monotonic() - since)
                since = time.monotonic()
    return seconds


class Bench:
    """The images, made once, and runs over them."""

    def __init__(self, folder: Path, quick: bool) -> None:
        self.folder, self.quick = folder, quick
        self.batch = QUICK_BATCH if quick else BATCH
        self.steps = QUICK_STEPS if quick else STEPS
        self.shard_set = run_stage(self.config(1), "preprocess")
        self.count = itertools.count()

    def overrides(self, **training: Any) -> list[str]:
        values = {
            "storage": str(self.folder),
            "data.source": "builtin:digits",
            "data.class_names": "null",
            "cluster.cache": str(self.folder / "cache"),
            "training.precision": "float32",
            "training.warmup_steps": 0,
            "training.steps": self.steps,
            "training.batch_size": self.batch,
            "training.log_every": WINDOW,
            "training.checkpoint_every": WINDOW * self.steps,
            **{f"training.{name}": value for name, value in training.items()},
        }
        quick = [QUICK_NETWORK] if self.quick else []
        return [*quick, *(f"{key}={value}" for key, value in values.items())]

    def config(self, workers: int, **training: Any) -> PipelineConfig:
        overrides = [*self.overrides(**training), f"cluster.workers={workers}"]
        return load_config(str(CONFIG), overrides)

    # --- arms: images a second of each window, without the first ---

    def bare(self, count: int) -> list[float]:
        """Of all processes together."""
        config = load_config(str(CONFIG), self.overrides(batch_size=self.batch // count))
        outputs = at_once(bare_loop, [(config, self.shard_set)] * count)
        windows = zip(*outputs, strict=True)
        images = WINDOW * self.batch // count
        return [sum(images / seconds for seconds in window) for window in windows][1:]

    def under_ray(self, workers: int, **training: Any) -> list[float]:
        config, folder = self.config(workers, **training), self.new_folder()
        make_trainer(config, folder, self.shard_set)[0].fit()
        last = checkpoint.complete_checkpoints(folder)[-1]
        return [record["images_per_second"] for record in last.history][1:]

    def new_folder(self) -> str:
        return str(self.folder / f"run-{next(self.count)}")

    # --- comparisons ---

    def compare(self) -> list[Figure]:
        arms: dict[str, Callable[[], list[float]]] = {
            "bare loop": lambda: self.bare(1),
            "Ray Train, 1 worker": lambda: self.under_ray(1),
            "bare loop, 2 at once": lambda: self.bare(2),
            "Ray Train, 2 workers": lambda: self.under_ray(2),
            "Ray Train, 2 workers, checkpoints": lambda: self.under_ray(2, checkpoint_every=WINDOW),
        }
        rates: dict[str, list[float]] = {name: [] for name in arms}
        for _ in range(1 if self.quick else ROUNDS):
            for name, arm in arms.items():
                rates[name] += arm()
        medians = program.medians(rates)
        print(f"{self.batch} images a step, windows of {WINDOW} steps")
        print(f"{'':<36}{'images/s, median (least to most)':<36}")
        for name, of in rates.items():
            print(f"{name:<36}{program.spread(of)}")

        bare, one, at_once, two, saving = medians.values()
        each = WINDOW * self.batch * (1 / saving - 1 / two)
        folder = self.folder / f"run-{next(self.count) - 1}"
        num_bytes = sum(path.stat().st_size for path in folder.rglob("step-*/*.safetensors"))
        kept = len(checkpoint.complete_checkpoints(str(folder)))
        print(
            f"2 workers do {two / at_once:.1%} of what 2 bare loops at once do\n"
            f"a checkpoint of {num_bytes / kept / 1e6:.0f} MB costs {each:.2f} s, "
            f"{each / (60 + each):.2%} of the time if there is one a minute"
        )
        a_minute = two * 60 / (60 + each)
        return [
            figure("training under Ray Train, 1 worker", one, bare, "the bare loop", GOAL_RAY),
            figure("training on 2 cores, 2 workers", two, one, "1 worker on 1 core", GOAL_TWO),
            figure("a checkpoint a minute", a_minute, two, "no checkpoint", GOAL_CHECKPOINTS),
        ]

    def recover(self) -> Figure:
        """Kill a worker in the middle; how long it takes until there is a step again."""
        until_first, until_new = [], []
        for _ in range(1 if self.quick else KILLS):
            first, new = self.kill_one()
            until_first.append(first)
            until_new.append(new)
            print(f"after SIGKILL: {first:.1f} s to a step, {new:.1f} s to one not done before")
        what = f"from SIGKILL of a rank to the first step, a checkpoint every {SAVED_EVERY}"
        return constant(what, statistics.median(until_first), "s")

    def kill_one(self) -> tuple[float, float]:
        """Seconds from the kill to the first step, and to the first that was not done before."""
        import ray

        config = self.config(
            2, steps=KILLED_AT + 2 * SAVED_EVERY, log_every=1, checkpoint_every=SAVED_EVERY
        )
        trainer, reporter = make_trainer(config, self.new_folder(), self.shard_set)
        fit = threading.Thread(target=trainer.fit, daemon=True)
        fit.start()
        killed = first = new = 0.0
        done, resumed = 0, False
        while fit.is_alive():
            for record in ray.get(reporter.take.remote()):
                now = time.monotonic()
                resumed |= bool(killed) and "resumed_at" in record
                step = max((int(row["step"]) for row in record.get("history", [])), default=0)
                if not resumed:
                    done = max(done, step)
                elif "resumed_at" not in record and step:
                    first = first or now
                    if step > done:
                        new = new or now
            if done >= KILLED_AT and not killed:
                training_workers()[-1].kill()
                killed = time.monotonic()
            time.sleep(0.02)
        if not (killed and first and new):
            raise Failed("the training ended before a worker was killed, or did not go on after it")
        return first - killed, new - killed


def make_trainer(config: PipelineConfig, folder: str, shard_set: str) -> tuple[Any, Any]:
    """(a trainer of the workers of tasks/stages/train_worker.py, the actor that they report to)."""
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from tasks.stages.train import Reporter
    from tasks.stages.train_worker import Job, train_worker

    manifest = storage.read_manifest(shard_set)
    assert manifest is not None
    reporter = Reporter.remote()  # type: ignore[attr-defined]
    job = Job(config, folder, shard_set, manifest.stats["class_names"], reporter)
    trainer = TorchTrainer(
        train_worker,
        train_loop_config={"job": job},
        scaling_config=ScalingConfig(
            num_workers=config.cluster.workers, resources_per_worker={"CPU": 1}
        ),
        run_config=RunConfig(
            name="ray",
            storage_path=folder,
            failure_config=FailureConfig(max_failures=1, controller_failure_limit=1),
        ),
    )
    return trainer, reporter


def training_workers() -> list[psutil.Process]:
    """The workers of Ray Train among the processes that this one has started."""
    found = []
    for child in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            if "RayTrainWorker" in " ".join(child.cmdline()):
                found.append(child)
    return found


if __name__ == "__main__":
    main()
