"""A replica of a service: a few models in memory, and a thread that draws.

It holds as many images as it is given: its engine sees to whose turn it is
(pipeline/serving/turns.py).
"""

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import numpy as np
from ray import serve
from ray.serve.config import RequestRouterConfig

from pipeline.data.images import to_uint8
from pipeline.loading import load_model
from pipeline.registry.versions import ModelReference
from pipeline.samplers.model import make_plan
from pipeline.serving.config import ServingConfig
from pipeline.serving.engine import Frame
from pipeline.serving.engine_thread import EngineThread, StepFailed
from pipeline.serving.recipe import fingerprint
from tasks.cluster import worker_device
from tasks.service.autoscaling import SECONDS_OF_WORK
from tasks.service.loaded_models import Loaded, LoadedModels
from tasks.service.messages import Drawn, Order, Preview, ReplicaFailed
from tasks.service.metrics import ReplicaMetrics
from tasks.service.router import LeastRows

MOST_IN_HAND = 1024
"""Images of a replica: enough never to be the limit, which the ingress sets, in rows."""
LONGEST_LOOK = 1.0
"""Seconds that the thread of the engines is waited for, to say what it is at."""
MOST_SHOWN = 64
"""Images in hand of an engine that are told of one by one."""
LONGEST_STEP = 300.0
"""Seconds after which a network call counts as one that never ends, and its replica is replaced."""
MOST_FAILURES = 3
"""Network calls that may fail one after another before their replica is replaced."""


@serve.deployment(
    max_ongoing_requests=MOST_IN_HAND,
    health_check_period_s=5,
    request_router_config=RequestRouterConfig(request_router_class=LeastRows),
)
class Replica:
    """Draws images of the models that it has in memory, for the ingress.

    Args:
        model: loaded and warm before the replica counts as ready.
    """

    def __init__(self, model: ModelReference, config: ServingConfig) -> None:
        self.config = config
        self.device = worker_device()
        self.replica = serve.get_replica_context().replica_id.unique_id
        self.metrics = ReplicaMetrics()
        self.thread = EngineThread(self.metrics.note_step)
        self._planner = ThreadPoolExecutor(1, "planner")
        self._came: dict[object, float] = {}
        self._models = LoadedModels(self._load, config.max_models)
        self._models.load_now(model)
        self._publisher = asyncio.get_running_loop().create_task(self._publish())

    # --- models -----------------------------------------------------------------------------------

    def _load(self, reference: ModelReference) -> Loaded:
        """Load a model, and let it pay for torch's set-up."""
        model = load_model(reference.uri, reference.tracking_uri)
        loaded = Loaded(str(reference), model, self.device, self.config)
        for engine in loaded.engines.values():
            loaded.rows_per_second[engine.mode] = self.thread.call(engine.warm_up).result()
        return loaded

    # --- what the ingress asks --------------------------------------------------------------------

    async def draw(self, order: Order) -> AsyncIterator[Preview | Drawn]:
        """The frames of an image as they come, then the image. Whoever stops listening drops it.

        Raises:
            ReplicaFailed: it may be drawn elsewhere.
        """
        try:
            loaded = await self._models.get(order.model)
        except Exception as error:
            raise ReplicaFailed(self.replica, error) from error
        loop, events = asyncio.get_running_loop(), asyncio.Queue[Frame | None]()

        def pass_on(frame: Frame | None) -> None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: the replica ends
                loop.call_soon_threadsafe(events.put_nowait, frame)

        with self._in_hand(loaded):
            # a plan may take half a second to make, for which no image is to be held up
            sampling = order.image.sampling
            await loop.run_in_executor(self._planner, make_plan, loaded.model, sampling)
            future: Future[np.ndarray] = self.thread.submit(
                loaded.engines[order.mode], order.image, order.caller, order.frames, pass_on
            )
            future.add_done_callback(lambda _: pass_on(None))
            try:
                while (frame := await events.get()) is not None:
                    x_t, x_0 = (to_uint8(x[None])[0] for x in (frame.x_t, frame.x_0))
                    yield Preview(frame.evaluation, frame.evaluations, x_t, x_0)
                yield Drawn(future.result(), self.replica)
                self.metrics.note_image(loaded.name, order.mode)
            except StepFailed as error:
                raise ReplicaFailed(self.replica, error) from error
            finally:
                future.cancel()

    @contextlib.contextmanager
    def _in_hand(self, loaded: Loaded) -> Iterator[None]:
        """An image counts as there, and its model is kept."""
        loaded.images += 1
        arrival = object()
        self._came[arrival] = time.monotonic()
        try:
            yield
        finally:
            loaded.images -= 1
            del self._came[arrival]

    async def describe(self, reference: ModelReference) -> dict[str, Any]:
        """What the ingress needs to know of a model, which is loaded for it."""
        loaded = await self._models.get(reference)
        return {
            "spec": loaded.model.spec.model_dump(mode="json"),
            "digest": loaded.model.digest,
            "made_with": fingerprint(self.device.type),
            "rows_per_second": loaded.rows_per_second,
        }

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Ray Serve asks for this: the seconds that the work in hand takes, see autoscaling.py."""
        seconds = 0.0
        for loaded in self._models.all:
            for mode, engine in loaded.engines.items():
                seconds += engine.num_rows / loaded.rows_per_second[mode]
        return {SECONDS_OF_WORK: seconds}

    async def _publish(self) -> None:
        while True:
            await asyncio.sleep(1)
            names = {
                engine: loaded.name
                for loaded in self._models.all
                for engine in loaded.engines.values()
            }
            self.metrics.publish(names, list(self._came.values()))

    async def state(self) -> dict[str, Any]:
        """What this replica is at, for people; without engines as long as its thread is held up."""
        look = asyncio.wrap_future(self.thread.call(self._look))
        try:
            engines = await asyncio.wait_for(look, LONGEST_LOOK)
        except TimeoutError:
            engines = []
        return {"replica": self.replica, "at": time.time(), "engines": engines}

    def _look(self) -> list[dict[str, Any]]:
        """What each engine is at. On the thread of the engines."""
        engines = [
            (loaded, engine) for loaded in self._models.all for engine in loaded.engines.values()
        ]
        return [
            {
                "model": loaded.name,
                "mode": engine.mode,
                "rows_of_call": engine.rows,
                "calls": engine.num_calls,
                "useful_rows": engine.num_useful_rows,
                "num_images": engine.num_images,
                "images": [image.model_dump() for image in engine.in_hand()[:MOST_SHOWN]],
            }
            for loaded, engine in engines
        ]

    def check_health(self) -> None:
        if not self.thread.is_alive:
            raise RuntimeError("the thread of the engines has ended")
        if (seconds := self.thread.seconds_in_step) > LONGEST_STEP:
            raise RuntimeError(f"a network call has not come back for {seconds:.0f} s")
        if (failures := self.thread.failures) >= MOST_FAILURES:
            raise RuntimeError(f"the last {failures} network calls failed")
