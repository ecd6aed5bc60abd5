"""Processes that are killed in the middle, and processes that want the same at once."""

import contextlib
import json
import signal
import sqlite3
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from pipeline import storage
from pipeline.data import cache as cache_module
from pipeline.data.cache import memory_mapped
from pipeline.registry.aliases import (
    DECISION_TAG,
    promote,
)
from pipeline.registry.runs import TrackedRun
from pipeline.registry.versions import ModelReference, read_tag
from tests.conftest import ENVIRONMENT, HANG, ROOT, wait_for
from tests.unit.test_batches import COUNT, numbers, shard_set  # noqa: F401
from tests.unit.test_gate import champion_of, figure, gate, moves, uri, versions  # noqa: F401


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

        with storage.exclusive(lock, waiting):
            pass
        assert seen == [f"process {holder.pid}"]


SLOW = """
import sys, time
from pipeline.data import cache
read, make, made = cache._read, cache._make, []
def slowly(part):
    time.sleep(float(sys.argv[3]))
    return read(part)
cache._read = slowly
cache._make = lambda *a: (made.append(1), make(*a))
print("ready", flush=True)
sys.stdin.readline()
images, labels = cache.memory_mapped(sys.argv[1], "train", sys.argv[2])
print(len(made), images.reshape(-1, 4).view("<i4").ravel().tolist() == list(range(len(images))))
"""


def slow_process(shard_set: str, folder: Path, seconds_a_part: float) -> subprocess.Popen[str]:
    """Caches a split, when it is told to, slowly; says how often it made it and if it is right."""
    return subprocess.Popen(
        [sys.executable, "-c", SLOW, shard_set, str(folder), str(seconds_a_part)],
        env=ENVIRONMENT,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


def test_a_killed_maker_leaves_no_cache_and_of_two_at_once_one_makes_it(
    shard_set: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = []
    make = cache_module._make
    monkeypatch.setattr(cache_module, "_make", lambda *a: (made.append(1), make(*a)))
    killed, other = slow_process(shard_set, tmp_path, 60), slow_process(shard_set, tmp_path, 0.05)
    with killed, other:
        for process in (killed, other):
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        go(killed)
        wait_for(lambda: list(tmp_path.glob(".*.tmp/images.npy")), "the first file")
        killed.send_signal(signal.SIGKILL)
        killed.wait()
        go(other)
        images, _ = memory_mapped(shard_set, "train", str(tmp_path))
        times, right = other.communicate(timeout=HANG)[0].split()
    assert int(times) + len(made) == 1
    assert right == "True"
    assert numbers(images) == list(range(COUNT))
    assert list(tmp_path.glob(".*.tmp")) == []


def test_a_store_whose_making_was_killed_is_made_again(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    code = f"from pipeline.registry.store import make_client; make_client('sqlite:///{path}')"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) as process:
        wait_for(lambda: count_tables(tmp_path) >= 12, "some of MLflow's tables")
        process.kill()
    assert process.returncode == -9
    assert not path.exists()
    run = TrackedRun(f"sqlite:///{path}", "exp", "train-1", {})
    assert run.client.get_run(run.run_id)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["mlflow.db", "mlflow.db.lock"]


def count_tables(folder: Path) -> int:
    """Of the databases there, whole or not."""
    found = 0
    for path in folder.glob("mlflow.db*"):
        with (
            contextlib.suppress(sqlite3.Error),
            contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database,
        ):
            found += database.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
    return found


DECIDE = """
import json, sys
from pipeline.registry import aliases
from pipeline.registry.gate import Rule, judge
from pipeline.registry.versions import ModelReference
def slow_judge(*given):
    verdicts = judge(*given)
    print("inside", flush=True)
    sys.stdin.readline()
    return verdicts
aliases.judge = slow_judge
name, version, uri, figures = sys.argv[1:]
rules = {"fd": Rule(better_than_champion=True)}
aliases.decide(ModelReference(name, version, "", uri), "champion", rules, json.loads(figures), {})
"""


def test_of_two_processes_at_once_the_second_meets_the_first_as_champion(
    versions: Callable[..., list[ModelReference]],
) -> None:
    """The better version comes while another process decides on a worse one, and has to wait."""
    old, worse, better = versions(9.0, 7.0, 5.0)
    promote(old, "champion")
    figures = json.dumps({"fd": figure(7.0, 0.1)})
    process = subprocess.Popen(
        [sys.executable, "-c", DECIDE, worse.name, worse.version, worse.tracking_uri, figures],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=ENVIRONMENT,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "inside\n"
    ours = threading.Thread(target=gate, args=(better, 5.0), kwargs={"better_than_champion": True})
    ours.start()
    ours.join(timeout=0.5)  # it would be through, if it did not wait
    process.communicate("go on\n", timeout=HANG)
    assert process.returncode == 0
    ours.join()
    assert champion_of(old) == "3"
    assert moves(old)[1:] == [("1", "2", "gate"), ("2", "3", "gate")]
    told = [json.loads(str(read_tag(one, DECISION_TAG))) for one in (worse, better)]
    assert [each["before"] for each in told] == ["1", "2"]
    assert all(each["promoted"] for each in told)
