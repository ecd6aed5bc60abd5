"""A Ray cluster of machines that have a bucket and an MLflow server in common, and no file.

Each machine has an access key of its own, so the requests to the bucket say whose they are. Where
no machines can be made they are rooms, see tests/rooms.py.
"""

import contextlib
import functools
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import pytest
from s3fs import S3FileSystem

from tests.conftest import Workplace, free_port, listens, wait_for
from tests.machines import Lan, Machine, why_not
from tests.rooms import Room
from tests.s3 import S3, Fault, Unreliable

ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "RAY_AUTH_MODE": "disabled",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    # a lost node is given up after some seconds, not a minute
    "RAY_health_check_initial_delay_ms": "1000",
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "2",
}


class Cluster:
    """A head and nodes of one CPU each.

    Args:
        fault: of the bucket, see tests/s3.py.
    """

    def __init__(self, fault: Fault = lambda *_: "", num_nodes: int = 2) -> None:
        self.lan = None if why_not() else Lan()
        self.s3 = S3()
        address = self.lan.address if self.lan else Room.address
        self.bucket = Unreliable(self.s3, fault, address)
        self._ray_port, self._mlflow_port = free_port(), free_port()
        self._number = 0
        self.mlflow = self._machine("mlflow")
        self.start_mlflow()
        self.nodes: dict[str, Machine | Room] = {}
        """By name, which is their access key; without the head."""
        self.start_head()
        for _ in range(num_nodes):
            self.add()

    # --- machines ---------------------------------------------------------------------------------

    def start_mlflow(self) -> None:
        command = (
            f"-m mlflow server --host {self.mlflow.address} --port {self._mlflow_port} --workers 1"
        )
        command += " --backend-store-uri sqlite:///mlflow.db --artifacts-destination artifacts"
        command += f" --allowed-hosts {self.mlflow.address}:{self._mlflow_port}"
        with (self.mlflow.tmp / "mlflow.log").open("a") as log:
            self.mlflow_server = self.mlflow.start(sys.executable, *command.split(), stdout=log)

    def start_head(self) -> None:
        """A head, and a cluster that has no other node yet."""
        self.head = self._machine("head")
        head = f"--head --port {self._ray_port} --include-dashboard false"
        self._start_ray(self.head, *head.split())
        wait_for(functools.partial(has_joined, self.head), "the head")

    def add(self) -> Machine | Room:
        """A new node, which is not waited for where it is a machine."""
        node = self._machine("node")
        self.nodes[node.name] = node
        self._start_ray(node, "--address", f"{self.head.address}:{self._ray_port}")
        if not self.lan:  # two that start at once would choose the same name for a socket
            wait_for(functools.partial(has_joined, node), f"{node.name} to join")
        return node

    def replace(self, node: Machine | Room, silently: bool = False) -> Machine | Room:
        """A node is lost; another comes."""
        del self.nodes[node.name]
        node.lose(silently)
        return self.add()

    def renew(self) -> None:
        """A head that is lost is the end of a cluster: another takes its place."""
        number = len(self.nodes)
        for machine in (self.head, *self.nodes.values()):
            machine.lose()
        self.nodes.clear()
        self.start_head()
        for _ in range(number):
            self.add()

    def wait(self) -> None:
        """Until all of it is there."""
        for machine in self.nodes.values():
            wait_for(functools.partial(has_joined, machine), f"{machine.name} to join")
        wait_for(lambda: listens(self._mlflow_port, self.mlflow.address), "MLflow")

    def close(self) -> None:
        for machine in (self.head, *self.nodes.values(), self.mlflow):
            machine.lose()
        if self.lan:
            self.lan.close()
        self.bucket.close()
        self.s3.close()

    def _machine(self, what: str) -> Machine | Room:
        self._number += 1
        name = f"{what}{self._number}"
        return Machine(self.lan, name) if self.lan else Room(name)

    def _start_ray(self, machine: Machine | Room, *options: str) -> None:
        command = f"-m ray.scripts.scripts start --block --node-ip-address {machine.address}"
        command += " --num-cpus 1 --object-store-memory 100000000 --disable-usage-stats"
        command += " --include-log-monitor false"
        with (machine.tmp / "ray.log").open("w") as log:
            environment = self._environment(machine)
            machine.start(sys.executable, *command.split(), *options, stdout=log, **environment)

    # --- its use ----------------------------------------------------------------------------------

    def start(
        self, *arguments: str, stdout: int | IO[str] = subprocess.PIPE, **environment: str
    ) -> subprocess.Popen[str]:
        """Start a `ddpm` command on the head."""
        there = {
            "RAY_ADDRESS": f"{self.head.address}:{self._ray_port}",
            "MLFLOW_TRACKING_URI": f"http://{self.mlflow.address}:{self._mlflow_port}",
            "COLUMNS": "200",
        }
        environment = self._environment(self.head) | there | environment
        command = (sys.executable, "-m", "tasks", *arguments)
        return self.head.start(*command, stdout=stdout, **environment)

    @contextlib.contextmanager
    def reached(self) -> Iterator[None]:
        """This process finds the bucket."""
        with pytest.MonkeyPatch.context() as patch:
            for name, value in self.s3.environment().items():
                patch.setenv(name, value)
            S3FileSystem.clear_instance_cache()
            yield
        S3FileSystem.clear_instance_cache()

    def tracked(self, folder: Path) -> Workplace:
        """A copy of MLflow's database, where the workplaces of other tests have it."""
        shutil.copy(self.mlflow.home / "mlflow.db", folder)  # sqlite opens none of another machine
        return Workplace(folder)

    def _environment(self, machine: Machine | Room) -> dict[str, str]:
        return ENVIRONMENT | self.s3.environment(self.bucket.endpoint, machine.name)


def has_joined(machine: Machine | Room) -> bool:
    return "Ray runtime started" in (machine.tmp / "ray.log").read_text()
