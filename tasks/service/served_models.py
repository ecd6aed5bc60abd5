"""The models of a service: which version a name means now, and how the alias is followed.

A service is started with a name such as digits@champion. When that comes to mean another version,
the service moves on to it, once every replica has loaded it. A request may name another model.
"""

import asyncio
import contextlib
import logging
import time
from concurrent.futures import ThreadPoolExecutor
from contextvars import Context
from typing import Any

from pipeline.errors import ModelNotFound, PipelineError
from pipeline.registry.versions import ModelReference, resolve
from pipeline.samplers.model import ModelSpec
from pipeline.serving.config import Mode

LOOK_AGAIN = 2.0
"""Seconds for which a name means the version that it meant."""
LONGEST_LOAD = 600.0
"""Seconds that the replicas are given to load a version that is to be served next."""
LOOKERS = 2
"""Threads that ask the registry: however many clients name models that are not there, the pictures
of the others are encoded by threads of their own."""


class Served:
    """A version that can be drawn from, as the replicas describe it."""

    def __init__(self, reference: ModelReference, facts: dict[str, Any]) -> None:
        self.reference = reference
        self.spec = ModelSpec.model_validate(facts["spec"])
        self.digest: str = facts["digest"]
        self.made_with: dict[str, str] = facts["made_with"]
        self.rows_per_second: dict[Mode, float] = facts["rows_per_second"]
        """Of one replica."""

    @property
    def size(self) -> str:
        return f"{self.spec.image_size}x{self.spec.image_size}"


class ServedModels:
    """The version that is served, and those that requests have named.

    Args:
        replicas: the handle of the deployment of replicas.
        model: the version that is served now.
        called: how the user named it; that name is followed to whatever it comes to mean.
    """

    def __init__(self, replicas: Any, model: ModelReference, called: str) -> None:
        # MLflow's first use is seconds of work, which the first requests would feel
        with contextlib.suppress(PipelineError):
            resolve(called, model.tracking_uri)
        self.current = model
        self._replicas, self._called = replicas, called
        self._served: dict[str, Served] = {}
        self._meanings: dict[str, tuple[float, ModelReference]] = {}
        self._lookers = ThreadPoolExecutor(LOOKERS, "registry")
        self._follower: asyncio.Task[None] | None = None

    async def find(self, name: str | None = None) -> Served:
        """The version that a name means, by default the one that is served.

        Raises:
            ModelNotFound, StorageError: as of `resolve`.
        """
        self._follow()
        if name is None or self._is_current(name):
            return await self._describe(self.current)
        since, reference = self._meanings.get(name, (-LOOK_AGAIN, None))
        if reference is None or time.monotonic() - since > LOOK_AGAIN:
            reference = await self._resolve(name)
            self._meanings[name] = (time.monotonic(), reference)
        return await self._describe(reference)

    async def find_loaded(self, name: str) -> Served:
        """The version that a name means, if it is the one that is served or a request has named it.

        Raises:
            ModelNotFound: it would have to be loaded.
        """
        if self._is_current(name):
            return await self.find()
        if name not in self._served:
            raise ModelNotFound(f"{name} is not served")
        return self._served[name]

    def _is_current(self, name: str) -> bool:
        return name in (self._called, self.current.name, str(self.current))

    async def _resolve(self, name: str) -> ModelReference:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._lookers, resolve, name, self.current.tracking_uri)

    async def _describe(self, reference: ModelReference) -> Served:
        if str(reference) not in self._served:
            facts = await self._replicas.describe.remote(reference)
            self._served[str(reference)] = Served(reference, facts)
        return self._served[str(reference)]

    def _follow(self) -> None:
        if self._follower is None:
            # not in the context of a request, see generations.py
            self._follower = asyncio.create_task(self._keep_following(), context=Context())

    async def _keep_following(self) -> None:
        """Move on with the alias, once every replica has the version that it means now."""
        while True:
            await asyncio.sleep(LOOK_AGAIN)
            try:
                now = await self._resolve(self._called)
                if now != self.current:
                    replies = self._replicas.broadcast("describe", now).results_async()
                    await asyncio.wait_for(replies, LONGEST_LOAD)
                    await self._describe(now)
                    self.current = now
            except Exception as error:  # the one before goes on serving
                logging.getLogger("ray.serve").warning(
                    "%s stays %s: %s", self._called, self.current, error
                )
