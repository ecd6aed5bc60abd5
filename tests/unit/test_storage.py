"""Files are absent or whole; an output counts when its manifest stands."""

import errno
import os
import tracemalloc
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.errors import StorageError
from pipeline.storage import Manifest
from pipeline.storage.refusals import explained


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


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(errno.EACCES, "no"), "cannot write to x: permission denied; move, or check your"),
        (PermissionError("as s3fs raises it"), "cannot write to x: permission denied; move, or"),
        (FileNotFoundError("as s3fs raises it"), "cannot write to x: no such folder, and none can"),
        (OSError(errno.EIO, "Input/output error"), "cannot write to x: Input/output error$"),
        (
            RuntimeError("whatever a package raises"),
            "cannot write to x: whatever a package raises$",
        ),
    ],
    ids=["number", "class", "missing", "other-number", "other"],
)
def test_an_error_of_a_file_system_is_one_sentence(error: Exception, sentence: str) -> None:
    with pytest.raises(StorageError, match=sentence), explained("write to", "x", "move"):
        raise error


def test_a_missing_file_is_for_the_reader_to_explain() -> None:
    with pytest.raises(FileNotFoundError), explained("read", "x"):
        raise FileNotFoundError


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


def test_digests_depend_on_content_and_not_on_order() -> None:
    assert storage.digest({"a": 1, "b": 2.5}) == storage.digest({"b": 2.5, "a": 1})
    assert storage.digest({"a": 1}) != storage.digest({"a": 2})
    with pytest.raises(ValueError, match="not JSON compliant"):
        storage.digest(float("nan"))
