"""The models that a replica has in memory."""

import asyncio
from collections import OrderedDict
from collections.abc import Callable
from contextvars import Context

import torch

from pipeline.registry.versions import ModelReference
from pipeline.samplers.model import Model
from pipeline.serving.config import Mode, ServingConfig
from pipeline.serving.engine import Engine


class Loaded:
    """A model in memory, and its engine of each mode."""

    def __init__(
        self, name: str, model: Model, device: torch.device, config: ServingConfig
    ) -> None:
        self.name = name
        self.model = model
        self.engines: dict[Mode, Engine] = {
            "exact": Engine(model, "exact", config.rows, device),
            "fast": Engine(model, "fast", config.rows, device, config.compile),
        }
        self.rows_per_second: dict[Mode, float] = {}
        """Of a full network call."""
        self.images = 0
        """In hand or about to be."""


class LoadedModels:
    """Models by what is in them, loaded when they are asked for.

    Args:
        load: takes as long as it takes, on a thread.
        most: beyond so many the one used longest ago is given up, unless it is drawn from.
    """

    def __init__(self, load: Callable[[ModelReference], Loaded], most: int) -> None:
        self._load = load
        self._most = most
        self._models: OrderedDict[str, Loaded] = OrderedDict()
        self._coming: dict[str, asyncio.Task[None]] = {}
        self._loading = asyncio.Lock()

    @property
    def all(self) -> list[Loaded]:
        return list(self._models.values())

    def load_now(self, reference: ModelReference) -> None:
        self._keep(reference, self._load(reference))

    async def get(self, reference: ModelReference) -> Loaded:
        """The model of a version, now the one used last.

        It is loaded once, whoever stops waiting for it.
        """
        digest = reference.digest
        while digest not in self._models:
            if digest not in self._coming:
                # not in the context of a request, see generations.py
                coming = asyncio.create_task(self._fetch(reference), context=Context())
                self._coming[digest] = coming
            await asyncio.shield(self._coming[digest])
        self._models.move_to_end(digest)
        return self._models[digest]

    async def _fetch(self, reference: ModelReference) -> None:
        try:
            async with self._loading:  # one at a time: memory is what runs out
                self._keep(reference, await asyncio.to_thread(self._load, reference))
        finally:
            del self._coming[reference.digest]

    def _keep(self, reference: ModelReference, loaded: Loaded) -> None:
        self._models[reference.digest] = loaded
        idle = [digest for digest, of in self._models.items() if not of.images and of is not loaded]
        for digest in idle[: max(0, len(self._models) - self._most)]:
            del self._models[digest]
