"""What takes longer than the suite may: `make soak`. Above all kills at random.

A training is disturbed again and again: a worker is killed, or stopped so that the others wait for
it, or Ray Train's controller is killed, the command itself, or Ray's raylet under it. Then the same
command goes on. In the end the weights and the logged losses are those of a quiet run, bit for bit.
"""

import contextlib
import os
import random
import time
from pathlib import Path

import numpy as np
import psutil
import pytest
import torch

from pipeline.serving.engine import Engine
from tests.conftest import HANG, Workplace, end, ray_workers, tiny_command
from tests.system.head.test_pipeline import metric_history, place_with_shards, weights_of
from tests.unit.test_engine import alone, crowd, make_model
from tests.unit.test_training import config, fresh, with_dropout
from tests.unit.test_training import run as train_steps

ROUNDS = int(os.environ.get("SOAK_ROUNDS", "3"))
DISTURBANCES = 12
SETTINGS = [
    "training.steps=400",
    "training.batch_size=64",
    "network.base_channels=16",
    "cluster.peer_timeout=30",
    "cluster.max_failures=100",
]


@pytest.fixture(scope="module")
def quiet(tiny: Workplace, tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    place = place_with_shards(tiny, tmp_path_factory.mktemp("quiet"))
    place.run_tiny(*SETTINGS, verb="train")
    return place


@pytest.mark.parametrize("seed", range(ROUNDS))
def test_kills_at_random_change_nothing(
    tiny: Workplace, quiet: Workplace, tmp_path: Path, seed: int
) -> None:
    rng = random.Random(seed)
    place = place_with_shards(tiny, tmp_path)
    remaining, done = DISTURBANCES, []
    stopped: list[psutil.Process] = []
    process = place.start(*tiny_command("train", *SETTINGS))
    try:
        while process.poll() != 0:
            time.sleep(rng.uniform(3, 20) if remaining else 1)
            if (
                remaining
                and process.poll() is None
                and (what := disturb(process.pid, rng, stopped))
            ):
                remaining -= 1
                done.append(what)
            if process.poll() not in (None, 0):  # the command was killed, or Ray under it
                end(process)
                process = place.start(*tiny_command("train", *SETTINGS))
    finally:
        end(process)
        for worker in stopped:
            with contextlib.suppress(psutil.NoSuchProcess):
                worker.kill()
    print(f"seed {seed}: {', '.join(done)}")
    assert process.returncode == 0
    assert weights_of(place) == weights_of(quiet)
    assert metric_history(place, "train/loss") == metric_history(quiet, "train/loss")


@pytest.mark.parametrize("values", [{}, {"recompute": True, "accumulate": 2}])
def test_a_compiled_network_is_trained_to_the_same_losses(values: dict[str, object]) -> None:
    training, spec = config(steps=3, **values), with_dropout(0.3)
    compiled = fresh(training, spec)
    compiled.network.compile(mode="default")
    losses = train_steps(compiled, training, spec=spec)
    assert losses == pytest.approx(train_steps(fresh(training, spec), training, spec=spec), 1e-4)


def test_a_compiled_network_draws_the_same_images_to_a_grey_level() -> None:
    model, requests = make_model(["a", "b", "c"]), crowd()
    compiled = Engine(model, "fast", rows=4, compiled=True)
    assert compiled.warm_up() > 0
    calls = torch._dynamo.utils.counters["stats"]["unique_graphs"]
    for image, request in zip(compiled.draw(requests), requests, strict=True):
        assert np.abs(image.astype(int) - alone(model, request)).max() <= 1
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == calls, "it was warm"


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_workers_train_a_compiled_network_to_the_same_losses(
    tiny: Workplace, tmp_path: Path, parallel: str
) -> None:
    losses = []
    for compile_ in ("none", "default"):
        place = place_with_shards(tiny, tmp_path / compile_)
        settings = [f"training.parallel={parallel}", f"training.compile={compile_}"]
        few = ["training.steps=6", "training.log_every=3", "training.checkpoint_every=3"]
        place.ddpm(*tiny_command("train", *settings, *few), timeout=HANG)
        losses.append(metric_history(place, "train/loss"))
    assert [step for step, _ in losses[0]] == [3, 6]
    assert np.array(losses[1]) == pytest.approx(np.array(losses[0]), rel=1e-4)


def disturb(pid: int, rng: random.Random, stopped: list[psutil.Process]) -> str:
    """Kill or stop something of a command; what it was, empty if that was not there."""
    workers = ray_workers(pid, "RayTrainWorker")
    victims = {
        "worker": workers,
        "stopped worker": workers,
        "controller": ray_workers(pid, "TrainController"),
        "raylet": ray_workers(pid, "raylet/raylet"),
        "command": [psutil.Process(pid)],
    }
    what = rng.choice(sorted(victims))
    if not victims[what]:
        return ""
    victim = rng.choice(victims[what])
    try:
        if what == "stopped worker":
            victim.suspend()
            stopped.append(victim)
        else:
            victim.kill()
    except psutil.NoSuchProcess:
        return ""
    return what
