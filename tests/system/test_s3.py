"""Images in a bucket, ShardSets in a bucket, through an S3 server that is not always well."""

import contextlib
import io
import itertools
import json
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline import storage
from pipeline.config import load_config
from pipeline.data import shard_list
from pipeline.data.batches import Batches
from pipeline.data.config import DataConfig
from pipeline.data.input_shards import cut, read
from pipeline.data.parts import Parts, read_parts
from pipeline.data.prefetch import prefetch
from pipeline.data.preprocess import preprocess_shard
from pipeline.data.source import scan
from pipeline.data.windows import WindowedShuffle
from pipeline.errors import DataError, StorageError
from pipeline.storage import lease
from tests import needs, shard_sets
from tests.conftest import ENVIRONMENT, ROOT, TINY, Workplace, tiny_command

pytest.importorskip("moto", reason=needs.extra("moto", "s3-test"))

from tests.conftest import HANG
from tests.s3 import S3, Fault, Unreliable

NUM_IMAGES = 90
SMALL = ["data.images_per_shard=8", "data.image_size=8", "data.channels=3"]


def photo(i: int) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(i).integers(0, 256, (12, 12, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


PHOTOS = {f"{('dark', 'light')[i % 2]}/{i:03d}.png": photo(i) for i in range(NUM_IMAGES)}


@pytest.fixture(scope="module")
def s3() -> Iterator[S3]:
    server = S3()
    for name, data in PHOTOS.items():
        server.put(f"photos/{name}", data)
    yield server
    server.close()


@pytest.fixture
def here(s3: S3, monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """This process finds the server."""
    import s3fs

    for name, value in s3.environment().items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    yield monkeypatch
    s3fs.S3FileSystem.clear_instance_cache()


def through(monkeypatch: pytest.MonkeyPatch, s3: S3, fault: Fault) -> Unreliable:
    """From now on this process finds the server behind a proxy with that fault."""
    import s3fs

    proxy = Unreliable(s3, fault)
    for name, value in s3.environment(proxy.endpoint).items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    return proxy


def test_a_bucket_is_scanned_by_its_listing_alone(s3: S3, here: pytest.MonkeyPatch) -> None:
    proxy = through(here, s3, lambda *_: "")
    config = DataConfig(source="s3://bucket/photos", image_size=8, channels=3)
    source = scan(config)
    assert source.items.num_rows == NUM_IMAGES
    assert source.class_names == ["dark", "light"]
    assert not [path for method, path, _ in proxy.requests if method == "GET" and ".png" in path]
    got = {item.key: raw for shard in cut(source, 20) for item, raw in read(shard)}
    assert got == PHOTOS
    s3.put("photos/dark/000.png", photo(1000))
    try:
        with pytest.raises(Exception, match="'dark/000.png' changed while the source was being"):
            list(read(cut(source, 20)[0]))
    finally:
        s3.put("photos/dark/000.png", PHOTOS["dark/000.png"])
    proxy.close()


def test_an_object_that_goes_or_cannot_be_asked_about_after_the_scan_is_one_sentence(
    s3: S3, here: pytest.MonkeyPatch
) -> None:
    for i in range(3):
        s3.put(f"going/{i}.png", photo(i))
    source = scan(DataConfig(source="s3://bucket/going", image_size=8, channels=3))
    (shard,) = cut(source, 20)
    s3.put("going/2.png", photo(7))  # so its hash must be asked for

    def refuses_when_it_is_read(_: int, method: str, path: str) -> str:
        read = [p for m, p, _ in proxy.requests if m == "GET" and p.endswith("2.png")]
        return "403" if method == "HEAD" and read else ""

    proxy = through(here, s3, refuses_when_it_is_read)
    shard.place.renew()
    with pytest.raises(DataError, match=r"going/2.png cannot be read: .*; run the same command"):
        list(read(shard))
    proxy.close()
    proxy = through(here, s3, lambda *_: "")
    shard.place.renew()
    storage.remove("s3://bucket/going/2.png")
    with pytest.raises(DataError, match=r"'2.png' changed while the source was being read"):
        list(read(shard))
    proxy.close()


def test_more_files_than_a_page_of_a_listing_holds_are_all_found(
    s3: S3, here: pytest.MonkeyPatch
) -> None:
    for i in range(1005):
        s3.put(f"many/{i:04d}.png", b"%d" % i)
    proxy = through(here, s3, lambda *_: "")
    source = scan(DataConfig(source="s3://bucket/many", image_size=8, channels=1))
    assert source.items["key"].to_pylist() == [f"{i:04d}.png" for i in range(1005)]
    listings = [path for _, path, _ in proxy.requests if "list-type=2" in path]
    assert len([path for path in listings if "max-keys=1&" not in path]) == 2, "each page once"
    proxy.close()


def test_a_file_of_several_parts_arrives_whole(s3: S3, here: pytest.MonkeyPatch) -> None:
    """s3fs cuts what is larger than 100 MiB; each first request for something fails."""
    proxy = through(here, s3, lambda i, method, path: "500" if i % 5 == 3 else "")
    data = bytes(104 * 2**20)
    entry = storage.write_bytes("s3://bucket/large/part", data)
    assert [path for _, path, _ in proxy.requests if "partNumber=2" in path]
    assert {wrong for _, _, wrong in proxy.requests} == {"", "500"}
    assert storage.sha256(storage.read_bytes("s3://bucket/large/part")) == entry.sha256
    proxy.close()


@pytest.mark.parametrize("wrong", ["500", "503", "cut", "slow"])
def test_a_request_that_fails_is_tried_again(s3: S3, here: pytest.MonkeyPatch, wrong: str) -> None:
    methods = ("PUT", "GET", "HEAD") if wrong != "cut" else ("GET",)
    seen: set[tuple[str, str]] = set()

    def first_of_each(_: int, method: str, path: str) -> str:
        new = (method, path) not in seen
        seen.add((method, path))
        return wrong if new and method in methods else ""

    proxy = through(here, s3, first_of_each)
    storage.write_bytes("s3://bucket/again/x", b"12345678" * 1000)
    storage.copy("s3://bucket/again/x", "s3://bucket/again/y")
    assert storage.read_bytes("s3://bucket/again/y") == b"12345678" * 1000
    assert [w for _, _, w in proxy.requests].count(wrong) >= 1 + (wrong != "cut")
    proxy.close()


def test_what_s3_refuses_or_never_answers_is_one_sentence(s3: S3, here: pytest.MonkeyPatch) -> None:
    proxy = through(here, s3, lambda *_: "403")
    with pytest.raises(StorageError, match=r"permission denied; .*AWS_\* variables"):
        storage.write_bytes("s3://bucket/x", b"")
    with pytest.raises(StorageError, match=r"cannot read s3://bucket/x: "):
        storage.read_bytes("s3://bucket/x")
    proxy.close()
    through(here, s3, lambda *_: "").close()
    with pytest.raises(StorageError, match="Could not connect to the endpoint") as refused:
        storage.list_names("s3://bucket/x")
    assert "\n" not in str(refused.value)


def test_what_another_process_writes_into_a_folder_that_was_listed_is_seen(
    s3: S3, here: pytest.MonkeyPatch
) -> None:
    s3.put("listed/one", b"1")
    assert storage.list_names("s3://bucket/listed") == ["one"]
    s3.put("listed/two", b"2")
    assert storage.read_bytes("s3://bucket/listed/two") == b"2"
    assert storage.exists("s3://bucket/listed/two")


@pytest.mark.parametrize(
    ("fault", "sentence"),
    [
        ("expired", "the credentials have expired; renew the AWS_* variables and run the same"),
        ("skewed", "this machine's clock and the server's are too far apart; set the clock"),
        ("unknown key", "the server does not know the key in AWS_ACCESS_KEY_ID; set"),
        ("wrong key", "AWS_SECRET_ACCESS_KEY does not belong to AWS_ACCESS_KEY_ID; set both"),
    ],
)
def test_why_a_server_refuses_and_what_helps_is_told(
    s3: S3, here: pytest.MonkeyPatch, fault: str, sentence: str
) -> None:
    proxy = through(here, s3, lambda *_: fault)
    for verb, refused in (
        ("write to", lambda: storage.write_bytes("s3://bucket/x", b"")),
        ("read", lambda: storage.read_bytes("s3://bucket/x")),
    ):
        with pytest.raises(StorageError) as told:
            refused()
        assert str(told.value).startswith(f"cannot {verb} s3://bucket/x: {sentence}")
    proxy.close()


def test_a_bucket_that_is_not_there_and_credentials_that_are_not_are_told(
    s3: S3, here: pytest.MonkeyPatch
) -> None:
    import s3fs

    for call in (storage.read_bytes, lambda uri: storage.write_bytes(uri, b"")):
        with pytest.raises(StorageError, match="there is no such bucket; make it, choose another"):
            call("s3://nowhere/x")
    for name, sentence in (
        ("AWS_SECRET_ACCESS_KEY", "one is missing; set both, on every node"),
        ("AWS_ACCESS_KEY_ID", "there are no credentials; set AWS_ACCESS_KEY_ID and"),
    ):
        here.delenv(name)
        s3fs.S3FileSystem.clear_instance_cache()
        with pytest.raises(StorageError, match=sentence):
            storage.write_bytes("s3://bucket/x", b"")


def test_a_server_that_goes_away_and_keys_that_expire_end_a_stage_and_nothing_is_lost(
    s3: S3, here: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    place, runs = Workplace(tmp_path), "s3://bucket/lost/preprocess"
    sets = [*SMALL, "data.source=s3://bucket/photos", "storage=s3://bucket/lost"]
    command = tiny_command("preprocess", *sets)
    before: list[str] = []
    for wrong, sentence in [
        ("500", "s3://bucket/"),
        ("expired", "the credentials have expired; renew the AWS_* variables"),
        ("", "done in"),
    ]:
        proxy = Unreliable(s3, after_two_records(wrong))
        environment = s3.environment(proxy.endpoint) | {"AWS_MAX_ATTEMPTS": "1"}
        output = place.ddpm(*command, code=2 if wrong else 0, **environment)
        proxy.close()
        assert sentence in (output.splitlines()[-1] if wrong else output)
        assert "Traceback" not in output
        again = {path for method, path, _ in proxy.requests if is_record(method, path)}
        assert not [name for name in before if any(path.endswith(name) for path in again)]
        (folder,) = storage.list_names(runs)
        made = storage.list_names(f"{runs}/{folder}/parts")
        assert len(made) >= len(before) + 2
        before = made
    assert manifest_in(f"{runs}/{folder}")["stats"]["num_images"]


def is_record(method: str, path: str) -> bool:
    return method == "PUT" and "/parts/" in path


def after_two_records(wrong: str) -> Fault:
    done = 0

    def fault(_: int, method: str, path: str) -> str:
        nonlocal done
        if done == 2:
            return wrong
        done += is_record(method, path)
        return ""

    return fault


def write_shard_set(folder: str, copy: str) -> None:
    """A ShardSet of the photos in the bucket, made as the stage makes it, and a copy."""
    config = DataConfig(source="s3://bucket/photos", image_size=8, channels=3, images_per_shard=16)
    source = scan(config)
    shards = cut(source, config.images_per_shard)
    records = [preprocess_shard(shard, config, source.class_names, folder) for shard in shards]
    shard_sets.finish(folder, records)
    parts = [file["path"] for record in records for file in record["files"]]
    for name in [storage.MANIFEST, shard_list.SHARDS, *parts]:
        storage.write_bytes(f"{copy}/{name}", storage.read_bytes(f"{folder}/{name}"))


def two_epochs(parts: Parts) -> list[tuple[bytes, list[int]]]:
    """(pixels, labels) of the batches as training reads them, in windows."""
    steps = -(-2 * int(parts.num_images.sum()) // 8)
    with contextlib.closing(WindowedShuffle(parts, 5, 8, window=24, lanes=2)) as shuffle:
        batches = prefetch(Batches(shuffle).at, range(steps))
        return [(batch.pixels.numpy().tobytes(), batch.labels.tolist()) for batch in batches]


def test_training_reads_the_same_windows_from_an_unreliable_bucket_as_from_a_disk(
    s3: S3, here: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    here.setattr("pipeline.data.shards.ROW_GROUP_SIZE", 5)
    write_shard_set("s3://bucket/set", str(tmp_path))
    wrong_at = {7: "503", 14: "cut", 21: "slow"}
    row_groups = itertools.count()

    def fault(_: int, method: str, path: str) -> str:
        return wrong_at.get(next(row_groups), "") if method == "GET" else ""

    parts = read_parts("s3://bucket/set", "train")
    proxy = through(here, s3, fault)
    assert two_epochs(parts) == two_epochs(read_parts(str(tmp_path), "train"))
    assert [wrong for _, _, wrong in proxy.requests if wrong] == list(wrong_at.values())
    proxy.close()


def parts_in(folder: str) -> dict[str, bytes]:
    names = [entry.path for entry in shard_sets.parts_of(folder)]
    return {name: storage.read_bytes(f"{folder}/{name}") for name in names}


def manifest_in(folder: str) -> Any:
    return json.loads(storage.read_bytes(f"{folder}/manifest.json"))


def test_preprocessing_from_bucket_to_bucket_through_an_unreliable_server(
    s3: S3, here: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two commands at once, every seventh request failing: the parts are those made of files."""
    faults = ("500", "503", "cut", "slow")
    proxy = Unreliable(s3, lambda i, *_: faults[i // 7 % 4] if i % 7 == 6 else "")
    place = Workplace(tmp_path)
    sets = [*SMALL, "data.source=s3://bucket/photos", "storage=s3://bucket/both"]
    command = tiny_command("preprocess", *sets)
    processes = [place.start(*command, **s3.environment(proxy.endpoint)) for _ in range(2)]
    for process in processes:
        output, _ = process.communicate(timeout=HANG)
        assert process.returncode == 0, output
    assert {wrong for _, _, wrong in proxy.requests} == {"", *faults}
    proxy.close()
    (name,) = storage.list_names("s3://bucket/both/preprocess")
    folder = f"s3://bucket/both/preprocess/{name}"
    assert manifest_in(folder)["stats"]["num_bad"] == 0

    for name, data in PHOTOS.items():
        (tmp_path / "photos" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "photos" / name).write_bytes(data)
    sets = [*SMALL, f"data.source={tmp_path}/photos"]
    config = load_config(str(ROOT / "configs" / "digits.yaml"), [*TINY, *sets]).data
    source = scan(config)
    shards = cut(source, config.images_per_shard)
    for shard in shards:
        preprocess_shard(shard, config, source.class_names, str(tmp_path / "local"))
    made = parts_in(folder)
    assert made
    for part, data in made.items():
        assert (tmp_path / "local" / part).read_bytes() == data


# --- a lock in a bucket ---------------------------------------------------------------------------


def holder_of(lock: str, s3: S3) -> subprocess.Popen[str]:
    """A process that holds a lock, once it is known to."""
    code = (
        "import time; from pipeline import storage\n"
        f"with storage.exclusive({lock!r}): print('in', flush=True); time.sleep(60)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdout=subprocess.PIPE,
        text=True,
        env={**ENVIRONMENT, **s3.environment()},
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    return process


def test_a_lock_in_a_bucket_is_waited_for_and_taken_from_a_process_that_was_killed(
    s3: S3, here: pytest.MonkeyPatch
) -> None:
    lock, seen = "s3://bucket/locks/killed", list[str]()
    here.setattr(lease, "LEASE_SECONDS", HANG)
    with holder_of(lock, s3) as holder:

        def waiting(who: str) -> None:
            seen.append(who)
            holder.kill()
            holder.wait()

        begin = time.monotonic()
        with storage.exclusive(lock, waiting):
            assert time.monotonic() - begin < lease.LEASE_SECONDS, "it is known to be dead"
    assert seen == [f"process {holder.pid} on {socket.gethostname()}"]
    with storage.exclusive(lock, seen.append):
        pass
    assert len(seen) == 1, "a lock that was given back is not waited for"


def test_a_lock_of_another_machine_is_taken_when_nobody_has_written_it_for_long(
    s3: S3, here: pytest.MonkeyPatch
) -> None:
    lock = "s3://bucket/locks/elsewhere"
    here.setattr(lease, "POLL_SECONDS", 0.05)
    here.setattr(lease, "LEASE_SECONDS", 1.0)
    with holder_of(lock, s3) as holder:
        here.setattr(lease, "_machine", lambda: "another")
        holder.kill()
        holder.wait()
        begin = time.monotonic()
        with storage.exclusive(lock):
            assert time.monotonic() - begin >= 1


def test_a_lock_in_a_bucket_is_held_by_one_however_long_and_whatever_the_server_does(
    s3: S3, here: pytest.MonkeyPatch
) -> None:
    here.setattr(lease, "RENEW_SECONDS", 0.05)
    here.setattr(lease, "POLL_SECONDS", 0.02)
    # what fails is sent again after up to a second (botocore's choice, at random)
    here.setattr(lease, "LEASE_SECONDS", 3.0 * HANG / 300)
    faults, numbers = ("500", "lost", "503"), Counter[str]()

    def fault(_: int, method: str, __: str) -> str:
        # seldom: what fails five times in a row is given up, and the two share the numbers
        numbers[method] += 1
        time, step = divmod(numbers[method], 20)
        return faults[time % 3] if step == 0 else ""

    proxy = through(here, s3, fault)
    inside, most, rounds = 0, 0, list[int]()

    def take_turns(number: int) -> None:
        nonlocal inside, most
        for seconds in (
            0.2,
            0.2,
            1.3 * lease.LEASE_SECONDS,
        ):  # the last is longer than a lease: it is renewed
            with storage.exclusive("s3://bucket/locks/busy"):
                inside += 1
                most = max(most, inside)
                time.sleep(seconds)
                inside -= 1
                rounds.append(number)

    threads = [threading.Thread(target=take_turns, args=[i]) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    proxy.close()
    assert sorted(rounds) == [0, 0, 0, 1, 1, 1]
    assert most == 1
    assert {wrong for _, _, wrong in proxy.requests} == {"", *faults}
    assert "lost" in {wrong for method, _, wrong in proxy.requests if method == "PUT"}
