"""Any process of a cluster but the bucket's server is killed at random: `make soak`.

The whole pipeline runs on a head and two nodes, machines that share no file (tests/cluster.py). A
node that is lost is replaced, and MLflow's server is started again; a head that is lost, or its
GCS, takes the cluster with it, and another is started. The same command is given until it ends
with 0. Then every output, figure and metric is that of a run in peace, bit for bit.

SOAK_KILLS=20 says how many are killed, SOAK_SEED=0 which and when; each is printed with the time
and the stage.
"""

import contextlib
import os
import random
import re
import time
from pathlib import Path

import psutil

from tests.cluster import Cluster, has_joined
from tests.conftest import HANG, Workplace, end, tiny_command
from tests.machines import Machine
from tests.rooms import Room
from tests.system.test_nodes import RUNS, assert_all_is_as_in_peace

SEED = int(os.environ.get("SOAK_SEED", "0"))
KILLS = int(os.environ.get("SOAK_KILLS", "20"))
LONGEST = 1500
"""Seconds."""
STAGES = {"preprocess": (0.25, 2, 8), "train": (0.75, 5, 30), "evaluate": (1.0, 2, 10)}
"""The share of the kills that are for it and what is before it; the seconds between two, at least
and at most."""
SETTINGS = [
    "data.images_per_shard=16",
    "network.base_channels=16",
    "training.steps=500",
    "training.checkpoint_every=50",
    "training.keep_checkpoints=10",  # each is there until its preview is made
    "evaluation.samples=480",
    "evaluation.elbo_images=48",
    "evaluation.ode_images=16",
    "evaluation.during_training=0",  # it begins when the stage `reference` is over
    "sampling.steps=20",
    "cluster.peer_timeout=30",
    "cluster.max_failures=100",
]
KINDS = {
    "training rank": "ray::RayTrainWorker",
    "controller of Ray Train": "ray::TrainController",
    "reporter": "ray::Reporter",
    "idle worker": "ray::IDLE",
    "task": "ray::",
    "raylet": "raylet/raylet",
    "GCS": "gcs_server",
    "agent": "/agent",
    "dashboard": "/dashboard.py",
    "monitor": "/monitor.py",
    "ray start": "ray.scripts.scripts",
    "command": "-m tasks",
    "MLflow": "mlflow",
}
"""What a kind of process has in its title, the first that does."""


class Disturbed:
    """A run on a cluster that is disturbed."""

    def __init__(self, command: list[str]) -> None:
        self.command = command
        self.random = random.Random(SEED)
        self.begin = time.monotonic()
        self.over: set[str] = set()
        """Stages."""
        self.kills = self.attempts = 0
        self.cluster = Cluster(self._note)

    def _note(self, number: int, method: str, path: str) -> str:
        """What is over, as the requests to the bucket say; nothing goes wrong with them."""
        if method == "PUT" and (match := re.search(r"/runs/(\w+)/\w+/manifest.json", path)):
            self.over.add(match[1])
        return ""

    @property
    def stage(self) -> str:
        return next((stage for stage in STAGES if stage not in self.over), "evaluate")

    def run(self) -> None:
        """Until the command ends with 0."""
        self._give()
        while (code := self.process.poll()) != 0:
            assert time.monotonic() - self.begin < LONGEST, self.said()
            self._mend()
            if code is not None:
                self._give()
            share, *_ = STAGES[self.stage]
            if self.kills < KILLS * share and time.monotonic() >= self._due:
                self._kill()
                self._wait_for_next()
            time.sleep(0.2)

    def _give(self) -> None:
        self.cluster.wait()
        self.attempts += 1
        with (self.cluster.head.tmp / "ddpm.log").open("a") as log:
            self.process = self.cluster.start(*self.command, stdout=log)
        self._wait_for_next()

    def _wait_for_next(self) -> None:
        _, *bounds = STAGES[self.stage]
        self._due = time.monotonic() + self.random.uniform(*bounds)

    def said(self) -> str:
        return (self.cluster.head.tmp / "ddpm.log").read_text()

    def _kill(self) -> None:
        victims = self._processes()
        kind = self.random.choice(sorted([*victims, "node", "head"]))
        if kind == "node":
            name = self.random.choice(sorted(self.cluster.nodes))
            self.cluster.replace(self.cluster.nodes[name])
        elif kind == "head":
            name = self.cluster.head.name
            self.cluster.renew()
        elif kind == "MLflow":  # with what it has started, which would hold its port
            name = self.cluster.mlflow.name
            for _, process in victims[kind]:
                kill(process)
        else:
            name, process = self.random.choice(victims[kind])
            kill(process)
        self.kills += 1
        seconds = time.monotonic() - self.begin
        print(f"{self.kills:>3} {seconds:5.0f} s  {self.stage:<11}{kind} on {name}", flush=True)

    def _processes(self) -> dict[str, list[tuple[str, psutil.Process]]]:
        """What can be killed, by its kind; (name of its machine, process)."""
        found: dict[str, list[tuple[str, psutil.Process]]] = {}
        for machine in (*self._ray(), self.cluster.mlflow):
            for process in machine.processes():
                if kind := kind_of(process):
                    found.setdefault(kind, []).append((machine.name, process))
        return found

    def _ray(self) -> list[Machine | Room]:
        return [self.cluster.head, *self.cluster.nodes.values()]

    def _mend(self) -> None:
        """What an operator's supervisor does, such as Kubernetes."""
        lost = [machine for machine in self._ray() if has_joined(machine) and is_lost(machine)]
        if self.cluster.head in lost:
            self.cluster.renew()
        else:
            for node in lost:
                self.cluster.replace(node)
        if self.cluster.mlflow_server.poll() is not None:
            self.cluster.start_mlflow()


def kind_of(process: psutil.Process) -> str:
    """Empty for what is no process of Ray, MLflow or the project."""
    with contextlib.suppress(psutil.Error):
        title = " ".join(process.cmdline())
        return next((kind for kind, part in KINDS.items() if part in title), "")
    return ""


def is_lost(machine: Machine | Room) -> bool:
    """Whether Ray has ended there; and with it the node, or all nodes."""
    kinds = {kind_of(process) for process in machine.processes()}
    needed = {"raylet", "GCS"} if machine.name.startswith("head") else {"raylet"}
    return not needed <= kinds


def kill(process: psutil.Process) -> None:
    with contextlib.suppress(psutil.NoSuchProcess):
        process.kill()


def test_a_cluster_killed_at_random_loses_nothing(tmp_path: Path) -> None:
    quiet = Workplace(tmp_path / "quiet")
    quiet.folder.mkdir()
    begin = time.monotonic()
    quiet.ddpm(*tiny_command("run", *SETTINGS), timeout=HANG)
    print(f"\nin peace, on this machine: {time.monotonic() - begin:.0f} s")
    disturbed = Disturbed(tiny_command("run", *SETTINGS, f"storage={RUNS}"))
    try:
        disturbed.run()
        seconds = time.monotonic() - disturbed.begin
        print(f"{disturbed.kills} kills, {disturbed.attempts} attempts, {seconds:.0f} s")
        assert disturbed.kills == KILLS, "it ended too soon: make it longer"
        assert_all_is_as_in_peace(disturbed.cluster, quiet, tmp_path)
    finally:
        end(disturbed.process)
        disturbed.cluster.close()
