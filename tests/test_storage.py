"""Files are absent or whole; an output counts when its manifest stands."""

import errno
import os
import subprocess
import sys
import time
import tracemalloc
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.errors import StorageError
from pipeline.storage import Manifest


@pytest.fixture(params=["local", "memory"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    return str(tmp_path) if request.param == "local" else f"memory://{tmp_path.name}"


def test_what_is_written_is_read_back(root: str) -> None:
    uri = storage.join(root, "a", "b.bin")
    entry = storage.write_bytes(uri, b"hello")
    assert (entry.path, entry.bytes) == ("b.bin", 5)
    assert entry.sha256 == storage.sha256(storage.read_bytes(uri))
    assert storage.exists(uri)
    assert storage.list_names(storage.join(root, "a")) == ["b.bin"]
    storage.remove(uri)
    storage.remove(uri)
    assert not storage.exists(uri)
    assert storage.list_names(storage.join(root, "nowhere")) == []


def test_an_output_without_a_manifest_does_not_count(root: str) -> None:
    folder = storage.join(root, "train", "abc")
    assert storage.read_manifest(folder) is None
    storage.write_bytes(storage.join(folder, "part"), b"x")
    assert storage.read_manifest(folder) is None
    made = Manifest(format=1, stage="train", id="abc", inputs={}, config={}, files=[])
    committed = storage.commit(folder, made)
    assert committed.created_at
    assert storage.read_manifest(folder) == committed


def test_a_manifest_that_is_not_one_is_named(root: str) -> None:
    storage.write_bytes(storage.join(root, "manifest.json"), b"{")
    with pytest.raises(StorageError, match=r"manifest\.json is not a manifest"):
        storage.read_manifest(root)


def test_a_writer_killed_in_the_middle_leaves_the_old_content(tmp_path: Path) -> None:
    uri = str(tmp_path / "file")
    storage.write_bytes(uri, b"old" * 1000)
    code = (
        "import os, sys; from pipeline import storage\n"
        "os.replace = lambda *_: os.kill(os.getpid(), 9)\n"
        f"storage.write_bytes({uri!r}, b'new' * 1000)"
    )
    done = subprocess.run([sys.executable, "-c", code], check=False)
    assert done.returncode == -9
    assert storage.read_bytes(uri) == b"old" * 1000


def test_a_failed_write_leaves_no_litter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(fd: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match="the disk is full"):
        storage.write_bytes(str(tmp_path / "file"), b"x")
    assert list(tmp_path.iterdir()) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="a part of the path is a file"):
        storage.check_writable(str(tmp_path / "file" / "runs"))
    with pytest.raises(StorageError, match="cannot be opened"):
        storage.check_writable("nosuchscheme://bucket/runs")
    with pytest.raises(StorageError, match="cannot write to /proc/nowhere"):
        storage.check_writable("/proc/nowhere")
    storage.check_writable(str(tmp_path / "new" / "runs"))
    assert list((tmp_path / "new" / "runs").iterdir()) == []


def test_each_place_has_its_own_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with (
        pytest.raises(StorageError, match="is a file, not a folder; take another$"),
        storage.exclusive(str(tmp_path / "file" / "lock"), remedy="take another"),
    ):
        pass
    with pytest.raises(StorageError, match="none can be made; take another$"):
        storage.check_writable("/proc/nowhere", "take another")

    def read_only(*_: object, **__: object) -> None:
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(os, "replace", read_only)
    with pytest.raises(
        StorageError, match="it is read-only; choose .* --set storage=URI, or check"
    ):
        storage.write_bytes(str(tmp_path / "x"), b"")


def test_a_file_is_hashed_without_being_held(root: str) -> None:
    uri, data = storage.join(root, "large"), bytes(range(256)) * 2**17
    storage.write_bytes(uri, data)
    tracemalloc.start()
    there = storage.entry_of(root, "large")
    assert (there.bytes, there.sha256) == (len(data), storage.sha256(data))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 10 * 2**20, "of 32 MiB"
    with pytest.raises(FileNotFoundError):
        storage.entry_of(root, "nothing")


def test_what_killed_writers_left_is_swept(tmp_path: Path) -> None:
    code = (
        "import os; from pipeline import storage\n"
        "os.replace = lambda *_: os.kill(os.getpid(), 9)\n"
        f"storage.write_bytes({str(tmp_path / 'a' / 'file')!r}, b'new')"
    )
    subprocess.run([sys.executable, "-c", code], check=False)
    (left,) = (tmp_path / "a").iterdir()
    assert left.name.startswith(".file.")
    storage.write_bytes(str(tmp_path / "a" / "x.tmp"), b"whole")
    storage.sweep(str(tmp_path))
    assert storage.list_names(str(tmp_path / "a")) == ["x.tmp"]
    storage.sweep(str(tmp_path / "nowhere"))
    storage.sweep("memory://nowhere")


def test_a_second_holder_waits_for_the_first_and_gets_in_when_it_is_killed(tmp_path: Path) -> None:
    lock = str(tmp_path / "lock")
    code = (
        "import time; from pipeline import storage\n"
        f"with storage.exclusive({lock!r}): print('in', flush=True); time.sleep(60)"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    ) as holder:
        assert holder.stdout is not None
        assert holder.stdout.readline() == "in\n"
        seen: list[str] = []

        def waiting(who: str) -> None:
            seen.append(who)
            holder.kill()

        begin = time.monotonic()
        with storage.exclusive(lock, waiting):
            assert time.monotonic() - begin < 30
        assert seen == [f"process {holder.pid}"]


def test_digests_depend_on_content_and_not_on_order() -> None:
    assert storage.digest({"a": 1, "b": 2.5}) == storage.digest({"b": 2.5, "a": 1})
    assert storage.digest({"a": 1}) != storage.digest({"a": 2})
    with pytest.raises(ValueError, match="not JSON compliant"):
        storage.digest(float("nan"))
