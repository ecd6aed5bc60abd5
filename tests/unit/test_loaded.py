"""The models in a replica's memory, without a service: what is loaded, and what makes room."""

import asyncio
import time
from types import SimpleNamespace
from typing import Any

import pytest

from pipeline.errors import CorruptArtifact
from pipeline.registry.versions import ModelReference
from tasks.service.loaded_models import LoadedModels


class Disk:
    """What models are loaded from; it knows what it was asked for."""

    def __init__(self) -> None:
        self.asked: list[str] = []
        self.now = self.most_at_once = 0

    def load(self, reference: ModelReference) -> Any:
        self.asked.append(reference.version)
        self.now += 1
        self.most_at_once = max(self.most_at_once, self.now)
        time.sleep(0.05)
        self.now -= 1
        if reference.version == "torn":
            raise CorruptArtifact("torn")
        return SimpleNamespace(name=reference.version, images=0)


def version(number: int | str) -> ModelReference:
    return ModelReference("digits", str(number), f"digest of {number}", "")


def test_a_model_that_many_ask_for_is_loaded_once_though_the_first_of_them_goes() -> None:
    disk = Disk()

    async def body() -> None:
        models = LoadedModels(disk.load, most=2)
        first = asyncio.create_task(models.get(version(1)))
        others = [asyncio.create_task(models.get(version(1))) for _ in range(3)]
        await asyncio.sleep(0.01)
        first.cancel()
        assert len({id(model) for model in await asyncio.gather(*others)}) == 1
        assert first.cancelled()

    asyncio.run(body())
    assert disk.asked == ["1"]


def test_models_are_loaded_one_at_a_time_and_the_one_used_longest_ago_goes() -> None:
    disk = Disk()

    async def body() -> list[str]:
        models = LoadedModels(disk.load, most=2)
        models.load_now(version(0))
        await asyncio.gather(models.get(version(1)), models.get(version(2)))
        (await models.get(version(1))).images = 1  # it draws
        await models.get(version(2))
        await models.get(version(3))
        return [model.name for model in models.all]

    assert asyncio.run(body()) == ["1", "3"]
    assert disk.asked == ["0", "1", "2", "3"]
    assert disk.most_at_once == 1


def test_a_model_that_cannot_be_loaded_can_be_asked_for_again() -> None:
    disk = Disk()

    async def body() -> None:
        models = LoadedModels(disk.load, most=2)
        for _ in range(2):
            with pytest.raises(CorruptArtifact, match="torn"):
                await models.get(version("torn"))
        assert models.all == []

    asyncio.run(body())
    assert disk.asked == ["torn", "torn"]
