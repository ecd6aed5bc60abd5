"""A head of Ray on this machine, which a test's commands join or submit to."""

import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import psutil

from tests.conftest import ENVIRONMENT, end, free_port, listens, wait_for

TOKEN = "a-token-of-these-tests-and-no-others-0123456789"


class Head(NamedTuple):
    pid: int
    port: int
    """Of its job server."""
    gcs: int
    """Where nodes and commands join it."""

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def joined(self) -> dict[str, str]:
        """The environment of a command that joins it, if it was started with TOKEN."""
        return {
            "RAY_ADDRESS": f"127.0.0.1:{self.gcs}",
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": TOKEN,
        }


@contextmanager
def started(**environment: str) -> Iterator[Head]:
    """A head with 4 CPUs, and this in its environment."""
    port, gcs, client, agent = free_port(), free_port(), free_port(), free_port()
    bin = Path(sys.executable).parent
    with tempfile.TemporaryDirectory(prefix="ray-") as folder:  # sockets want a short path
        start = f"start --head --block --num-cpus=4 --port={gcs} --dashboard-port={port}"
        start += f" --temp-dir={folder} --node-ip-address=127.0.0.1"
        start += f" --ray-client-server-port={client} --dashboard-agent-listen-port={agent}"
        process = subprocess.Popen(
            [str(bin / "ray"), *start.split(), "--disable-usage-stats"],
            env={**ENVIRONMENT, "PATH": f"{bin}:{os.environ['PATH']}", **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            wait_for(lambda: listens(port), "the head's job server", process)
            yield Head(process.pid, port, gcs)
        finally:
            if process.poll() is None:
                for child in psutil.Process(process.pid).children(recursive=True):
                    child.kill()  # it would wait for them, and they for it
            end(process)
