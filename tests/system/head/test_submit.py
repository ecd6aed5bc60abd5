"""Runs as jobs of a real Ray head, which asks for a token."""

import http.server
import logging
import shutil
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import ray

from pipeline.errors import ClusterError
from tasks.jobs import client
from tests.conftest import (
    ENVIRONMENT,
    HANG,
    ROOT,
    TINY,
    Workplace,
    free_port,
    ray_workers,
    wait_for,
)
from tests.head import TOKEN, Head


@pytest.fixture
def place(tiny: Workplace, tmp_path: Path) -> Workplace:
    """A folder with a config in it, and with a model that has not been registered."""
    shutil.copy(ROOT / "configs" / "digits.yaml", tmp_path)
    for stage in ("preprocess", "reference", "train", "evaluate"):
        shutil.copytree(tiny.folder / "runs" / stage, tmp_path / "runs" / stage)
    return Workplace(tmp_path, {"RAY_AUTH_TOKEN": TOKEN})


def command(address: str, *more: str, sets: tuple[str, ...] = ()) -> list[str]:
    """`ddpm submit` of the tiny run."""
    words = [word for value in [*TINY, *sets] for word in ("--set", value)]
    return ["submit", "digits.yaml", "--address", address, *words, *more]


class Cable:
    """A way to the head that can be cut."""

    def __init__(self, port: int) -> None:
        self._port = port
        self._server = socket.create_server(("127.0.0.1", 0))
        self._ends: list[socket.socket] = []
        self.address = f"http://127.0.0.1:{self._server.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        with suppress(OSError):  # closed
            while True:
                here, _ = self._server.accept()
                there = socket.create_connection(("127.0.0.1", self._port))
                self._ends += [here, there]
                for pair in ((here, there), (there, here)):
                    threading.Thread(target=self._pass_on, args=pair, daemon=True).start()

    @staticmethod
    def _pass_on(source: socket.socket, target: socket.socket) -> None:
        with suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
        for one in (source, target):
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        source.close()  # its other thread closes the target

    def cut(self) -> None:
        for one in self._ends:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        self._ends.clear()

    def close(self) -> None:
        self._server.close()
        self.cut()


def test_a_job_outlives_its_client_and_its_driver_and_is_found_again(
    head: Head, place: Workplace
) -> None:
    cable = Cable(head.port)
    client = place.start(*command(head.address, "--attempts", "2", "--wait"))
    assert client.stdout is not None
    first = client.stdout.readline()
    assert first.startswith("submitted digits-"), first
    job = first.split()[1].rstrip(";")
    client.send_signal(signal.SIGHUP)  # its terminal is lost
    client.communicate(timeout=HANG)

    again = place.start(*command(cable.address, "--wait"))
    assert again.stdout is not None
    assert again.stdout.readline().startswith(f"{job} is at this run already")
    # its samples come next
    wait_for(lambda: list(place.folder.glob("runs/register/*/manifest.json")), "a version", again)
    cable.cut()
    (driver,) = [
        process
        for process in ray_workers(head.pid, "tasks run")
        if "tasks.jobs.attempts" not in process.cmdline()
    ]
    driver.kill()
    output, _ = again.communicate(timeout=HANG)
    cable.close()
    assert again.returncode == 0, output
    assert output.count("attempt 1 of 2 was killed by signal 9: the next goes on") == 1
    log = place.ddpm("logs", job, "--address", head.address)
    assert output == log
    assert "cached" in log, "the second attempt began anew"

    output = place.ddpm(*command(head.address))
    second = f"{job.removesuffix('-1')}-2"
    assert output.startswith(f"submitted {second};")
    lines = place.ddpm("jobs", "--address", head.address).splitlines()
    known = [line.split()[:3] for line in lines[1:]]
    assert known[0] == [job, "digits.yaml", "succeeded"]
    assert known[1][:2] == [second, "digits.yaml"]
    place.ddpm("cancel", second, "--address", head.address)


def test_a_job_is_cancelled_and_its_exit_code_told(head: Head, place: Workplace) -> None:
    sets = ("training.steps=100000", "name=long")  # which must be trained
    both = [place.start(*command(head.address, "--attempts", "3", sets=sets)) for _ in range(2)]
    outputs = [process.communicate(timeout=HANG)[0] for process in both]
    (job,) = {word for output in outputs for word in output.split() if word.startswith("long-")} & {
        output.split()[1 if output.startswith("submitted") else 0].rstrip(";") for output in outputs
    }
    assert sorted(output.startswith("submitted") for output in outputs) == [False, True]
    wait_for(lambda: list(place.folder.glob("runs/train/*/.lock")), "a training")
    where = ["--address", head.address]
    follower = place.start("logs", job, "--follow", *where)
    assert f"{job} is stopped" in place.ddpm("cancel", job, *where)
    output, _ = follower.communicate(timeout=HANG)
    assert follower.returncode == 130
    assert "has been stopped; submitted again, the run goes on" in output
    assert not [p for p in ray_workers(head.pid, "tasks run") if p.status() != psutil.STATUS_ZOMBIE]
    assert "was over already" in place.ddpm("cancel", job, *where)
    output = place.ddpm("logs", "nosuch", *where, code=2)
    assert f"error: there is no job nosuch at {head.address}" in output
    wrong = command(head.address, "--wait", "--attempts", "3", sets=("data.source=/nowhere",))
    output = place.ddpm(*wrong, code=2)
    assert "/nowhere" in output
    assert "the next goes on" not in output, "the user's mistake is not tried again"


def test_a_cluster_that_cannot_be_used_is_one_sentence(head: Head, place: Workplace) -> None:
    def refused(address: str, **environment: str) -> str:
        told = subprocess.run(
            [sys.executable, "-m", "tasks", *command(address)],
            cwd=place.folder,
            env={**ENVIRONMENT, "HOME": str(place.folder), **environment},
            capture_output=True,
            text=True,
            timeout=HANG,
        )
        assert told.returncode == 2, told
        assert told.stderr.count("\n") == 1, told.stderr
        return told.stderr

    assert "it asks for a token; put that of the head" in refused(head.address)
    assert "it does not know this token; put that of" in refused(
        head.address, RAY_AUTH_TOKEN="another-token-0123456789"
    )
    assert "nothing answers there" in refused(f"http://127.0.0.1:{free_port()}")

    with answering("hello") as address:
        assert "no job server of Ray; give the address" in refused(address)
    with answering('{"ray_version": "2.9.0"}') as address:
        assert "it runs Ray 2.9.0, and here is Ray 2." in refused(address)


def test_a_head_whose_agent_does_not_listen_is_one_sentence(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Another Ray on its machine has the port; so said Ray 2.60 for as long as it was asked."""
    monkeypatch.setattr(client, "START_SECONDS", 0.0)
    monkeypatch.setattr(client, "POLL_SECONDS", 0.0)
    told = "No available agent to submit job, please try again later."
    with (
        answering(f'{{"ray_version": "{ray.__version__}"}}', jobs="[]", posted=told) as address,
        pytest.raises(ClusterError, match="has port 52365, end that, or start the head with"),
    ):
        client.Jobs(address).submit(client.Run("digits", "", "digits.yaml", []), 1, None)


@contextmanager
def answering(version: str, jobs: str = "", posted: str = "") -> Iterator[str]:
    """A server that is no head, but says these; what is posted is a 500. Yields its address."""

    class Answer(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._say(200, jobs if self.path.startswith("/api/jobs") else version)

        def do_POST(self) -> None:
            self._say(500, posted)

        def _say(self, status: int, text: str) -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, *_: object) -> None:
            pass

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Answer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            logging.disable(logging.NOTSET)  # which `Jobs` had done for its client
