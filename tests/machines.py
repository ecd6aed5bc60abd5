"""Machines on this machine, in namespaces of Linux: what one does not share is not seen there.

A `Machine` has an address, a host name, processes, a /dev/shm, a /tmp and an empty home of its own.
Of this machine it sees what is installed, this repository among it, and no file of a test. It is
lost as a virtual machine is, all its processes at once and its kernel closing their connections, or
as in a power failure: nobody is told, for its cable goes first. All of it goes with the process
that made it, however that ends.

Needs root, or `unshare --map-root-user --net`.
"""

import contextlib
import os
import subprocess
from pathlib import Path
from typing import IO

import psutil

from tests.conftest import HANG, KEPT, ROOT, wait_for

HOME = "/tmp/home"
INIT = f"""
set -e
mount --bind "{ROOT}" /mnt
mount -t proc none /proc
mount -t tmpfs none /dev/shm
mount -t tmpfs none /tmp
mkdir -p "{ROOT}" {HOME}
mount --bind /mnt "{ROOT}"  # again, where it was in /tmp
touch /tmp/hosts
mount --bind /tmp/hosts /etc/hosts
hostname "$NAME"
ip link set lo up
echo up
cat  # until its input ends, and this machine with it
:
"""
"""Process 1 of a machine."""


def why_not() -> str:
    """Why there can be no machines here; empty if there can."""
    command = ["unshare", "--net", "--mount", "--pid", "--uts", "--ipc", "--fork"]
    try:
        made = subprocess.run([*command, "ip", "link"], capture_output=True, text=True)
    except FileNotFoundError as error:
        return f"{error.filename} is not installed"
    return made.stderr.strip()


class Lan:
    """A switch, to which this machine is connected, too, as `address`."""

    def __init__(self) -> None:
        self._switch = subprocess.Popen(["unshare", "--net", "cat"], stdin=subprocess.PIPE)
        pid = self._switch.pid
        await_namespace(pid)
        # 198.18.0.0/15 is for tests and in no other network
        self._subnet = f"198.{18 + pid // 256 % 2}.{pid % 256}"
        self.address = f"{self._subnet}.1"
        self._number = 1
        ip(f"link add ddpm{pid} type veth peer name here netns {pid}")
        ip(f"address add {self.address}/24 dev ddpm{pid}")
        ip(f"link set ddpm{pid} up")
        self.switch("link add switch type bridge")
        self.switch("link set switch up")
        self.switch("link set here master switch up")

    def switch(self, command: str) -> None:
        ip(command, self._switch.pid)

    def connect(self, pid: int) -> tuple[str, str]:
        """Give a machine an address; returns that, and the name of its cable."""
        self._number += 1
        cable, address = f"cable{self._number}", f"{self._subnet}.{self._number}"
        self.switch(f"link add {cable} type veth peer name eth0 netns {pid}")
        self.switch(f"link set {cable} master switch up")
        ip(f"address add {address}/24 dev eth0", pid)
        ip("link set eth0 up", pid)
        ip(f"route add default via {self.address}", pid)  # by which a machine knows its own address
        return address, cable

    def close(self) -> None:
        assert self._switch.stdin is not None
        self._switch.stdin.close()
        self._switch.wait(timeout=HANG)


class Machine:
    def __init__(self, lan: Lan, name: str) -> None:
        self.name, self._lan = name, lan
        namespaces = ["--net", "--mount", "--pid", "--uts", "--ipc", "--fork", "--kill-child"]
        self._process = subprocess.Popen(
            ["unshare", *namespaces, "sh", "-c", INIT],
            env={**os.environ, "NAME": name},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert self._process.stdout is not None
        assert self._process.stdout.readline() == "up\n"
        (init,) = psutil.Process(self._process.pid).children()
        self.pid = init.pid
        self.address, self._cable = lan.connect(self.pid)
        hosts = f"127.0.0.1 localhost\n{self.address} {name}\n"  # its own name leads to its address
        (self.tmp / "hosts").write_text(hosts)
        self._started: list[subprocess.Popen[str]] = []

    @property
    def tmp(self) -> Path:
        """Its /tmp, as this machine sees it."""
        return Path(f"/proc/{self.pid}/root/tmp")

    @property
    def home(self) -> Path:
        """Likewise; commands are started in it."""
        return self.tmp / Path(HOME).name

    @property
    def is_there(self) -> bool:
        return self._process.poll() is None

    def processes(self, title: str = "") -> list[psutil.Process]:
        """Those there whose title holds `title`."""
        found, place = [], self._namespace(self.pid)
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if self._namespace(process.pid) == place and title in " ".join(process.cmdline()):
                    found.append(process)
        return found

    def start(
        self, *command: str, stdout: int | IO[str] | None = None, **environment: str
    ) -> subprocess.Popen[str]:
        """Start a command there, in its home and with nothing of this environment."""
        kept = {name: os.environ[name] for name in KEPT if name in os.environ}
        values = {**kept, "HOME": HOME, "PYTHONPATH": str(ROOT), **environment}
        words = [f"{name}={value}" for name, value in values.items()]
        enter = ["nsenter", "--all", "--target", str(self.pid)]
        process = subprocess.Popen(
            [*enter, "env", "--ignore-environment", f"--chdir={HOME}", *words, *command],
            stdin=subprocess.DEVNULL,
            stdout=stdout,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self._started.append(process)
        return process

    def lose(self, silently: bool = False) -> None:
        """All that runs there ends at once; `silently`, as when its power fails."""
        if self.is_there:
            if silently:
                self._lan.switch(f"link set {self._cable} down")
            self._process.kill()
            self._process.wait(timeout=HANG)
        for process in self._started:
            process.wait(timeout=HANG)
        for pipe in (self._process.stdin, self._process.stdout):
            assert pipe is not None
            pipe.close()

    @staticmethod
    def _namespace(pid: int) -> str:
        return os.readlink(f"/proc/{pid}/ns/pid")


def ip(command: str, namespace_of: int | None = None) -> None:
    """`ip COMMAND`, in the network namespace of a process."""
    enter = ["nsenter", "--net", "--target", str(namespace_of)] if namespace_of else []
    subprocess.run([*enter, "ip", *command.split()], check=True)


def await_namespace(pid: int) -> None:
    def own() -> bool:
        return os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")

    wait_for(own, "a namespace")
