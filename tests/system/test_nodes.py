"""Nodes that share no file, and are lost: whichever and when, the pipeline ends as in peace.

They are machines (tests/machines.py) with addresses, homes, working folders and temporary files of
their own; what they have in common is a bucket and an MLflow server. A node is lost at a moment
that its own requests to the bucket tell: in the middle of each stage. While it trains or serves its
power fails, and nobody is told. From a task Ray would wait for an answer for minutes then, so in
the other stages it is lost as a virtual machine is, whose kernel closes its connections.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline import storage
from pipeline.storage import Manifest
from tests import needs
from tests.conftest import Workplace, end, tiny_command
from tests.machines import Machine, why_not
from tests.rooms import Room
from tests.s3 import stumble
from tests.system.head.test_pipeline import metric_history

pytest.importorskip("moto", reason=needs.extra("moto", "s3-test"))

from tests.cluster import Cluster
from tests.conftest import HANG

RUNS = "s3://bucket/runs"
PART = re.compile(r"^PUT .*/preprocess/.*\.parquet")
PORT = 8000
RANK, REPLICA = "RayTrainWorker", "ddpm:Replica"
"""In the titles of Ray's processes."""

needs_machines = needs.MACHINES.met_if(not why_not())


class PowerCuts:
    """A node is lost in each of three stages, and another comes; requests fail now and then."""

    DUE = (
        ("preprocess", "PUT", r"/preprocess/.*\.parquet"),
        ("train", "PUT", r"/train/.*/step-000000040/"),
        ("evaluate", "GET", r"/train/.*/step-000000060/ema"),  # by what draws and measures
    )

    def __init__(self) -> None:
        self.cluster: Cluster | None = None
        self.lost: dict[str, Machine | Room] = {}
        """By stage."""
        self.ranks: dict[str, int] = {}
        """How many ranks each machine has when one of them is lost."""
        self.caching: set[str] = set()
        """Then, those that have the images on their disk."""
        self._is_trained = False

    def __call__(self, number: int, method: str, path: str) -> str:
        self._cut(number, method, path)
        return stumble(number)

    def _cut(self, number: int, method: str, path: str) -> None:
        cluster = self.cluster
        if cluster is None or len(self.lost) == len(self.DUE):
            return
        self._is_trained |= method == "PUT" and bool(re.search("/train/.*/manifest.json", path))
        stage, of_method, pattern = self.DUE[len(self.lost)]
        if method != of_method or not re.search(pattern, path):
            return
        if stage == "evaluate" and not self._is_trained:  # a preview
            return
        victim = cluster.nodes.get(cluster.bucket.keys[number])
        if stage == "train":
            machines = (cluster.head, *cluster.nodes.values())
            ranks = {machine.name: len(machine.processes(RANK)) for machine in machines}
            self.ranks = {name: number for name, number in ranks.items() if number}
            pattern = "ray-ddpm-cache-*/*/images.npy"
            self.caching = {machine.name for machine in machines if any(machine.tmp.glob(pattern))}
            victim = next(node for name, node in cluster.nodes.items() if name in self.ranks)
        if victim is not None:
            self.lost[stage] = victim
            cluster.replace(victim, silently=stage == "train")


@pytest.fixture(scope="module")
def cuts() -> PowerCuts:
    return PowerCuts()


@pytest.fixture(scope="module")
def cluster(cuts: PowerCuts) -> Iterator[Cluster]:
    cluster = Cluster(cuts)
    try:
        cluster.wait()
        cuts.cluster = cluster
        yield cluster
    finally:
        cluster.close()


@pytest.fixture(scope="module")
def output(cluster: Cluster) -> str:
    """What a pipeline said from which a node was lost in every stage."""
    process = cluster.start(*tiny_command("run", f"storage={RUNS}"))
    try:
        output, _ = process.communicate(timeout=HANG)
    finally:
        end(process)
    assert process.returncode == 0, output
    return output


def manifest(stage: str) -> Manifest:
    (name,) = storage.list_names(f"{RUNS}/{stage}")
    found = storage.read_manifest(f"{RUNS}/{stage}/{name}")
    assert found is not None
    return found


def assert_all_is_as_in_peace(cluster: Cluster, quiet: Workplace, folder: Path) -> None:
    """Every output, figure and metric, bit for bit; but for what says how fast it went."""
    with cluster.reached():
        for stage in ("preprocess", "reference", "train", "sample"):
            made, wanted = manifest(stage), quiet.manifest(stage)
            assert made.id == wanted["id"]
            files = [file.model_dump() for file in made.files]
            assert lasting(files) == lasting(wanted["files"])
        figures = manifest("evaluate").stats["figures"]
        assert figures == quiet.manifest("evaluate")["stats"]["figures"]
    tracked = cluster.tracked(folder)
    for name in (
        "train/loss",
        "train/lr",
        "train/grad_norm",
        "eval/holdout_loss",
        "eval/class_accuracy",
    ):
        assert metric_history(tracked, name) == metric_history(quiet, name)


def lasting(files: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [file for file in files if not file["path"].endswith("/state.json")]


def test_a_node_lost_in_every_stage_changes_nothing(
    tiny: Workplace, cluster: Cluster, cuts: PowerCuts, output: str, tmp_path: Path
) -> None:
    assert list(cuts.lost) == ["preprocess", "train", "evaluate"], output
    assert_all_is_as_in_peace(cluster, tiny, tmp_path)
    assert list(cuts.ranks.values()) == [1, 1]
    assert cuts.caching >= set(cuts.ranks)
    bucket = cluster.bucket
    pairs = zip(bucket.requests, bucket.keys, strict=True)
    assert len({key for (method, path, _), key in pairs if PART.search(f"{method} {path}")}) > 1


@needs_machines
def test_what_only_the_head_sees_is_refused_before_any_work(cluster: Cluster) -> None:
    process = cluster.start(*tiny_command("preprocess"))
    try:
        output, _ = process.communicate(timeout=HANG)
    finally:
        end(process)
    assert process.returncode == 2, output
    assert re.search("error: storage=.*/runs is on this machine, and the cluster's node", output)
    assert "does not see it: choose a place that all nodes reach, such as --set storage" in output
    assert not (cluster.head.home / "runs" / "preprocess").exists()
