"""The service under everything that happens to one, at once: `make load`.

Two replicas and a crowd of clients. They want images with all kinds of settings, plain or as a
stream. Some hang up, and come back by the id of the request, or by its idempotency key, or never;
some read slowly; some cancel. Now and then a burst asks for ten times the work that the service
accepts at a time. Meanwhile replicas are killed, one or all. Then every request that was accepted
and not given up has all its images, in all ways that it was asked for, and each is, bit for bit,
what the engine draws of its recipe in peace; the others were told to try again (429), and nothing
else was answered. Memory is flat, and in the end no work is left.

LOAD_SECONDS is how long, LOAD_SEED which clients and kills.
"""

import asyncio
import base64
import contextlib
import json
import os
import random
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp  # Ray's dashboard needs it: it is there
import numpy as np
import psutil
import pytest
from safetensors.torch import save as save_tensors

from pipeline.registry.aliases import promote
from pipeline.registry.folder import model_files
from pipeline.registry.registration import register
from pipeline.registry.runs import TrackedRun
from pipeline.registry.versions import SERVING_TAG
from pipeline.samplers.config import SamplingConfig
from pipeline.serving.api import rows_of
from pipeline.serving.config import ServingConfig
from pipeline.serving.engine import Engine, ImageRequest
from pipeline.serving.recipe import decode
from tests.conftest import Workplace, ray_workers
from tests.service import Service, served
from tests.unit.test_engine import make_model

SECONDS = float(os.environ.get("LOAD_SECONDS", "300"))
SEED = int(os.environ.get("LOAD_SEED", "0"))
CLIENTS = 12
KINDS = 40
MAX_ROWS = 8000
"""That the service accepts at a time: a few seconds of work."""
BURST = 10 * MAX_ROWS
MEGABYTES = 100
"""By which the memory of a process may grow from the first half to the second."""
PATH = "/v1/images/generations"
MODEL = make_model([str(i) for i in range(10)])


@pytest.fixture
def service(tmp_path: Path) -> Iterator[Service]:
    """Of a network that was not trained, which draws as well for this."""
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    config = ServingConfig(max_rows=MAX_ROWS, max_rows_per_client=MAX_ROWS)
    files = model_files(MODEL.spec, save_tensors(MODEL.network.state_dict()), {})
    tags = {SERVING_TAG: config.model_dump_json()}
    promote(register(TrackedRun(uri, "load", "load", {}), "digits", files, tags), "champion")
    with served(Workplace(tmp_path), "--replicas", "2") as running:
        yield running


def test_whatever_happens_an_accepted_request_has_its_images(service: Service) -> None:
    load = Load(service, random.Random(SEED))
    memory = asyncio.run(load.run())
    print(f"\nseed {SEED}, {SECONDS:.0f} s: {load.kills} kills; {dict(sorted(load.did.items()))}")
    assert not load.wrong, "\n".join(load.wrong)
    assert load.did["refused"] and load.did["complete"] > load.kills > 0
    assert_as_in_peace(load.pictures)
    assert_flat(memory)


def kinds(rng: random.Random) -> list[dict[str, Any]]:
    """Bodies of requests; few, so that many ask for the same and it is known what they get."""
    return [
        {
            "seed": seed,
            "n": rng.choice([1, 1, 2, 4]),
            "num_inference_steps": rng.choice([5, 20, 50, 100, 250]),
            "sampler": rng.choice(["ddim", "ancestral", "dpm_solver_pp", "heun"]),
            "class_label": rng.randrange(10),
            "guidance_scale": rng.choice([0.0, 1.5]),
        }
        for seed in range(KINDS)
    ]


def sampling_of(body: dict[str, Any]) -> SamplingConfig:
    steps, guidance = body["num_inference_steps"], body["guidance_scale"]
    return SamplingConfig(sampler=body["sampler"], steps=steps, guidance=guidance)


def cost(body: dict[str, Any]) -> int:
    return rows_of(sampling_of(body)) * int(body["n"])


@dataclass
class Load:
    """Clients and killers, and what they have seen."""

    service: Service
    rng: random.Random
    did: Counter[str] = field(default_factory=Counter)
    kills: int = 0
    wrong: list[str] = field(default_factory=list)
    pictures: dict[tuple[int, int], tuple[dict[str, Any], set[str]]] = field(default_factory=dict)
    """By (seed, index): of which body, and all PNGs that were sent for it."""

    async def run(self) -> dict[str, list[tuple[float, int]]]:
        """All of it; returns (when, bytes) of each process by its role and id."""
        self.kinds = kinds(self.rng)
        self.end = time.monotonic() + SECONDS
        connector = aiohttp.TCPConnector(limit=0, force_close=True)
        timeout = aiohttp.ClientTimeout(total=180)
        async with aiohttp.ClientSession(
            self.service.url, connector=connector, timeout=timeout
        ) as session:
            self.session = session
            memory: dict[str, list[tuple[float, int]]] = defaultdict(list)
            watcher = asyncio.create_task(self.watch(memory))
            async with asyncio.TaskGroup() as group:
                for number in range(CLIENTS):
                    group.create_task(self.client(random.Random(f"{SEED} {number}")))
                group.create_task(self.bursts())
                group.create_task(self.killer())
            watcher.cancel()
            await self.nothing_left()
        return memory

    # --- what goes wrong around the service ---

    async def killer(self) -> None:
        """One replica at a time, seldom all; another takes ten seconds to be there."""
        rng = random.Random(f"{SEED} kills")
        while await self.pause(rng.uniform(4, 26)):
            replicas = replica_processes(self.service.pid)
            for replica in replicas if rng.random() < 0.15 else rng.sample(replicas, 1):
                with contextlib.suppress(psutil.NoSuchProcess):
                    replica.kill()
                    self.kills += 1

    async def watch(self, memory: dict[str, list[tuple[float, int]]]) -> None:
        while True:
            for role in ("ddpm:Replica", "ddpm:Ingress", "Proxy"):
                for process in ray_workers(self.service.pid, role):
                    with contextlib.suppress(psutil.Error):
                        one = (time.monotonic(), process.memory_info().rss)
                        memory[f"{role} {process.pid}"].append(one)
            await asyncio.sleep(1)

    async def pause(self, seconds: float) -> bool:
        """Whether there is time left after it."""
        await asyncio.sleep(min(seconds, max(0.0, self.end - time.monotonic())))
        return time.monotonic() < self.end

    # --- clients ---

    async def client(self, rng: random.Random) -> None:
        """One after another, in one of the ways of clients."""
        ways = [
            self.plain,
            self.plain,
            self.stream,
            self.slow,
            self.back_by_id,
            self.back_by_key,
            self.never_back,
            self.cancel,
        ]
        while await self.pause(rng.uniform(0, 0.5)):
            way, body = rng.choice(ways), rng.choice(self.kinds)
            try:
                await way(body, rng)
            except Exception as error:  # the test is to say all that went wrong
                self.wrong.append(f"{way.__name__} {body}: {type(error).__name__} {error}")

    async def bursts(self) -> None:
        """All at once, with more work than is accepted."""
        rng = random.Random(f"{SEED} bursts")
        while await self.pause(rng.uniform(10, 25)):
            bodies: list[dict[str, Any]] = []
            while sum(map(cost, bodies)) < BURST:
                bodies.append(rng.choice(self.kinds))
            found = await asyncio.gather(
                *(self.plain(body, rng) for body in bodies), return_exceptions=True
            )
            self.wrong += [f"burst: {one!r}" for one in found if isinstance(one, BaseException)]
            self.did["burst"] += 1

    def post(self, body: dict[str, Any], **headers: str) -> Any:
        return self.session.post(PATH, json=body, headers=headers)

    async def accepted(self, reply: aiohttp.ClientResponse) -> bool:
        """Whether the request was; if not, it was told so in the way that it should."""
        if reply.status == 429:
            assert int(reply.headers["Retry-After"]) >= 1
            assert (await reply.json())["error"]["type"] == "rate_limit_error"
            self.did["refused"] += 1
            return False
        await expect_ok(reply)
        self.did["accepted"] += 1
        return True

    def keep(self, body: dict[str, Any], images: list[dict[str, Any]]) -> None:
        """Note the images of a request, which are all there."""
        assert [image["index"] for image in images] == list(range(body["n"]))
        for image in images:
            assert image["seed"] == body["seed"]
            _, pngs = self.pictures.setdefault((image["seed"], image["index"]), (body, set()))
            pngs.add(image["b64_json"])
        self.did["complete"] += 1

    async def plain(self, body: dict[str, Any], rng: random.Random) -> None:
        async with self.post(body) as reply:
            if await self.accepted(reply):
                self.keep(body, (await reply.json())["data"])

    async def stream(self, body: dict[str, Any], rng: random.Random) -> None:
        async with self.post({**body, "stream": True, "partial_images": 3}) as reply:
            if await self.accepted(reply):
                self.keep(body, completed(await reply.text(), 1))

    async def slow(self, body: dict[str, Any], rng: random.Random) -> None:
        """A few kilobytes a second."""
        async with self.post({**body, "stream": True, "partial_images": 20}) as reply:
            if await self.accepted(reply):
                text = b""
                while chunk := await reply.content.read(2000):
                    text += chunk
                    await asyncio.sleep(rng.uniform(0, 0.3))
                self.keep(body, completed(text.decode(), 1))
                self.did["read slowly"] += 1

    async def hung_up(self, body: dict[str, Any], rng: random.Random) -> tuple[str, str] | None:
        """(id, what was read) of a stream that was left in the middle."""
        async with self.post({**body, "stream": True, "partial_images": 10}) as reply:
            if not await self.accepted(reply):
                return None
            text = b""
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(rng.uniform(0, 1)):
                    while chunk := await reply.content.readany():
                        text += chunk
            self.did["hung up"] += 1
            whole, _, _ = text.rpartition(b"\n\n")
            return reply.headers["X-Generation-Id"], whole.decode()

    async def back_by_id(self, body: dict[str, Any], rng: random.Random) -> None:
        """The events go on where they were left, and the images are all there at any time."""
        if (left := await self.hung_up(body, rng)) is None:
            return
        await asyncio.sleep(rng.uniform(0, 4))
        id, before = left
        last = len(events(before))
        headers = {"Accept": "text/event-stream", "Last-Event-ID": str(last)}
        async with self.session.get(f"{PATH}/{id}", headers=headers) as reply:
            await expect_ok(reply)
            rest = await reply.text()
        both = "\n\n".join(part for part in (before, rest) if part)
        self.keep(body, completed(both, 1))
        async with self.session.get(f"{PATH}/{id}") as reply:
            await expect_ok(reply)
            self.keep(body, (await reply.json())["data"])
        self.did["came back by id"] += 1

    async def back_by_key(self, body: dict[str, Any], rng: random.Random) -> None:
        """A plain request whose connection was lost, sent again."""
        headers = {"Idempotency-Key": f"{rng.random()}"}
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(rng.uniform(0, 1)), self.post(body, **headers) as reply:
                await reply.read()
        await asyncio.sleep(rng.uniform(0, 4))
        async with self.post(body, **headers) as reply:
            if await self.accepted(reply):
                self.keep(body, (await reply.json())["data"])
                self.did["came back by key"] += 1

    async def never_back(self, body: dict[str, Any], rng: random.Random) -> None:
        await self.hung_up(body, rng)

    async def cancel(self, body: dict[str, Any], rng: random.Random) -> None:
        if (left := await self.hung_up(body, rng)) is None:
            return
        async with self.session.delete(f"{PATH}/{left[0]}") as reply:
            await expect_ok(reply)
            assert (await reply.json())["state"] in ("cancelled", "completed")
        self.did["cancelled"] += 1

    async def nothing_left(self) -> None:
        """Within the time that a request without a listener is kept."""
        for _ in range(30):
            async with self.session.get("/v1/engine") as reply:
                state = await reply.json()
            if state["rows"] == 0 and state["requests"] == []:
                return
            await asyncio.sleep(1)
        self.wrong.append(f"in the end there is left {state}")


async def expect_ok(reply: aiohttp.ClientResponse) -> None:
    """In words of its own: pytest would show the reply instead."""
    if reply.status != 200:
        raise ValueError(f"{reply.status} {await reply.text()}")


def events(text: str) -> list[tuple[int, str, dict[str, Any]]]:
    """(number, name, data) of server-sent events."""
    found = []
    for block in filter(None, text.split("\n\n")):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        found.append((int(fields.get("id", 0)), fields["event"], json.loads(fields["data"])))
    return found


def completed(text: str, first: int) -> list[dict[str, Any]]:
    """The images of all events of a request, in order; no event is missing or comes twice."""
    found = events(text)
    assert all(name != "error" for _, name, _ in found), found[-1]
    assert [number for number, _, _ in found] == list(range(first, first + len(found)))
    images = [data for _, name, data in found if name == "image_generation.completed"]
    return sorted(images, key=lambda image: int(image["index"]))


def replica_processes(pid: int) -> list[psutil.Process]:
    return ray_workers(pid, "ddpm:Replica")


def assert_as_in_peace(pictures: dict[tuple[int, int], tuple[dict[str, Any], set[str]]]) -> None:
    """Each image was the same whenever it was sent, and is what the engine alone draws."""
    recipes = [
        ImageRequest(seed, index, body["class_label"], sampling_of(body))
        for (seed, index), (body, _) in pictures.items()
    ]
    drawn = Engine(MODEL, "exact").draw(recipes)
    for request, pixels, (_, pngs) in zip(recipes, drawn, pictures.values(), strict=True):
        assert len(pngs) == 1, f"{request} came as {len(pngs)} different files"
        found, recipe = decode(base64.b64decode(*pngs), "")
        assert recipe.request() == request
        assert np.array_equal(found, pixels), request


def assert_flat(memory: dict[str, list[tuple[float, int]]]) -> None:
    """No role's process is larger in the second half than any was in the first, but a little."""
    times = [when for of in memory.values() for when, _ in of]
    middle = (min(times) + max(times)) / 2
    for role in ("ddpm:Replica", "ddpm:Ingress", "Proxy"):
        seen = [one for name, of in memory.items() if name.startswith(role) for one in of]
        first = max(size for when, size in seen if when < middle) / 1e6
        second = max(size for when, size in seen if when >= middle) / 1e6
        print(f"{role}: at most {first:.0f} MB in the first half, {second:.0f} MB in the second")
        assert second < first + MEGABYTES, role
