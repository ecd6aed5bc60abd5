"""Deals the images of a request out to the replicas, and tells the request of each as it comes."""

import asyncio
import base64
import itertools
import math
import time
from dataclasses import dataclass, replace
from typing import Any

from ray.exceptions import ObjectLostError, RayActorError

from pipeline.data.images import png
from pipeline.serving.api import GenerationRequest, rows_of, usage_of
from pipeline.serving.config import Mode, ServingConfig
from pipeline.serving.engine import Caller, ImageRequest
from pipeline.serving.recipe import Recipe, encode
from tasks.service.generations import EVENT_BYTES, Generation
from tasks.service.messages import Drawn, Order, Preview, ReplicaFailed
from tasks.service.metrics import IngressMetrics
from tasks.service.served_models import Served

ATTEMPTS = 10
"""Replicas that may die over an image before its request fails: so many that it is the image's
doing. Three die under a long image now and then, if replicas are killed every ten seconds."""

LOST = (RayActorError, ObjectLostError)
"""What Ray raises for a replica that died, and for pictures that were on the node it died with."""


@dataclass(frozen=True)
class Job:
    """What is to be drawn for a request."""

    request: GenerationRequest
    served: Served
    images: list[ImageRequest]
    mode: Mode
    client: int
    """The number of whose request it is."""

    @property
    def rows_each(self) -> int:
        return rows_of(self.images[0].sampling)

    @property
    def room(self) -> int:
        """Bytes that its events take, at most: a picture of noise is as large as its pixels."""
        frames = self.request.partial_images
        pictures = (1 + 2 * frames) * math.prod(self.served.spec.image_shape) * 4 // 3
        return len(self.images) * (pictures + (1 + frames) * EVENT_BYTES)


class Dealer:
    """Args:
    replicas: the handle of the deployment of replicas.
    """

    def __init__(self, replicas: Any, config: ServingConfig, metrics: IngressMetrics) -> None:
        self._replicas = replicas.options(stream=True)
        self._config = config
        self._metrics = metrics
        self._numbers = itertools.count()

    async def run(self, generation: Generation, job: Job) -> None:
        """Draw the images of a request.

        Raises:
            TimeoutError: they are not done in the time that the service gives a request.
            ExceptionGroup: of what went wrong with some of them.
        """
        begin = time.monotonic()
        caller = Caller(next(self._numbers), job.client, generation.id)
        try:
            async with asyncio.timeout(self._config.max_seconds), asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._one(generation, job, caller, position))
                    for position in range(len(job.images))
                ]
        except BaseException as error:
            outcome = {TimeoutError: "late", asyncio.CancelledError: "cancelled"}
            self._metrics.note_end(outcome.get(type(error), "failed"))
            raise
        generation.result = {
            "id": generation.id,
            "created": generation.created,
            "model": str(job.served.reference),
            "output_format": job.request.output_format,
            "size": job.served.size,
            "data": [task.result() for task in tasks],
            "usage": usage_of(job.rows_each * len(job.images)),
        }
        seconds = time.monotonic() - begin
        self._metrics.note_completed(str(job.served.reference), job.mode, seconds)

    async def _one(
        self, generation: Generation, job: Job, caller: Caller, position: int
    ) -> dict[str, Any]:
        """One image, encoded."""
        image, served = job.images[position], job.served
        frames = job.request.partial_images
        order = Order(image, served.reference, job.mode, caller, job.rows_each, frames)
        drawn = await self._draw(generation, job, order, position)
        recipe = Recipe(
            model=str(served.reference),
            model_digest=served.digest,
            seed=image.seed,
            index=image.index,
            label=image.label,
            sampling=image.sampling,
            mode=job.mode,
            rows=self._config.rows,
            made_with=served.made_with,
        )
        picture = await asyncio.to_thread(
            encode, drawn.pixels, recipe, format=job.request.output_format
        )
        entry: dict[str, Any] = {
            "b64_json": base64.b64encode(picture).decode(),
            "seed": image.seed,
            "index": image.index,
            "recipe": recipe.model_dump(mode="json"),
            "replica": drawn.replica,
        }
        generation.rows -= job.rows_each
        generation.done_images += 1
        data = {**_about(generation, job, position), **entry, "usage": usage_of(job.rows_each)}
        await generation.tell("image_generation.completed", data, len(entry["b64_json"]))
        return entry

    async def _draw(self, generation: Generation, job: Job, order: Order, position: int) -> Drawn:
        """One image, from another replica if one dies or fails over it: the pixels are the same."""
        told = evaluation = 0
        for attempt in range(ATTEMPTS):
            events = self._replicas.draw.remote(order)
            try:
                async for event in events:
                    if isinstance(event, Drawn):
                        return event
                    if event.evaluation > evaluation:  # of another replica they come again
                        evaluation = event.evaluation
                        await self._tell_frame(generation, job, position, told, event)
                        told += 1
            except ReplicaFailed as failed:
                # it came again: there is no other that has not tried it
                if failed.replica in order.avoid or attempt == ATTEMPTS - 1:
                    raise failed.why from failed
                order = replace(order, avoid=order.avoid | {failed.replica})
            except LOST:
                if attempt == ATTEMPTS - 1:
                    raise
            except asyncio.CancelledError:
                events.cancel()
                raise
        raise AssertionError

    async def _tell_frame(
        self, generation: Generation, job: Job, position: int, told: int, event: Preview
    ) -> None:
        x_0, x_t = await asyncio.gather(
            asyncio.to_thread(png, event.x_0), asyncio.to_thread(png, event.x_t)
        )
        data = {
            **_about(generation, job, position),
            "output_format": "png",
            "partial_image_index": told,
            "b64_json": base64.b64encode(x_0).decode(),
            "x_t": base64.b64encode(x_t).decode(),
            "evaluation": event.evaluation,
            "evaluations": event.evaluations,
        }
        size = len(data["b64_json"]) + len(data["x_t"])
        await generation.tell("image_generation.partial_image", data, size)


def _about(generation: Generation, job: Job, position: int) -> dict[str, Any]:
    """What every event of an image says."""
    return {
        "id": generation.id,
        "image_index": position,
        "created_at": generation.created,
        "size": job.served.size,
        "quality": "auto",
        "background": "opaque",
        "output_format": job.request.output_format,
    }
