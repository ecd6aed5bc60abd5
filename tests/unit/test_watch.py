"""What is logged of the steps."""

import time
from pathlib import Path

import pytest
import torch

from pipeline import storage
from pipeline.networks.config import UNetConfig
from pipeline.networks.unet import UNet
from pipeline.training.loop import StepRecord
from pipeline.training.watch import Watch, measured_peak, slowdown, training_flops
from tests.unit.test_training import CPU, config, fresh, steps


def record(step: int, loss: float, norm: float = 1.0) -> StepRecord:
    by_quartile = torch.tensor([[2.0 * loss, 2.0], [0.0, 0.0], [loss, 1.0], [0.0, 0.0]])
    return StepRecord(step, torch.tensor(loss), torch.tensor(norm), by_quartile, 0.1, 0.0)


def watch(may_overflow: bool = False) -> Watch:
    return Watch(8, flops_per_image=1e6, peak=1e9, may_overflow=may_overflow)


def test_figures_are_means_over_the_steps_since_the_last_time() -> None:
    watching = watch()
    for step, loss in enumerate((1.0, 3.0), start=1):
        watching.add(record(step, loss, norm=loss / 2))
    figures, bad = watching.take()
    assert bad is None
    assert (figures["loss"], figures["grad_norm"], figures["lr"]) == (2.0, 1.0, 0.1)
    assert figures["loss_quartile_1"] == pytest.approx(2.0)
    assert figures["loss_quartile_3"] == pytest.approx(2.0)
    assert "loss_quartile_2" not in figures, "no timestep fell there"
    assert figures["utilisation"] == pytest.approx(figures["images_per_second"] * 1e6 / 1e9)
    assert 0 < figures["system/system_memory_usage_percentage"] < 100
    watching.add(record(3, 5.0))
    assert watching.take()[0]["loss"] == 5.0


@pytest.mark.parametrize(
    ("losses", "norms", "may_overflow", "bad"),
    [
        ((1.0, float("nan"), float("inf")), (1.0, 1.0, 1.0), False, 2),
        ((1.0, 1.0, 1.0), (1.0, 1.0, float("inf")), False, 3),
        ((1.0, 1.0, 1.0), (1.0, float("inf"), 2.0), True, None),
        ((1.0, 1.0, float("inf")), (1.0, float("inf"), 1.0), True, 3),
    ],
)
def test_the_first_step_that_is_not_finite_is_named(
    losses: tuple[float, ...], norms: tuple[float, ...], may_overflow: bool, bad: int | None
) -> None:
    watching = watch(may_overflow)
    for step, (loss, norm) in enumerate(zip(losses, norms, strict=True), start=1):
        watching.add(record(step, loss, norm))
    figures, found = watching.take()
    assert found == bad
    if bad is None:
        assert figures["grad_norm"] == 1.5, "of the steps that were made"


def test_figures_of_steps_that_all_overflowed_can_be_stored(tmp_path: Path) -> None:
    watching = watch(may_overflow=True)
    watching.add(record(1, 1.0, norm=float("inf")))
    figures, bad = watching.take()
    assert bad is None
    assert "grad_norm" not in figures
    storage.write_json(f"{tmp_path}/state.json", figures)


def test_losses_by_quartile_are_those_of_the_batch() -> None:
    training = config(steps=6, batch_size=16)
    for of_step in steps(fresh(training), training):
        sums, numbers = of_step.quartile_losses.unbind(1)
        assert numbers.sum() == 16
        assert float(sums.sum() / 16) == pytest.approx(float(of_step.loss), rel=1e-5)
        assert sums[numbers > 0].min() > 0


def test_operations_of_a_network_are_counted_by_hand() -> None:
    network = UNet(
        UNetConfig(base_channels=4, channel_multipliers=[1], blocks_per_level=1), 1, 8, 0
    )
    convolutions = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d)]
    linear = sum(m.weight.numel() for m in network.modules() if isinstance(m, torch.nn.Linear))
    pixels = 64  # of one level, so every convolution has an output of 8 x 8
    attention = 2 * pixels * pixels * 4  # q k^T and its product with v, 4 channels
    by_hand = sum(m.weight.numel() * pixels for m in convolutions) + linear + attention
    assert training_flops(network, (1, 8, 8), 0) == 3 * 2 * by_hand
    assert network.training, "it is left as it was"


def test_the_peak_is_measured() -> None:
    assert 1e8 < measured_peak(CPU, torch.float32) < 1e14


def test_the_slowdown_of_a_precision_is_that_of_the_network_in_it() -> None:
    class Sleeps(torch.nn.Module):
        """Longer in autocast."""

        def __init__(self) -> None:
            super().__init__()
            self.scale = torch.nn.Parameter(torch.ones(()))

        def forward(self, image: torch.Tensor, t: object, label: object) -> torch.Tensor:
            time.sleep(0.3 if torch.is_autocast_enabled("cpu") else 0.03)
            return image * self.scale

    assert slowdown(Sleeps(), (1, 8, 8), 0, torch.bfloat16) > 2
