"""Rooms of this machine, for where no machines can be made: each has a home and temporary files.

They have the address 127.0.0.1 and the file system in common, so a `Room` does not show that
nothing else is shared, as a `Machine` does; it shows that nothing is left behind in a lost one.
"""

import contextlib
import os
import shutil
import subprocess
import tempfile
from pathlib import Path
from typing import IO

import psutil

from tests.conftest import HANG, KEPT, ROOT


class Room:
    """See `Machine`, whose attributes it has."""

    address = "127.0.0.1"

    def __init__(self, name: str) -> None:
        self.name = name
        self.tmp = Path(tempfile.mkdtemp(prefix="", dir="/tmp"))  # short: Ray makes sockets there
        self.home = self.tmp / "home"
        self.home.mkdir()
        self._started: list[subprocess.Popen[str]] = []

    def processes(self, title: str = "") -> list[psutil.Process]:
        found, sessions = [], {process.pid for process in self._started}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if os.getsid(process.pid) in sessions and title in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def start(
        self, *command: str, stdout: int | IO[str] | None = None, **environment: str
    ) -> subprocess.Popen[str]:
        kept = {name: os.environ[name] for name in KEPT if name in os.environ}
        here = {name: str(self.tmp) for name in ("TMPDIR", "RAY_TMPDIR")}
        process = subprocess.Popen(
            command,
            cwd=self.home,
            env={**kept, **here, "HOME": str(self.home), "PYTHONPATH": str(ROOT), **environment},
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self._started.append(process)
        return process

    def lose(self, silently: bool = False) -> None:
        """All that runs there ends at once; never silently."""
        while found := self.processes():
            for process in found:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.kill()
            for started in self._started:
                started.wait(timeout=HANG)
            psutil.wait_procs(found, timeout=HANG)
        shutil.rmtree(self.tmp, ignore_errors=True)
