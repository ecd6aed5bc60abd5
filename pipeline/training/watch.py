"""What is logged of the steps: their losses, the gradient, the speed; and whether they are finite.

Figures stay on the device until `take` asks for them, once for many steps, and are reduced over the
ranks in one go.
"""

import contextlib
import time

import psutil
import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline.device import is_apart, synchronize
from pipeline.training import parallel
from pipeline.training.loop import QUARTILES, StepRecord

BACKWARD = 2
"""A backward pass takes as many times the operations of a forward pass."""


class Watch:
    """The steps since the last `take`.

    Args:
        batch_size: images a step, of all workers together.
        flops_per_image: of training.
        peak: operations a second that this rank's device can do; utilisation is a share of them.
        may_overflow: with float16 the step of a gradient that overflows is left out.
    """

    def __init__(
        self, batch_size: int, flops_per_image: float, peak: float, may_overflow: bool
    ) -> None:
        self.batch_size, self.flops_per_image, self.peak = batch_size, flops_per_image, peak
        self.may_overflow = may_overflow
        self._records: list[StepRecord] = []
        self._since = time.monotonic()
        psutil.cpu_percent()  # it tells what was since the last call, of this thread

    def add(self, record: StepRecord) -> None:
        self._records.append(record)

    def take(self) -> tuple[dict[str, float], int | None]:
        """The figures, and the first step, if any, whose loss or gradient was not finite.

        Both are the same on all ranks; waits for all of them.
        """
        records, self._records = self._records, []
        _, world_size = parallel.rank_and_world_size()
        seconds, self._since = time.monotonic() - self._since, time.monotonic()
        n, last = len(records), records[-1]
        waited = torch.full_like(last.loss, sum(record.waited for record in records) / seconds)
        losses = torch.stack([record.loss for record in records])
        by_quartile = torch.stack([record.quartile_losses for record in records]).sum(0)
        norms = torch.stack([record.grad_norm for record in records])
        mine = torch.cat([losses, waited[None], by_quartile.flatten()])
        of_all = torch.cat([parallel.sum_over_ranks(mine), norms]).cpu()  # the only wait
        losses, waited = of_all[:n] / world_size, of_all[n] / world_size
        by_quartile, norms = of_all[n + 1 : -n].view(QUARTILES, 2), of_all[-n:]

        rate = n * self.batch_size / seconds
        figures = {
            "loss": float(losses.mean()),
            "lr": last.lr,
            "images_per_second": rate,
            "images_per_second_per_worker": rate / world_size,
            "data_wait": float(waited),
            "utilisation": self.flops_per_image * rate / world_size / self.peak,
            **machine_figures(last.loss.device),
        }
        if norms.isfinite().any():  # in float16 all may have overflowed
            figures["grad_norm"] = float(norms[norms.isfinite()].mean())
        sums, numbers = by_quartile.unbind(1)
        for i in numbers.nonzero().flatten().tolist():
            figures[f"loss_quartile_{i + 1}"] = float(sums[i] / numbers[i])
        bad = ~losses.isfinite()
        if not self.may_overflow:
            bad |= ~norms.isfinite()
        first = records[int(bad.nonzero()[0])].step if bad.any() else None
        return figures, first


def machine_figures(device: torch.device) -> dict[str, float]:
    """How busy this rank's node is, since the last call, by the names that MLflow gives them."""
    memory = psutil.virtual_memory()
    figures = {
        "system/cpu_utilization_percentage": psutil.cpu_percent(),
        "system/system_memory_usage_megabytes": memory.used / 1e6,
        "system/system_memory_usage_percentage": memory.percent,
    }
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        figures["system/gpu_0_memory_usage_megabytes"] = (total - free) / 1e6
        figures["system/gpu_0_memory_usage_percentage"] = 100 * (1 - free / total)
        with contextlib.suppress(ModuleNotFoundError):  # NVIDIA's package tells the rest
            figures["system/gpu_0_utilization_percentage"] = float(torch.cuda.utilization(device))
    return figures


def training_flops(network: nn.Module, image_shape: tuple[int, int, int], num_classes: int) -> int:
    """Floating-point operations of a forward and backward pass of one (C, H, W) image."""
    device = next(network.parameters()).device
    image = torch.zeros(1, *image_shape, device=device)
    label = torch.zeros(1, dtype=torch.int64, device=device) if num_classes else None
    was_training = network.training
    # the counter knows no kernel of attention on the CPU, but the products that it is made of
    plain_attention = sdpa_kernel(SDPBackend.MATH)
    with torch.no_grad(), plain_attention, FlopCounterMode(display=False) as counter:
        network.eval()(image, torch.zeros(1, device=device), label)
    network.train(was_training)
    return (1 + BACKWARD) * int(counter.get_total_flops())


def measured_peak(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a product of large square matrices: the best of a few.

    Of one alone where it takes longer than a second, as with a precision that is emulated.
    """
    size = 8192 if is_apart(device) else 1024
    a = torch.ones(size, size, device=device, dtype=dtype)
    best = float("inf")
    for _ in range(4):
        synchronize(device)
        begin = time.monotonic()
        a @ a
        synchronize(device)
        best = min(best, time.monotonic() - begin)
        if best > 1:
            break
    return 2 * size**3 / best


def slowdown(
    network: nn.Module, image_shape: tuple[int, int, int], num_classes: int, dtype: torch.dtype
) -> float:
    """How many times as long as in float32 a network takes, forth and back, with two (C, H, W)
    images: the best of three, or of one that takes longer than a second."""
    device = next(network.parameters()).device
    image, t = torch.zeros(2, *image_shape, device=device), torch.zeros(2, device=device)
    label = torch.zeros(2, dtype=torch.int64, device=device) if num_classes else None
    seconds = []
    for enabled in (False, True):
        best = float("inf")
        for _ in range(3):
            synchronize(device)
            begin = time.monotonic()
            with torch.autocast(device.type, dtype, enabled):
                output = network.eval()(image, t, label)
            output.float().sum().backward()
            synchronize(device)
            best = min(best, time.monotonic() - begin)
            if best > 1:
                break
        seconds.append(best)
    return seconds[1] / seconds[0]
