"""The time of a training step, measured before there is any data."""

import math
import threading

import pytest
import torch
from torch import nn

from pipeline.diffusion.config import DiffusionConfig
from pipeline.networks.config import UNetConfig
from pipeline.networks.unet import UNet
from pipeline.training.config import TrainingConfig
from pipeline.training.speed import Fitted, seconds_per_step

CPU = torch.device("cpu")
TRAINING = TrainingConfig(steps=10, batch_size=5, lr=1e-3)


class Networks:
    """Makes small U-Nets, and remembers in which threads, and the batches that they saw."""

    def __init__(self, num_classes: int = 0, step: float = 0.0) -> None:
        self.num_classes = num_classes
        self.threads: set[threading.Thread] = set()
        self.batches: list[int] = []
        self.labels: list[list[int]] = []

    def __call__(self) -> nn.Module:
        config = UNetConfig(base_channels=8, channel_multipliers=[1, 2], blocks_per_level=1)
        network = UNet(config, 1, 8, self.num_classes)
        if threading.current_thread() is not threading.main_thread():
            self.threads.add(threading.current_thread())
            network.register_forward_pre_hook(self._remember)
        return network

    def _remember(self, _: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        self.batches.append(len(inputs[0]))


def fitted(networks: Networks) -> Fitted:
    return Fitted(networks, DiffusionConfig(), (1, 8, 8), networks.num_classes)


@pytest.mark.parametrize(("workers", "rows"), [(1, 5), (2, 3)])
@pytest.mark.parametrize("num_classes", [0, 3])
def test_each_worker_trains_a_network_on_the_largest_share(
    workers: int, rows: int, num_classes: int
) -> None:
    networks, before = Networks(num_classes), torch.get_num_threads()
    seconds = seconds_per_step(fitted(networks), TRAINING, workers, 1, CPU)
    assert 0 < seconds < math.inf
    assert len(networks.threads) == workers
    assert set(networks.batches) == {rows}
    assert len(networks.batches) >= 3 * workers, "a first step, and two that are timed"
    assert torch.get_num_threads() == before


def test_what_no_processor_could_do_in_time_is_not_tried() -> None:
    networks = Networks()
    assert seconds_per_step(fitted(networks), TRAINING, 1, 1, CPU, limit=1e-12) == math.inf
    assert networks.batches == []


def test_a_network_that_memory_does_not_hold_is_endlessly_slow() -> None:
    def without_memory() -> nn.Module:
        if threading.current_thread() is threading.main_thread():
            return Networks()()
        raise torch.OutOfMemoryError("so it is")

    found = Fitted(without_memory, DiffusionConfig(), (1, 8, 8), 0)
    assert seconds_per_step(found, TRAINING, 2, 1, CPU) == math.inf
