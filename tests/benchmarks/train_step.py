"""How fast a training step is, beside the same step with Hugging Face's diffusers.

    python -m tests.benchmarks.train_step [--quick] [--threads 1 2] [--precisions float32 bfloat16]
    python -m tests.benchmarks.train_step --profile [--quick] [--threads 1]

A step is a batch, its noise and timesteps, forward, backward, clipping, AdamW and the EMA. Ours is
what pipeline/training/loop.py does with batches out of memory, made in the step. The peer is
diffusers' `UNet2DModel` in the loop of its example of unconditional training, on images that are
ready for it: at its defaults, attention heads of 8 channels among them, and with whatever makes it
faster: one head, AdamW fused, the EMA over all weights at once, with channels last or without.

Both networks have the same levels, blocks, widths and attention. The peer takes its timestep in by
scale and shift, as ours does, since parameters and the FLOP of forward and backward must agree
within 3 %, or nothing is measured. FLOP are those of attention written out as matrix products, for
both. All arms live in one process and take their steps in turn; medians count.

The floor is the 3x3 convolutions of our network, each alone, forward and backward, in its better
memory format: the rate of the fastest of them is the peak that a step's rate is a share of, and
their times together are what the step would take if it were nothing else.

denoising-diffusion-pytorch imports torchvision, so where that cannot be imported beside torch, it
cannot either; --peers is an interpreter to try, by default this one. It is not measured elsewhere
either: with the same widths it has 13 to 19 % fewer parameters and 9 to 20 % fewer FLOP.

--profile shows the share of each operator in the steps of ours and of the peer. --quick takes
smaller images and batches, and its ratios say nothing.

The ratio of the last figure of a size is the share of the peak.
"""

import argparse
import itertools
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode

from pipeline.data.batches import Batches, FullShuffle
from pipeline.diffusion.config import DiffusionConfig
from pipeline.diffusion.schedules import make_schedule
from pipeline.networks.config import UNetConfig
from pipeline.networks.unet import DoublingConv2d, UNet, double
from pipeline.training.config import TrainingConfig
from pipeline.training.inputs import draw_inputs
from pipeline.training.loop import make_state, train
from tests.benchmarks import program
from tests.benchmarks.processes import Failed
from tests.benchmarks.program import Figure, figure, in_turn

CPU = torch.device("cpu")
NUM_IMAGES = 2048
WARM_UP = 3
"""Steps before the clock; in the first AdamW makes its moments, oneDNN its kernels."""
ROUNDS = 25
LARGEST_DIFFERENCE = 0.03
GOAL_DEFAULTS, GOAL_BEST, GOAL_PEAK = 1.5, 1.2, 0.5

DEFAULTS = "diffusers, defaults"


@dataclass(frozen=True)
class Size:
    """What both sides train: images, and the widths of a network with levels of 1, 2, 2."""

    image_size: int
    channels: int
    base: int
    batch: int
    multipliers: tuple[int, ...] = (1, 2, 2)
    blocks: int = 2

    def __str__(self) -> str:
        side = self.image_size
        return f"{side}x{side}x{self.channels}, base {self.base}, batch {self.batch}"


SIZES = (Size(28, 1, 32, 32), Size(32, 3, 64, 16))
QUICK_SIZES = (Size(28, 1, 32, 2), Size(16, 3, 64, 2))
PRECISIONS = ("float32", "bfloat16")

Step = Callable[[], Any]
"""Does one training step."""


def main() -> None:
    options = program.parser(__doc__)
    options.add_argument("--threads", type=int, nargs="+", help="1 2; quick: 1")
    options.add_argument("--precisions", choices=PRECISIONS, nargs="+", default=PRECISIONS)
    options.add_argument("--rounds", type=int, help=f"steps of each arm ({ROUNDS}; quick: 1)")
    options.add_argument("--peers", metavar="PYTHON", default=sys.executable)
    options.add_argument("--profile", action="store_true", help="the share of each operator")
    program.run(options, measure, "torch", "diffusers")


def measure(options: argparse.Namespace) -> list[Figure]:
    if not options.profile:
        print(f"not measured: denoising-diffusion-pytorch: {why_not_lucidrains(options.peers)}")
    quick = options.quick
    rounds = options.rounds or (1 if quick else ROUNDS)
    threads_of = options.threads or ([1] if quick else [1, 2])
    results = []
    for size in QUICK_SIZES if quick else SIZES:
        flop = check_equal(size)
        for threads, precision in itertools.product(threads_of, options.precisions):
            torch.set_num_threads(threads)
            what = f"{size}, {precision}, {threads} thread{'s' * (threads > 1)}"
            print(f"\n{what}; load {os.getloadavg()[0]:.2f}", flush=True)
            arms = make_arms(size, precision, 1 if quick else WARM_UP)
            if options.profile:
                show_operators(arms, rounds)
            else:
                results += compare(what, arms, size, precision, flop, rounds)
    return results


def why_not_lucidrains(python: str) -> str:
    """What keeps denoising-diffusion-pytorch from being compared."""
    command = [python, "-c", "import denoising_diffusion_pytorch"]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        return done.stderr.strip().splitlines()[-1]
    return "with the same widths, its FLOP and parameters differ by more than 3 %"


# --- both sides ---------------------------------------------------------------------------------


def make_network(size: Size) -> UNet:
    config = UNetConfig(
        base_channels=size.base,
        channel_multipliers=list(size.multipliers),
        blocks_per_level=size.blocks,
        attention_at=[size.image_size // 2],
    )
    return UNet(config, size.channels, size.image_size, num_classes=0)


def ours(size: Size, precision: Any) -> Step:
    network = make_network(size)
    diffusion = DiffusionConfig()
    config = TrainingConfig(
        steps=10**9, batch_size=size.batch, lr=1e-4, precision=precision, label_dropout=0.0
    )
    shape = (NUM_IMAGES, size.image_size, size.image_size, size.channels)
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    batches = Batches(FullShuffle(images, np.zeros(NUM_IMAGES, np.int64), 0, size.batch))
    # not ahead, which would take another core
    inputs = (draw_inputs(batches.at(step), 0, 0) for step in itertools.count())
    steps = train(
        make_state(network, config, diffusion.timesteps),
        network,
        inputs,
        diffusion,
        make_schedule(diffusion),
        config,
        seed=0,
        device=CPU,
    )
    return lambda: next(steps)


def make_peer(size: Size, head_channels: int | None = 8) -> nn.Module:
    from diffusers import UNet2DModel

    widths = tuple(size.base * multiplier for multiplier in size.multipliers)
    model: nn.Module = UNet2DModel(
        sample_size=size.image_size,
        in_channels=size.channels,
        out_channels=size.channels,
        block_out_channels=widths,
        layers_per_block=size.blocks,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=head_channels,
        resnet_time_scale_shift="scale_shift",
    )
    return model


def diffusers(
    size: Size, precision: str, fast: bool = False, memory_format: Any = torch.contiguous_format
) -> Step:
    """A step of the example of unconditional training; `fast`: with what the example leaves out."""
    from diffusers import DDPMScheduler
    from diffusers.optimization import get_scheduler
    from diffusers.training_utils import EMAModel

    one_head = size.base * size.multipliers[-1]
    model = make_peer(size, one_head if fast else 8).to(memory_format=memory_format)
    noise_scheduler = DDPMScheduler(num_train_timesteps=1000)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, fused=fast or None
    )
    lr_scheduler = get_scheduler(
        "cosine", optimizer, num_warmup_steps=500, num_training_steps=100_000
    )
    ema = EMAModel(
        model.parameters(), 0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75, foreach=fast
    )
    shape = (size.batch, size.channels, size.image_size, size.image_size)
    batches = itertools.cycle(torch.rand(16, *shape) * 2 - 1)

    def step() -> float:
        images = next(batches)
        noise = torch.randn(images.shape)
        t = torch.randint(0, noise_scheduler.config.num_train_timesteps, (len(images),))
        noisy = noise_scheduler.add_noise(images, noise, t).contiguous(memory_format=memory_format)
        with torch.autocast("cpu", torch.bfloat16, precision == "bfloat16"):
            output = model(noisy, t).sample
        loss = F.mse_loss(output.float(), noise)
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        lr_scheduler.step()
        optimizer.zero_grad()
        ema.step(model.parameters())
        return float(loss.detach())  # the example shows it

    return step


def make_arms(size: Size, precision: str, warm_up: int) -> dict[str, Step]:
    """All sides by name, after so many steps."""
    last = torch.channels_last
    arms = {
        "ours": ours(size, precision),
        DEFAULTS: diffusers(size, precision),
        "diffusers, one head, fused": diffusers(size, precision, True),
        "diffusers, one head, fused, channels last": diffusers(size, precision, True, last),
    }
    for arm in arms.values():
        for _ in range(warm_up):
            arm()
    return arms


# --- equal work ---------------------------------------------------------------------------------


def work(network: nn.Module, size: Size) -> tuple[int, int]:
    """(FLOP of forward and backward of a batch, parameters)."""
    image = torch.randn(size.batch, size.channels, size.image_size, size.image_size)
    t = torch.randint(0, 1000, (size.batch,))
    # the counter knows no kernel of attention on the CPU, but the products that it is made of
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        output = network(image, t)
        (output if isinstance(output, Tensor) else output.sample).square().mean().backward()
    return counter.get_total_flops(), sum(p.numel() for p in network.parameters())


def spelled_out(network: nn.Module) -> nn.Module:
    """The network with its doubled images made and convolved, as the peer's are."""
    for layer in network.modules():
        if isinstance(layer, DoublingConv2d):
            layer.forward = partial(_convolve_doubled, layer)  # type: ignore[method-assign]
    return network


def _convolve_doubled(layer: DoublingConv2d, x: Tensor) -> Tensor:
    return F.conv2d(double(x), layer.weight, layer.bias, padding=1)


def check_equal(size: Size) -> int:
    """The FLOP of our step.

    What is compared is the same network written down in the same way.

    Raises:
        Failed: the peer's are others, or its parameters.
    """
    flop, _ = work(make_network(size), size)
    written, theirs = work(spelled_out(make_network(size)), size), work(make_peer(size), size)
    print(
        f"\n{size}: ours {written[0] / 1e9:.2f} GFLOP a step, {written[1]:,} parameters; "
        f"diffusers {theirs[0] / 1e9:.2f} GFLOP, {theirs[1]:,} parameters; "
        f"with convolutions of doubled images folded, ours does {flop / 1e9:.2f} GFLOP"
    )
    for mine, other in zip(written, theirs, strict=True):
        if abs(other / mine - 1) > LARGEST_DIFFERENCE:
            raise Failed(f"{mine:,} and {other:,} differ by more than {LARGEST_DIFFERENCE:.0%}")
    return flop


# --- the floor ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shape:
    """A 3x3 convolution."""

    in_channels: int
    out_channels: int
    image_size: int
    """Of its input."""
    stride: int

    def flop(self, batch: int) -> int:
        """Of forward, the input's gradient and the weights'."""
        taps = 9 * (self.image_size // self.stride) ** 2
        return 3 * 2 * batch * self.in_channels * self.out_channels * taps


def convolutions(size: Size) -> dict[Shape, int]:
    """How often our network has each 3x3 convolution."""
    found: dict[Shape, int] = {}

    def count(layer: nn.Conv2d, inputs: tuple[Tensor], _: Tensor) -> None:
        side = inputs[0].shape[3] * (2 if isinstance(layer, DoublingConv2d) else 1)
        shape = Shape(layer.in_channels, layer.out_channels, side, layer.stride[0])
        found[shape] = found.get(shape, 0) + 1

    network = make_network(size)
    for layer in network.modules():
        if isinstance(layer, nn.Conv2d) and layer.kernel_size == (3, 3):
            layer.register_forward_hook(count)  # type: ignore[arg-type]
    image = torch.zeros(1, size.channels, size.image_size, size.image_size)
    network(image, torch.zeros(1))
    return found


def convolve(shape: Shape, batch: int, dtype: torch.dtype, memory_format: Any) -> Step:
    """Forward and backward of one convolution."""
    side, kernel = shape.image_size, (shape.out_channels, shape.in_channels, 3, 3)
    image = torch.randn(batch, shape.in_channels, side, side, dtype=dtype)
    image, weight = (
        tensor.contiguous(memory_format=memory_format).requires_grad_()
        for tensor in (image, torch.randn(kernel, dtype=dtype))
    )
    bias = torch.randn(shape.out_channels, dtype=dtype, requires_grad=True)
    gradient = torch.randn_like(F.conv2d(image, weight, bias, shape.stride, 1))

    def step() -> None:
        out = F.conv2d(image, weight, bias, shape.stride, 1)
        torch.autograd.grad(out, (image, weight, bias), gradient)

    return step


def measure_floor(size: Size, precision: str, rounds: int) -> tuple[float, float]:
    """(FLOP/s of the fastest 3x3 convolution, seconds of all of them) of a step."""
    dtype = getattr(torch, precision)
    found = convolutions(size)
    arms = {
        (shape, memory_format): convolve(shape, size.batch, dtype, memory_format)
        for shape in found
        for memory_format in (torch.contiguous_format, torch.channels_last)
    }
    seconds = in_turn(arms, rounds)
    peak, total = 0.0, 0.0
    for shape, count in found.items():
        best = min(
            statistics.median(seconds[shape, memory_format])
            for memory_format in (torch.contiguous_format, torch.channels_last)
        )
        peak = max(peak, shape.flop(size.batch) / best)
        total += count * best
    return peak, total


# --- measuring ----------------------------------------------------------------------------------


def compare(
    what: str, arms: dict[str, Step], size: Size, precision: str, flop: int, rounds: int
) -> list[Figure]:
    seconds = in_turn(arms, rounds)
    peak, convolutions_alone = measure_floor(size, precision, rounds)
    medians = program.medians(seconds)
    print(f"  {'median (least to most)':<44}{'s a step':<26}{'images/s':>9}{'GFLOP/s':>9}")
    for name, of in seconds.items():
        cell = program.spread(of, 3)
        rate = size.batch / medians[name]
        print(f"  {name:<44}{cell:<26}{rate:>9.1f}{flop / medians[name] / 1e9:>9.0f}")
    print(
        f"  {'the 3x3 convolutions alone':<44}{convolutions_alone:<26.3f}"
        f"{size.batch / convolutions_alone:>9.1f}; the fastest {peak / 1e9:.0f} GFLOP/s"
    )
    best = min((name for name in medians if name != "ours"), key=lambda name: medians[name])
    rates = {name: size.batch / seconds for name, seconds in medians.items()}
    step = f"training step, {what}"
    return [
        figure(step, rates["ours"], rates[DEFAULTS], DEFAULTS, GOAL_DEFAULTS),
        figure(step, rates["ours"], rates[best], best, GOAL_BEST),
        figure(
            step,
            flop / medians["ours"] / 1e9,
            peak / 1e9,
            "the fastest of its 3x3 convolutions alone",
            GOAL_PEAK,
            "GFLOP/s",
        ),
    ]


def show_operators(arms: dict[str, Step], rounds: int) -> None:
    """Print the share of each operator in a step of each arm, by its own time on the CPU."""
    columns: dict[str, dict[str, float]] = {}
    for name, arm in itertools.islice(arms.items(), 3):  # channels last runs the same operators
        with profile(activities=[ProfilerActivity.CPU]) as profiler:
            begin = time.perf_counter()
            for _ in range(rounds):
                arm()
            total = 1e6 * (time.perf_counter() - begin)
        of = {event.key: event.self_cpu_time_total for event in profiler.key_averages()}
        shares = {key: value / total for key, value in of.items()}
        columns[name] = {**shares, "outside of torch": 1 - sum(shares.values())}
        print(f"  {total / rounds / 1e6:.3f} s a step with the profiler: {name}")
    keys = sorted({key for of in columns.values() for key in of})
    keys.sort(key=lambda key: -max(of.get(key, 0.0) for of in columns.values()))
    print(f"  {'share of the step':<58}" + "".join(f"{name:>28}" for name in columns))
    for key in keys[:24]:
        cells = "".join(f"{of.get(key, 0.0):>28.1%}" for of in columns.values())
        print(f"  {key:<58}{cells}")


if __name__ == "__main__":
    main()
