"""What grows with shards, images and replicas, and how; what is not linear shows here.

    python -m tests.benchmarks.scale [--only driver list scan router constants] [--quick]

- driver: the stage `preprocess`, its driver as it is, real Ray tasks, in which no image is read: a
  task returns a record as long as one of 512 images. (Sixteen do their work: the driver makes a
  contact sheet of their parts.)
- list: the list of a ShardSet's shards is made, written, and opened as a training opens it: read,
  its sha256 verified, and the order of an epoch laid out.
- scan: what the driver does with the images that its tasks have found: it reads, numbers, compares
  and hashes their list, and cuts it into shards.
- router: to which of a service's replicas the next image goes, in Ray Serve's own router, where
  each has 16 images in hand; the replicas are none. And whether the next request is let in.
- constants: more of what infra/scaling.json has. Checkpoints of the shipped configs, written to
  this disk; records of a training, written to MLflow's sqlite; a listing of an S3 server (moto's).

Each size of the first three has a process of its own, whose peak of memory, less what it has after
its imports (and after the start of Ray), is shown. "Growth" is the time of an item at the largest
size over that at the smallest: 1 is linear, and what is quadratic would be 100.
"""

import argparse
import asyncio
import logging
import os
import statistics
import tempfile
import time
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before numpy is imported

import numpy as np

from pipeline import storage
from pipeline.data import shard_list
from pipeline.data.config import DataConfig
from pipeline.data.input_shards import InputShard, cut
from pipeline.data.listing import list_files
from pipeline.data.order import WindowedOrder
from pipeline.data.parts import read_parts
from pipeline.data.preprocess import preprocess_shard
from pipeline.data.shards import part_path
from pipeline.data.source import scan
from pipeline.data.summary import SHEET_PARTS
from pipeline.storage import Manifest
from tests.benchmarks import program
from tests.benchmarks.own_ray import started_ray
from tests.benchmarks.processes import alone
from tests.benchmarks.program import CONFIGS, Figure, constant, figure

SHARDS, ENTRIES, IMAGES = (1_000, 10_000, 100_000), (10_000, 100_000, 1_000_000), 1_000_000
REPLICAS, IN_HAND, CHOICES = (10, 100, 1_000), 16, 2_000
REQUESTS = (100, 1_000, 10_000)
OBJECTS, RECORDS = 3_000, 200
QUICK = 50
"""By so much --quick divides the sizes."""
GOAL_GROWTH = 0.5
PARTS = ("driver", "list", "scan", "router", "constants")


def main() -> None:
    options = program.parser(__doc__)
    options.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    program.run(options, measure, "torch", "ray", "pyarrow", "mlflow")


def measure(options: argparse.Namespace) -> list[Figure]:
    by = QUICK if options.quick else 1
    measures: dict[str, Callable[[int], list[Figure]]] = {
        "driver": measure_driver,
        "list": measure_list,
        "scan": measure_scan,
        "router": measure_router,
        "constants": measure_constants,
    }
    return [found for name in PARTS if name in options.only for found in measures[name](by)]


def growth(what: str, sizes: list[int], seconds: list[float], unit: str) -> Figure:
    """The time of an item at the smallest size against that at the largest."""
    first, last = (1e6 * seconds[i] / sizes[i] for i in (0, -1))
    whole, few = f"{what}, {sizes[-1]:,} of them", f"{sizes[0]:,} of them"
    return figure(whole, last, first, few, GOAL_GROWTH, unit, less_is_better=True)


# --- processes of their own -----------------------------------------------------------------------


def memory(peak: bool) -> float:
    """MB of this process, at its peak or now."""
    lines = Path("/proc/self/status").read_text().splitlines()
    name = "VmHWM" if peak else "VmRSS"
    return int(next(line for line in lines if line.startswith(name)).split()[1]) * 1024 / 1e6


class Watch:
    """Seconds since the one before, and the memory since the beginning."""

    def __init__(self) -> None:
        Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
        self.before, self.since = memory(peak=False), time.perf_counter()

    def lap(self) -> float:
        now = time.perf_counter()
        seconds, self.since = now - self.since, now
        return seconds

    def grown(self) -> float:
        return memory(peak=True) - self.before


def npy(path: Path, count: int) -> str:
    """A file of so many different images of 4x4 pixels."""
    images = np.zeros((count, 4, 4), np.uint8)
    images.reshape(count, 16)[:, :4] = np.arange(count, dtype="<u4").view(np.uint8).reshape(-1, 4)
    np.save(path, images)
    return str(path)


# --- the driver of preprocess ---------------------------------------------------------------------


class Silent:
    """Progress that nobody sees."""

    def start(self, total: int, unit: str, done: int = 0) -> None: ...

    def update(self, done: int, note: str = "") -> None: ...

    def say(self, sentence: str) -> None: ...


def empty_task(
    shard: InputShard, config: DataConfig, class_names: list[str], folder: str, real: frozenset[int]
) -> dict[str, Any]:
    """The record of a shard of which nothing was read, but of those in `real`."""
    if shard.index in real:
        return preprocess_shard(shard, config, class_names, folder)
    number = f"{shard.index:08x}"
    file = {"path": part_path("train", shard.index), "bytes": 6_291_456, "sha256": number * 8}
    return {
        "digest": number * 2,
        "files": [file],
        "num_images": {"train": shard.items.num_rows, "holdout": 0},
        "class_counts": [],
        "num_unlabelled": shard.items.num_rows,
        "bad": [],
        "num_too_small": 0,
        "num_too_narrow": 0,
        "sizes": [[200 + i, 300, 5] for i in range(100)],
        "histograms": [[12_345] * 256],
    }


def run_driver(num_shards: int) -> dict[str, float]:
    import ray

    from pipeline.config import load_config
    from tasks.stages import preprocess
    from tasks.stages.stage import StageContext
    from tests.benchmarks import scale  # not this __main__, which Ray's workers cannot import

    real = frozenset(np.linspace(0, num_shards - 1, SHEET_PARTS).astype(int).tolist())

    def task(*call: Any) -> dict[str, Any]:
        return scale.empty_task(*call, real)

    with tempfile.TemporaryDirectory() as folder, started_ray(2):
        preprocess._preprocess_task = ray.remote(max_retries=3)(task)
        values = {
            "storage": f"{folder}/runs",
            "data.source": npy(Path(folder) / "images.npy", num_shards),
            "data.image_size": 4,
            "data.images_per_shard": 1,
            "data.holdout": 0.0,
            "network.attention_at": "[]",
        }
        sets = [f"{key}={value}" for key, value in values.items()]
        config = load_config(str(CONFIGS / "digits.yaml"), sets)
        warm = ray.remote(lambda: os.getpid())
        ray.get([warm.remote() for _ in range(8)])  # its workers are there
        watch = Watch()
        source = scan(config.data)
        scanned, used = watch.lap(), time.process_time()
        place = storage.join(config.storage, "preprocess", "x")
        context = StageContext(config, "x", place, {}, "", Silent(), _no_run, external=source)
        outcome = preprocess.run(context)
        ran, used = watch.lap(), time.process_time() - used
        assert outcome.stats["num_images"]["train"] == num_shards
        return {"scan": scanned, "run": ran, "CPU": used, "MB": watch.grown()}


def _no_run() -> Any:
    raise AssertionError("preprocess logs nothing")


def measure_driver(by: int) -> list[Figure]:
    print("\nthe driver of preprocess, empty tasks on 2 CPUs")
    head = ("seconds", "tasks/s", "µs a task", "its CPU µs", "its MB")
    print(f"{'shards':>10} " + " ".join(f"{name:>10}" for name in head))
    sizes = [size // by for size in SHARDS]
    seconds, found = [], {}
    for size in sizes:
        found = alone(run_driver, size)
        seconds.append(found["run"])
        each, used = 1e6 * found["run"] / size, 1e6 * found["CPU"] / size
        print(f"{size:>10,} {found['run']:>10.1f} {1e6 / each:>10,.0f} {each:>10,.0f}", end="")
        print(f" {used:>10,.0f} {found['MB']:>10,.0f}", flush=True)
    return [
        growth("an empty task of preprocess", sizes[-2:], seconds[-2:], "µs"),
        constant("tasks of preprocess that its driver sees to", sizes[-1] / seconds[-1], "tasks/s"),
        constant("memory of the driver, an empty task", 1e6 * found["MB"] / sizes[-1], "bytes"),
    ]


# --- the list of shards ---------------------------------------------------------------------------

MADE: dict[str, Any] = {"format": 1, "stage": "preprocess", "id": "x", "inputs": {}, "config": {}}


def entries(start: int, stop: int) -> list[dict[str, Any]]:
    """The records of shards, what the list keeps of them."""
    return [
        {
            "digest": f"{i:08x}" * 2,
            "files": [
                {
                    "path": part_path(split, i),
                    "bytes": 6_291_456 + i,
                    "sha256": storage.sha256(f"{split} {i}".encode()),
                }
                for split in ("train", "holdout")
            ],
            "num_images": {"train": 500 - i % 7, "holdout": 10 + i % 7},
        }
        for i in range(start, stop)
    ]


def make_list(count: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        write_list(folder, 100)  # what is imported for it is there
        watch = Watch()
        rows: dict[int, shard_list.Row] = {}  # as the driver keeps them, without the records
        for start in range(0, count, 10_000):
            for record in entries(start, min(start + 10_000, count)):
                rows[len(rows)] = shard_list.row_of(record)
        collected = watch.lap()
        entry = shard_list.write(folder, shard_list.table_of(rows[i] for i in range(count)))
        storage.commit(folder, Manifest(files=[entry], **MADE))
        written = watch.lap()
        return {
            "collect": collected,
            "write": written,
            "MB": watch.grown(),
            "bytes": entry.bytes,
            **alone(open_list, folder),  # which did not write it
        }


def write_list(folder: str, count: int) -> None:
    shards = shard_list.table_of(map(shard_list.row_of, entries(0, count)))
    storage.commit(folder, Manifest(files=[shard_list.write(folder, shards)], **MADE))


def open_list(folder: str) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as small:
        write_list(small, 100)
        WindowedOrder(0, 64, read_parts(small, "train").group_sizes, 1_000, 4).batch(0)
    watch = Watch()
    parts = read_parts(folder, "train")
    read = watch.lap()
    order = WindowedOrder(0, 4096, parts.group_sizes, 1_000_000, 64)
    order.batch(10**6)
    ordered = watch.lap()
    assert len({parts[i].entry.sha256 for i in range(0, len(parts), len(parts) // 100)}) > 99
    return {"open": read, "order": ordered, "open MB": watch.grown()}


def measure_list(by: int) -> list[Figure]:
    print("\na ShardSet's list of shards, two parts a shard")
    head = ("file MB", "write s", "MB", "open s", "order s", "MB")
    print(f"{'shards':>10} " + " ".join(f"{name:>9}" for name in head))
    sizes, found = [size // by for size in ENTRIES], []
    for size in sizes:
        it = alone(make_list, size)
        found.append(it)
        values = (it["bytes"] / 1e6, it["write"], it["MB"], it["open"], it["order"], it["open MB"])
        print(f"{size:>10,} " + " ".join(f"{value:>9,.2f}" for value in values), flush=True)
    last = found[-1]
    return [
        growth("a shard listed and written", sizes, [i["write"] for i in found], "µs"),
        growth(
            "a shard of a ShardSet that is opened",
            sizes[-2:],
            [i["open"] + i["order"] for i in found[-2:]],
            "µs",
        ),
        constant("list of shards, a shard", last["bytes"] / sizes[-1], "bytes"),
        constant("memory to write the list, a shard", 1e6 * last["MB"] / sizes[-1], "bytes"),
        constant(
            "memory of an opened ShardSet, a shard", 1e6 * last["open MB"] / sizes[-1], "bytes"
        ),
        constant("an opened ShardSet, a shard", 1e6 * last["open"] / sizes[-1], "µs"),
    ]


# --- the scan of a source -------------------------------------------------------------------------


def run_scan(count: int) -> dict[str, float]:
    with tempfile.TemporaryDirectory() as folder:
        path = npy(Path(folder) / "images.npy", count)
        config = DataConfig(source=path, image_size=4, channels=1, images_per_shard=512)
        index = str(Path(folder) / "index")
        # elsewhere, or the memory that it gave back would be taken again and not be seen
        alone(remember, config, index)
        few = npy(Path(folder) / "few.npy", 100)
        cut(scan(config.model_copy(update={"source": few})), 10)  # for what it imports
        watch = Watch()
        source = scan(config, index)  # what tasks find in the files is there
        scanned = watch.lap()
        shards = cut(source, config.images_per_shard)
        cut_up = watch.lap()
        assert sum(shard.items.num_rows for shard in shards) == count
        return {"scan": scanned, "cut": cut_up, "MB": watch.grown(), "items": source.items.nbytes}


def remember(config: DataConfig, index: str) -> None:
    scan(config, index, remember=True)


def measure_scan(by: int) -> list[Figure]:
    print("\nthe list of images read, numbered, compared, hashed, and cut into shards of 512")
    print(f"{'images':>10} {'scan s':>9} {'cut s':>9} {'MB':>9} {'items MB':>9}")
    sizes, found = [IMAGES // 100 // by, IMAGES // 10 // by, IMAGES // by], []
    for size in sizes:
        it = alone(run_scan, size)
        found.append(it)
        print(f"{size:>10,} {it['scan']:>9.2f} {it['cut']:>9.2f}", end="")
        print(f" {it['MB']:>9,.0f} {it['items'] / 1e6:>9,.0f}", flush=True)
    seconds, last = [it["scan"] + it["cut"] for it in found], found[-1]
    return [
        growth("an image scanned and cut", sizes[-2:], seconds[-2:], "µs"),
        constant("an image scanned and cut", 1e6 * seconds[-1] / sizes[-1], "µs"),
        constant("memory of a scan, an image", 1e6 * last["MB"] / sizes[-1], "bytes"),
        constant("memory of a scanned source, an image", last["items"] / sizes[-1], "bytes"),
    ]


# --- the router of a service ----------------------------------------------------------------------


class Fake:
    """A replica as a router sees it."""

    def __init__(self, replica_id: Any) -> None:
        self.replica_id = replica_id
        self.max_ongoing_requests = 2 * IN_HAND * CHOICES

    def update_replica_info(self, info: Any) -> None: ...

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return IN_HAND


class AnOrder:
    """As much of an Order as the router looks at."""

    def __init__(self, rows: int) -> None:
        self.rows = rows


async def choose_often(num_replicas: int, choices: int) -> tuple[float, float]:
    """Seconds of a choice, in all and of our part: a new image comes and an old one ends."""
    from ray.serve._private.common import (
        DeploymentHandleSource,
        DeploymentID,
        ReplicaID,
        RequestMetadata,
    )
    from ray.serve.request_router import PendingRequest

    from tasks.service.router import LeastRows

    deployment = DeploymentID(name="Replica")
    router = LeastRows(deployment, DeploymentHandleSource.REPLICA, use_replica_queue_len_cache=True)
    router.initialize_state()
    ids = [ReplicaID(unique_id=f"{i:08x}", deployment_id=deployment) for i in range(num_replicas)]
    router.update_replicas([Fake(id) for id in ids])
    for id in ids:
        router.replica_queue_len_cache.update(id, IN_HAND)
    numbers, in_hand = iter(range(10**9)), []
    ours = 0.0

    def request() -> PendingRequest:
        name = str(next(numbers))
        about = RequestMetadata(request_id=name, internal_request_id=name)
        return PendingRequest([AnOrder(20 + 7 * int(name) % 100)], {}, about)

    def give(pending: PendingRequest, replica: Fake) -> None:
        router.on_request_routed(pending, replica.replica_id, None)
        in_hand.append((pending.metadata.internal_request_id, replica.replica_id))

    for _ in range(IN_HAND):
        for replica in router._replicas_list:
            give(request(), replica)
    in_hand.reverse()
    began = time.perf_counter()
    for _ in range(choices):
        pending = request()
        give(pending, await router._choose_replica_for_request(pending))
        name, id = in_hand.pop()
        router.on_request_completed(id, name)
    whole = time.perf_counter() - began
    replicas = router._replicas_list
    began = time.perf_counter()
    for _ in range(choices):
        pending = request()
        ((first, *_), *_) = await router.choose_replicas(replicas, pending)
        give(pending, first)
        name, id = in_hand.pop()
        router.on_request_completed(id, name)
    ours = time.perf_counter() - began
    return whole / choices, ours / choices


def measure_router(by: int) -> list[Figure]:
    choices = CHOICES // by
    print(f"\nthe next image's replica, each with {IN_HAND} images in hand")
    print(f"{'replicas':>10} {'µs':>9} {'µs, ours':>9}")
    whole, ours = [], []
    for size in REPLICAS:
        runs = [asyncio.run(choose_often(size, choices)) for _ in range(3)]
        whole.append(statistics.median(run[0] for run in runs))
        ours.append(statistics.median(run[1] for run in runs))
        print(f"{size:>10,} {1e6 * whole[-1]:>9,.0f} {1e6 * ours[-1]:>9,.0f}", flush=True)
    let_in = [let_in_often(size, choices // 10) for size in REQUESTS]
    for size, seconds in zip(REQUESTS, let_in, strict=True):
        print(f"a request let in beside {size:>6,}: {1e6 * seconds:>6,.0f} µs")
    return [
        *(
            constant(f"an image's replica chosen of {size:,}", 1e6 * seconds, "µs")
            for size, seconds in zip(REPLICAS, whole, strict=True)
        ),
        *(
            constant(f"a request let in beside {size:,}", 1e6 * seconds, "µs")
            for size, seconds in zip(REQUESTS, let_in, strict=True)
        ),
    ]


def let_in_often(in_hand: int, times: int) -> float:
    """Seconds in which it is seen that a request can be taken beside so many that are running."""
    from pipeline.serving.config import ServingConfig
    from tasks.service.admission import check_room
    from tasks.service.generations import Asked, Generation, Generations

    generations, config = Generations(), ServingConfig(max_rows=10**9, max_seconds=1e6)
    for i in range(in_hand):
        asked = Asked("", str(i % 100), 1, 50 + i % 100, 1_000)
        generations._by_id[str(i)] = Generation(str(i), asked)
    began = time.perf_counter()
    for _ in range(times):
        check_room(Asked("", "1", 1, 50, 1_000), generations, config, 1e6)
    return (time.perf_counter() - began) / times


# --- constants ------------------------------------------------------------------------------------


def measure_constants(by: int) -> list[Figure]:
    print()
    return [*checkpoints(by), tracking(by), *listing(by)]


def checkpoints(by: int) -> list[Figure]:
    import torch

    from pipeline.config import load_config
    from pipeline.training.checkpoint import Writer
    from pipeline.training.loop import make_state
    from tasks.stages.train_worker import model_spec

    results = []
    for name in ("digits", "fashion_mnist", "cifar10")[: 1 if by > 1 else 3]:
        config = load_config(str(CONFIGS / f"{name}.yaml"), ["training.precision=float32"])
        spec = model_spec(config, [str(i) for i in range(10)])
        network = spec.make_network()
        state = make_state(network, config.training, config.diffusion.timesteps)
        for parameter in network.parameters():
            parameter.grad = torch.zeros_like(parameter)
        state.optimizer.step()  # its moments are there after a step
        with tempfile.TemporaryDirectory() as folder:
            began = time.perf_counter()
            with Writer(folder, spec.model_dump(mode="json"), keep=1) as writer:
                writer.save(state, [])
            seconds = time.perf_counter() - began
            size = sum(path.stat().st_size for path in Path(folder).rglob("*.*"))
        parameters = sum(parameter.numel() for parameter in network.parameters())
        print(
            f"a checkpoint of {name}: {size / 1e6:,.1f} MB of {parameters:,} parameters, "
            f"{size / 1e6 / seconds:,.0f} MB/s"
        )
        results += [
            constant(f"checkpoint of {name}", size, "bytes"),
            constant(f"checkpoint of {name}, written", size / 1e6 / seconds, "MB/s"),
        ]
    return results


def tracking(by: int) -> Figure:
    from pipeline.registry.runs import TrackedRun

    count = RECORDS // by
    with tempfile.TemporaryDirectory() as folder:
        run = TrackedRun(f"sqlite:///{folder}/mlflow.db", "scale", "x", {})
        seconds = []
        for step in range(count):
            record = {f"metric_{i}": float(step) for i in range(12)} | {"step": float(step)}
            began = time.perf_counter()
            run.log_history([record])
            seconds.append(time.perf_counter() - began)
    rate = 1 / statistics.median(seconds)
    print(f"records of 12 figures into MLflow's sqlite: {rate:,.0f} a second")
    return constant("records of 12 figures into MLflow's sqlite", rate, "records/s")


def listing(by: int) -> list[Figure]:
    try:
        from tests.s3 import S3
    except ImportError as error:
        print(f"not measured: a listing of S3 ({error})")
        return []
    logging.getLogger("werkzeug").setLevel(logging.WARNING)  # a line a request
    server, count = S3(), OBJECTS // by
    os.environ.update(server.environment())
    for i in range(count):
        server.put(f"images/{i:08d}.png", b"x")
    _, files = list_files("s3://bucket/images")  # connected
    began = time.perf_counter()
    _, files = list_files("s3://bucket/images")
    seconds = time.perf_counter() - began
    assert len(files) == count
    tracemalloc.start()
    list_files("s3://bucket/images")
    size = tracemalloc.get_traced_memory()[1] / count
    tracemalloc.stop()
    server.close()
    print(
        f"1,000 objects of moto's S3 server listed in {1000 * seconds / count:.2f} s; "
        f"{size:,.0f} bytes of memory an object"
    )
    return [
        constant("1,000 objects of moto's S3 server listed", 1000 * seconds / count, "s"),
        constant("memory of a listing, an object", size, "bytes"),
    ]


if __name__ == "__main__":
    main()
