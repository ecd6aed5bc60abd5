"""Tests that fail on purpose, each in the middle of something: test_containment.py runs them."""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.conftest import Workplace, free_port, ray_workers, tiny_command, wait_for
from tests.head import Head, started
from tests.s3 import S3
from tests.servers import mlflow_server, postgres
from tests.service import Service, served


@pytest.fixture
def head() -> Iterator[Head]:
    with started() as head:
        yield head


@pytest.fixture
def service(tiny: Workplace) -> Iterator[Service]:
    with served(tiny, "--replicas", "1") as service:
        yield service


def test_with_a_command_and_its_ray(tmp_path: Path) -> None:
    place = Workplace(tmp_path)
    process = place.start(*tiny_command("run", "training.steps=100000"))
    wait_for(lambda: ray_workers(process.pid, "RayTrainWorker"), "a worker", process)
    raise AssertionError("on purpose")


def test_with_a_command_whose_driver_is_gone(tmp_path: Path) -> None:
    process = Workplace(tmp_path).start(*tiny_command("run", "training.steps=100000"))
    wait_for(lambda: ray_workers(process.pid, "RayTrainWorker"), "a worker", process)
    process.kill()
    raise AssertionError("on purpose")


def test_with_a_head_and_a_job(head: Head, tmp_path: Path) -> None:
    Workplace(tmp_path).start(*tiny_command("run"), RAY_ADDRESS=f"127.0.0.1:{head.gcs}")
    wait_for(lambda: ray_workers(head.pid, "ray::"), "a task")
    raise AssertionError("on purpose")


def test_with_a_service(service: Service) -> None:
    assert service.images(num_inference_steps=1)
    raise AssertionError("on purpose")


def test_with_servers(tmp_path: Path) -> None:
    S3()
    with postgres(), mlflow_server(tmp_path, free_port()):
        raise AssertionError("on purpose")


def test_with_a_process_of_its_own() -> None:
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100000)"])
    raise AssertionError("on purpose")


def test_of_an_innocent() -> None:
    own = {child.name() for child in psutil.Process().children(recursive=True)}
    assert not [name for name in own if name.startswith(("python", "ray", "gcs", "postgres"))]
