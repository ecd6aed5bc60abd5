"""No test of this tier starts a process: what needs one belongs to tests/system."""

import os
import sys
import uuid
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    import torch

    from pipeline.data.place import Place

HERE = Path(__file__).parent
COMPILERS = {"c++", "g++", "gcc", "cc", "ninja", "ld", "ldconfig", "uname", "which"}
"""What building a C++ extension, and looking for a library, may start."""
_running: list[str] = []
"""The test of this tier that runs now."""


def _refuse(event: str, arguments: tuple[Any, ...]) -> None:
    if not _running or event not in ("subprocess.Popen", "os.fork", "os.posix_spawn", "os.system"):
        return
    program = os.path.basename(str(arguments[0])) if event == "subprocess.Popen" else event
    if program not in COMPILERS:
        raise AssertionError(f"{_running[0]} starts a process ({program}): move it to tests/system")


sys.addaudithook(_refuse)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Generator[None, Any, Any]:
    if item.path.is_relative_to(HERE):  # this hook is called for the tests of all folders
        _running.append(item.nodeid)
    try:
        return (yield)
    finally:
        _running.clear()


@pytest.fixture
def device() -> Iterator["torch.device"]:
    """A device that is not the CPU, see devices.py."""
    from tests.unit.devices import opened

    with opened() as there:
        yield there


@pytest.fixture(params=["local", "memory"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator["Place"]:
    """An empty folder, on two file systems."""
    from fsspec.core import url_to_fs

    from pipeline.data.place import Place

    if request.param == "local":
        yield Place(str(tmp_path))
        return
    uri = f"memory://{uuid.uuid4().hex}"
    yield Place(uri)
    fs, root = url_to_fs(uri)
    if fs.exists(root):
        fs.rm(root, recursive=True)


@pytest.fixture
def local(tmp_path: Path) -> "Place":
    from pipeline.data.place import Place

    return Place(str(tmp_path))
