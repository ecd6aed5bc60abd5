"""What the sampling service makes of the network's own speed, and how long its clients wait.

    python -m tests.benchmarks.serve_load [--quick] [--batch 4]

A service of tasks/service/ on a Ray of its own, over HTTP; its model is the network of
configs/fashion_mnist.yaml with norm_groups=8, as diffusers has it, and untrained: speed does not
depend on the weights. Replicas have one thread each. The load is a mix of 24 kinds of requests for
an image: 10, 20, 50 and 250 steps, guided and not, three samplers.

- R*: the best rows/s of the bare network, in processes of their own, one and two at once, in
  alternation with the service, which is idle then.
- saturated: 32 requests a replica are always in flight. The service's own count of useful rows
  over a window, as a share of R*, in exact and in fast mode, with one replica and with two.
- alone: a request over HTTP against the bare sampler loop, in alternation.
- open loop: requests arrive as a Poisson process (seeded), at 0.8 of what two bare networks at once
  can do, each kind equally often. A request's slowdown is its time over the time of its kind alone
  on the same service (with the sampler ddim: the three take the same). The same requests at the
  same times then go to two peers, see serve_load_peers.py: `@serve.batch` over whole requests of
  diffusers, padded to the longest, and one request at a time; two replicas each, the same weights.
  The batch is of 4 requests, or 4 to 8 rows: more rows a call are hardly faster on a core, and
  the larger a batch is, the more of it is padding. A batch that is not full waits 10 ms.

The client is this process, which also holds Ray's driver; it shares the cores with the service, and
what it takes is shown.
"""

import argparse
import asyncio
import contextlib
import itertools
import os
import random
import socket
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported; Ray's workers have it too
os.environ["MLFLOW_CONFIGURE_LOGGING"] = "false"

import aiohttp  # Ray's dashboard needs it: it is there
import numpy as np
import psutil
import torch
from safetensors.torch import save as save_tensors

from pipeline.exchange.diffusers_folder import to_diffusers
from pipeline.registry.folder import model_files
from pipeline.registry.registration import register
from pipeline.registry.runs import TrackedRun
from pipeline.registry.versions import ModelReference
from pipeline.samplers.config import SamplingConfig
from pipeline.samplers.model import Model, make_plan
from pipeline.samplers.plan import run_plan
from pipeline.seeding import key, normal
from pipeline.serving.config import EXACT_ROWS, ServingConfig
from tests.benchmarks import processes, program
from tests.benchmarks.engine import CONFIG, QUICK_NETWORK, Mix, bare, parameters, untrained
from tests.benchmarks.own_ray import started_ray
from tests.benchmarks.program import Figure, figure

STEPS, QUICK_STEPS = (10, 20, 50, 250), (2, 4, 10, 20)
GUIDANCE = (0.0, 1.0)
SAMPLERS = ("ddim", "ancestral", "dpm_solver_pp")
SIZES, QUICK_SIZES = (4, 8, 16, 32), (8, 16)
IN_FLIGHT, LOAD, GOAL = 32, 0.8, 0.95
BATCH = 4
PATH = "/v1/images/generations"


class Size(NamedTuple):
    """How much is done."""

    steps: tuple[int, ...] = STEPS
    sizes: tuple[int, ...] = SIZES
    rounds: int = 3
    window: float = 12.0
    """Seconds of a look at a saturated service."""
    settle: float = 4.0
    times_each_kind: int = 8
    loop_steps: int = 50
    repeats: int = 5
    bare_seconds: float = 2.0
    times_alone: int = 3
    network: tuple[str, ...] = ("network.norm_groups=8",)


QUICK = Size(
    QUICK_STEPS,
    QUICK_SIZES,
    1,
    2.0,
    1.0,
    1,
    10,
    2,
    0.5,
    1,
    ("network.norm_groups=8", *QUICK_NETWORK),
)


def main() -> None:
    options = program.parser(__doc__)
    options.add_argument("--batch", type=int, default=BATCH, help="requests in a peer's batch")
    program.run(options, measure, "torch", "ray", "diffusers")


def measure(options: argparse.Namespace) -> list[Figure]:
    torch.set_num_threads(1)
    size = QUICK if options.quick else Size()
    model = untrained(str(CONFIG), size.network)
    print(
        f"{CONFIG.stem}, untrained: {'x'.join(map(str, model.spec.image_shape))}, "
        f"{parameters(model):,} parameters; {'/'.join(map(str, size.steps))} steps, "
        f"{mean_rows(size):.4g} rows a request on average"
    )
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        bares = [stack.enter_context(Bare(size)) for _ in range(2)]
        before = max(bares[0].rate(rows) for rows in size.sizes)
        stack.enter_context(started_ray((os.cpu_count() or 1) + 1))
        bench = Bench(folder, model, size, bares)
        return [*bench.saturated(before), *bench.alone(), *bench.open_loop(options.batch)]


# --- the mix --------------------------------------------------------------------------------------


def kinds(size: Size) -> list[dict[str, Any]]:
    return [
        {"num_inference_steps": steps, "guidance_scale": guidance, "sampler": sampler}
        for steps, guidance, sampler in itertools.product(size.steps, GUIDANCE, SAMPLERS)
    ]


def rows_of(body: dict[str, Any]) -> int:
    return int(body["num_inference_steps"]) * (2 if body["guidance_scale"] else 1)


def mean_rows(size: Size) -> float:
    return statistics.mean(map(rows_of, kinds(size)))


def request(kind: dict[str, Any], number: int, **more: Any) -> dict[str, Any]:
    return {**kind, "seed": number, "class_label": number % 10, **more}


# --- the bare network -----------------------------------------------------------------------------


def loop(model: Model, images: int, steps: int) -> float:
    """Seconds of the bare sampler loop for images of one kind."""
    plan = make_plan(model, SamplingConfig(steps=steps))
    labels = torch.arange(images) % 10
    begin = time.perf_counter()
    x_T = normal([key(0, "sample", i, 0) for i in range(images)], model.spec.image_shape)
    run_plan(plan, lambda x, t, a: model.predict_x_0(x, t, a, labels), x_T, lambda i: x_T)
    return time.perf_counter() - begin


class Bare:
    """The network in a process of its own, which does nothing unless it is asked."""

    model: Model
    """In that process, like `scheduled`."""
    scheduled: Mix

    def __init__(self, size: Size) -> None:
        self.size = size

    def __enter__(self) -> "Bare":
        self.process: ProcessPoolExecutor = processes.partner()
        processes.answer(self.process.submit(self._prepare, self.size))
        return self

    def __exit__(self, *_: Any) -> None:
        self.process.shutdown()

    @classmethod
    def _prepare(cls, size: Size) -> None:
        torch.set_num_threads(1)
        cls.model = untrained(str(CONFIG), size.network)
        cls.scheduled = Mix(cls.model, "exact")

    def start_rate(self, rows: int) -> Future[float]:
        """Rows/s with so many a call; to be answered."""
        return self.process.submit(self._rate, rows, self.size.bare_seconds)

    def rate(self, rows: int) -> float:
        return processes.answer(self.start_rate(rows))

    @classmethod
    def _rate(cls, rows: int, seconds: float) -> float:
        rates, end = [], time.perf_counter() + seconds
        while time.perf_counter() < end:
            rates.append(bare(cls.model, rows, 2))
        return statistics.median(rates)

    def loop(self, images: int, steps: int) -> float:
        """Seconds of the bare sampler loop for images of one kind."""
        return processes.answer(self.process.submit(self._loop, images, steps))

    @classmethod
    def _loop(cls, images: int, steps: int) -> float:
        return loop(cls.model, images, steps)

    def beside(self, calls: int) -> float:
        """Seconds of a step of the engine beside its network call."""
        return processes.answer(self.process.submit(self._beside, calls))

    @classmethod
    def _beside(cls, calls: int) -> float:
        return cls.scheduled.outside(calls)


# --- the client -----------------------------------------------------------------------------------


class Client:
    """Requests over HTTP, all from one event loop."""

    def __init__(self, url: str) -> None:
        self.url = url

    async def __aenter__(self) -> "Client":
        connector = aiohttp.TCPConnector(limit=0)
        self.session = aiohttp.ClientSession(
            connector=connector, timeout=aiohttp.ClientTimeout(total=None)
        )
        return self

    async def __aexit__(self, *_: Any) -> None:
        await self.session.close()

    async def draw(self, body: dict[str, Any]) -> float:
        """Seconds from the request to all of its images."""
        begin = time.perf_counter()
        async with self.session.post(self.url + PATH, json=body) as reply:
            found = await reply.json()
        assert reply.status == 200, found
        assert len(found["data"]) == body.get("n", 1)
        return time.perf_counter() - begin

    async def keep_drawing(self, bodies: Iterator[dict[str, Any]]) -> None:
        """One request after another until cancelled; then the last is given up."""
        for body in bodies:
            async with self.session.post(self.url + PATH, json={**body, "stream": True}) as reply:
                assert reply.status == 200
                id = reply.headers["X-Generation-Id"]
                try:
                    await reply.read()
                except asyncio.CancelledError:
                    async with self.session.delete(f"{self.url}{PATH}/{id}"):
                        raise


async def arrive(
    url: str, bodies: list[dict[str, Any]], at: list[float]
) -> tuple[list[float], float]:
    """(seconds that each request takes, those until all are done), if they come at times `at`."""
    async with Client(url) as client:
        begin = time.perf_counter()

        async def one(body: dict[str, Any], when: float) -> float:
            await asyncio.sleep(begin + when - time.perf_counter())
            return await client.draw(body)

        seconds = await asyncio.gather(*map(one, bodies, at))
        return list(seconds), time.perf_counter() - begin


async def in_turn(url: str, bodies: list[dict[str, Any]]) -> list[float]:
    """Seconds of each request, one after another."""
    async with Client(url) as client:
        return [await client.draw(body) for body in bodies]


class Flow(NamedTuple):
    """What the replicas did in a window."""

    rows: float
    """Useful ones a second, of all replicas."""
    fill: float
    """The share of useful rows in those of the network calls."""
    call: float
    """Seconds from one network call to the next."""
    cpu: dict[str, float]
    """CPU seconds a second of the processes below this one, by what they are."""


async def saturate(url: str, size: Size, replicas: int, mode: str) -> Flow:
    """Keep the service full for a while and see what it does."""
    numbers = itertools.count(random.Random(0).randrange(10**6))
    mix = itertools.cycle(random.Random(0).sample(kinds(size), len(kinds(size))))
    bodies = (request(kind, number, mode=mode) for kind, number in zip(mix, numbers, strict=False))
    async with Client(url) as client:
        tasks = [
            asyncio.create_task(client.keep_drawing(bodies)) for _ in range(IN_FLIGHT * replicas)
        ]
        await asyncio.sleep(size.settle)
        before, cpu = await asyncio.to_thread(counts, mode), cpu_seconds()
        begin = time.perf_counter()
        await asyncio.sleep(size.window)
        after, cpu_after = await asyncio.to_thread(counts, mode), cpu_seconds()
        elapsed = time.perf_counter() - begin
        for task in tasks:
            assert not task.done(), task.exception()
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    assert len(before) == len(after) == replicas
    rows = calls = rate = 0.0
    for replica, (at, num_calls, num_rows) in after.items():
        at_first, calls_first, rows_first = before[replica]
        rows += num_rows - rows_first
        calls += num_calls - calls_first
        rate += (num_rows - rows_first) / (at - at_first)
    used = {what: (cpu_after[what] - cpu.get(what, 0)) / elapsed for what in cpu_after}
    return Flow(rate, rows / calls / EXACT_ROWS, rows / calls / (rate / replicas), used)


def counts(mode: str) -> dict[str, tuple[float, int, int]]:
    """(when, network calls, useful rows) of each replica."""
    from ray import serve

    from tasks.service.application import APPLICATION

    handle = serve.get_deployment_handle("Replica", APPLICATION)
    found = {}
    for state in handle.broadcast("state").results():
        engines = [of for of in state["engines"] if of["mode"] == mode]
        sums = [sum(of[what] for of in engines) for what in ("calls", "useful_rows")]
        found[state["replica"]] = (state["at"], sums[0], sums[1])
    return found


def cpu_seconds() -> Counter[str]:
    """Of this process and those below it, by what they are."""
    seconds: Counter[str] = Counter()
    for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
        with contextlib.suppress(psutil.Error):
            times = process.cpu_times()
            seconds[role(process)] += times.user + times.system
    return seconds


def role(process: psutil.Process) -> str:
    if process.pid == os.getpid():
        return "this client"
    title = " ".join(process.cmdline())
    known = {":Replica": "replicas", ":Ingress": "ingress", "Proxy": "HTTP proxy"}
    return next((name for part, name in known.items() if part in title), "Ray")


# --- services -------------------------------------------------------------------------------------


class Bench:
    """The model, registered and exported, and what is measured of its services."""

    def __init__(self, folder: Path, model: Model, size: Size, bares: list[Bare]) -> None:
        self.size, self.bares = size, bares
        self.model = registered(f"sqlite:///{folder}/mlflow.db", model)
        self.exported = folder / "diffusers"
        for name, data in to_diffusers(model.spec, model.network.state_dict()).items():
            (self.exported / name).parent.mkdir(parents=True, exist_ok=True)
            (self.exported / name).write_bytes(data)
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port: int = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.pair = self.full = 0.0
        """Rows/s of two bare networks at once, and of a full service of two replicas, exact."""

    @contextlib.contextmanager
    def ours(self, replicas: int) -> Iterator[None]:
        from tasks.service.application import running

        most = 10**7
        config = ServingConfig(replicas=replicas, max_rows=most, max_rows_per_client=most)
        with running(self.model, str(self.model), config, {}, "127.0.0.1", self.port):
            yield

    @contextlib.contextmanager
    def peer(self, batch: int) -> Iterator[None]:
        from ray import serve
        from ray.serve.config import HTTPOptions

        from tests.benchmarks.serve_load_peers import whole_requests

        serve.start(http_options=HTTPOptions(port=self.port))
        serve.run(whole_requests(str(self.exported), 2, batch), name="peer", route_prefix="/")
        try:
            yield
        finally:
            serve.delete("peer")

    # --- saturated ---

    def bare_rates(self, at_once: int) -> dict[int, float]:
        """Rows/s of all at once by the rows of a call."""
        rates = {}
        for rows in self.size.sizes:
            calls = [each.start_rate(rows) for each in self.bares[:at_once]]
            rates[rows] = sum(map(processes.answer, calls))
        return rates

    def saturated(self, before: float) -> list[Figure]:
        flows: dict[tuple[int, str], list[Flow]] = {}
        rates: dict[tuple[int, int], list[float]] = {}
        for _ in range(self.size.rounds):
            for replicas in (1, 2):
                with self.ours(replicas):
                    for rows, rate in self.bare_rates(replicas).items():
                        rates.setdefault((replicas, rows), []).append(rate)
                    for mode in ("exact", "fast"):
                        flow = asyncio.run(saturate(self.url, self.size, replicas, mode))
                        flows.setdefault((replicas, mode), []).append(flow)
        bare_medians = {which: statistics.median(of) for which, of in rates.items()}
        best = max(self.size.sizes, key=lambda rows: bare_medians[1, rows])
        top = bare_medians[1, best]
        self.pair = max(bare_medians[2, rows] for rows in self.size.sizes)
        rate = {which: statistics.median(f.rows for f in of) for which, of in flows.items()}
        self.full = rate[2, "exact"]

        print(f"\n{'':<34}{'rows/s, median (least to most)':<34}{'of R*':>8}")
        for (at_once, rows), of in sorted(rates.items()):
            line(f"bare network x{at_once}, {rows} rows a call", of, at_once * top)
        for (replicas, mode), of_flows in sorted(flows.items()):
            name = f"service, {mode}, {replicas} replica{'s' * (replicas > 1)}"
            line(name, [f.rows for f in of_flows], replicas * top)
        self.explain(flows, bare_medians[1, EXACT_ROWS])
        two_bare = self.pair / top
        print(
            f"R* = {top:.1f} with {best} rows a call; {before:.1f} before Ray was started\n"
            f"2 bare networks at once make {two_bare:.2f} of one; 2 replicas in exact mode make "
            f"{rate[2, 'exact'] / self.pair:.1%} of 2 bare ones"
        )
        bare_name = f"bare network, {best} rows a call"
        one, two, fast = rate[1, "exact"], rate[2, "exact"], rate[1, "fast"]
        unit, on_two = "rows/s", "saturated, exact, 2 replicas"
        return [
            figure("saturated, exact, 1 replica", one, top, bare_name, GOAL, unit),
            figure("saturated, fast, 1 replica", fast, top, bare_name, GOAL, unit),
            figure(on_two, two, 2 * top, "R* of both", GOAL, unit),
            figure(f"{on_two} on 2 cores", two, self.pair, "2 bare networks at once", GOAL, unit),
            figure("exact mode, 1 replica", one, fast, "fast mode", GOAL, unit),
            figure("2 replicas, exact", two, one, "1 replica", 1.8, unit),
        ]

    def explain(self, flows: dict[tuple[int, str], list[Flow]], bare_rate: float) -> None:
        """Where the rest goes."""
        for (replicas, mode), of in sorted(flows.items()):
            if mode == "exact":
                call, fill = (
                    statistics.median(getattr(f, x) for f in of) for x in ("call", "fill")
                )
                shares = ", ".join(f"{what} {of[-1].cpu[what]:.3f}" for what in sorted(of[-1].cpu))
                print(
                    f"exact, x{replicas}: {fill:.1%} of the rows are useful, a call every "
                    f"{1e3 * call:.1f} ms (bare {1e3 * EXACT_ROWS / bare_rate:.1f}); "
                    f"CPU seconds a second: {shares}"
                )
        beside = [self.bares[0].beside(4) for _ in range(7)]
        print(
            f"a step of the engine beside its network call: {1e6 * statistics.median(beside):.0f} "
            f"µs ({1e6 * min(beside):.0f} to {1e6 * max(beside):.0f})"
        )

    # --- alone ---

    def alone(self) -> list[Figure]:
        """A request against the loop: one image in fast mode, and a full call in exact mode."""
        steps = self.size.loop_steps
        body = {"num_inference_steps": steps, "sampler": "ddim", "guidance_scale": 0.0}
        cases: dict[str, tuple[int, dict[str, Any]]] = {
            "1 image, fast": (1, {**body, "mode": "fast"}),
            f"{EXACT_ROWS} images, exact": (EXACT_ROWS, {**body, "n": EXACT_ROWS}),
        }
        print(f"\n{f'alone, {steps} steps':<34}{'s, median':>12}{'bare loop':>12}")
        results = []
        with self.ours(1):
            for name, (images, wanted) in cases.items():
                ours, loops = [], []
                for number in range(self.size.repeats + 1):
                    (seconds,) = asyncio.run(in_turn(self.url, [request(wanted, number)]))
                    ours.append(seconds)
                    loops.append(self.bares[0].loop(images, steps))
                mine, theirs = statistics.median(ours[1:]), statistics.median(loops[1:])
                print(f"{name:<34}{mine:>12.3f}{theirs:>12.3f}")
                what = f"alone, {name}, over HTTP"
                rate = [images / mine, images / theirs]
                results.append(figure(what, *rate, "the bare sampler loop", GOAL))
            (padded,) = asyncio.run(in_turn(self.url, [request(body, 0)]))
            print(f"{'1 image, exact':<34}{padded:>12.3f}{'':>12}  of 16 rows a call, 15 empty")
        return results

    # --- open loop ---

    def open_loop(self, batch: int) -> list[Figure]:
        rng = random.Random(0)
        mix = kinds(self.size) * self.size.times_each_kind
        rng.shuffle(mix)
        a_second = LOAD * self.pair / mean_rows(self.size)
        at = list(itertools.accumulate(rng.expovariate(a_second) for _ in mix))
        bodies = [request(kind, number) for number, kind in enumerate(mix)]
        print(
            f"\nopen loop: {len(bodies)} requests, {a_second:.2f} a second, {LOAD} of 2 bare "
            f"networks\n{'':<34}{'rows/s':>8}{'p50 s':>9}{'p99 s':>9}"
            f"{'p50 slow':>10}{'p99 slow':>10}"
        )
        arms = {}
        for name, service, mode in (
            ("ours, exact", self.ours(2), {"mode": "exact"}),
            ("ours, fast", self.ours(2), {"mode": "fast"}),
            (f"@serve.batch, up to {batch}", self.peer(batch), {}),
            ("one at a time", self.peer(1), {}),
        ):
            with service:
                arms[name] = self.measure([{**body, **mode} for body in bodies], at)
            arm = arms[name]
            print(
                f"{name:<34}{arm.rows:>8.1f}{arm.p50:>9.2f}{arm.p99:>9.2f}"
                f"{arm.slowdown_p50:>10.2f}{arm.slowdown_p99:>10.2f}"
            )
        ours, _, batched, single = arms.values()
        arriving = a_second * mean_rows(self.size)
        print(
            f"they ask for {arriving:.1f} rows/s: a service that does less falls behind more and "
            "more, and what it does is all that it can"
        )
        slowdown = "open loop, exact, p99 slowdown against alone"
        results = [figure(slowdown, ours.slowdown_p99, 2.0, "at most 2", 1.0, "x", True)]
        for name, arm, times in (
            ("padded @serve.batch", batched, 2),
            ("one at a time", single, None),
        ):
            slow, theirs = ours.slowdown_p99, arm.slowdown_p99
            results += [
                figure("rows/s that it can do, exact", self.full, arm.rows, name, times, "rows/s"),
                figure("open loop, p99 of seconds", ours.p99, arm.p99, name, 3, "s", True),
                figure("open loop, p99 slowdown", slow, theirs, name, 3, "x alone", True),
            ]
        return results

    def measure(self, bodies: list[dict[str, Any]], at: list[float]) -> "Arm":
        alone: dict[tuple[int, float], float] = {}
        for steps, guidance in itertools.product(self.size.steps, GUIDANCE):
            kind = {**bodies[0], "num_inference_steps": steps, "guidance_scale": guidance}
            kind["sampler"] = "ddim"
            repeats = self.size.times_alone if steps < max(self.size.steps) else 1
            seconds = asyncio.run(in_turn(self.url, [kind] * repeats))
            alone[steps, guidance] = statistics.median(seconds)
        seconds, until_done = asyncio.run(arrive(self.url, bodies, at))
        slowdowns = [
            took / alone[body["num_inference_steps"], body["guidance_scale"]]
            for took, body in zip(seconds, bodies, strict=True)
        ]
        rows = sum(map(rows_of, bodies)) / until_done
        p50, p99 = np.percentile(seconds, [50, 99])
        slow_50, slow_99 = np.percentile(slowdowns, [50, 99])
        return Arm(rows, float(p50), float(p99), float(slow_50), float(slow_99))


class Arm(NamedTuple):
    """What a service made of the open loop."""

    rows: float
    """Useful rows/s from the first arrival to the last image."""
    p50: float
    p99: float
    slowdown_p50: float
    slowdown_p99: float


def registered(uri: str, model: Model) -> ModelReference:
    weights = save_tensors(model.network.state_dict())
    run = TrackedRun(uri, "serve_load", "untrained", {})
    return register(run, "serve_load", model_files(model.spec, weights, {}), {})


def line(name: str, rates: list[float], whole: float) -> None:
    print(f"{name:<34}{program.spread(rates):<34}{statistics.median(rates) / whole:>8.1%}")


if __name__ == "__main__":
    main()
