"""From which size of network on a CPU computes a training step faster in bfloat16.

    python -m tests.benchmarks.precision [--quick]

A forward and backward pass of networks of growing size, in float32 and in bfloat16 in turn, on one
thread. Where it crosses 1 stands `LEAST_CPU_FLOPS` of pipeline/training/precision.py.
"""

import argparse
from functools import partial

import torch
from torch import Tensor, nn

from pipeline.config import load_config
from pipeline.samplers.model import ModelSpec
from pipeline.training.precision import LEAST_CPU_FLOPS, computes_natively
from pipeline.training.watch import training_flops
from tasks.stages.train_worker import model_spec
from tests.benchmarks import program
from tests.benchmarks.program import Figure, figure, in_turn, medians

NETWORKS = {"digits": (16, 32, 64), "fashion_mnist": (16, 32)}
"""Base channels by config."""
BATCHES = (8, 32, 128)
ROUNDS, QUICK_ROUNDS = 15, 2


def main() -> None:
    program.run(program.parser(__doc__), measure, "torch")


def measure(options: argparse.Namespace) -> list[Figure]:
    if not computes_natively(torch.device("cpu"), "bfloat16"):
        print("this CPU emulates bfloat16: auto takes float32 for every network")
    torch.set_num_threads(1)
    rounds = QUICK_ROUNDS if options.quick else ROUNDS
    print(f"auto takes float32 below {LEAST_CPU_FLOPS / 1e6:.0f} MFLOP an image\n")
    print(f"{'':<32}{'rows':>5}{'MFLOP':>8}{'ms float32':>12}{'ms bfloat16':>13}{'ratio':>7}")
    results = []
    networks = [(config, channels) for config, of in NETWORKS.items() for channels in of]
    for config, channels in networks:
        spec = spec_of(config, channels)
        network = spec.make_network()
        flops = training_flops(network, spec.image_shape, spec.num_classes)
        what = f"{config}, {channels} channels"
        for rows in BATCHES[1:2] if options.quick else BATCHES:
            images = torch.randn(rows, *spec.image_shape)
            arms = {half: partial(step, network, images, half) for half in (False, True)}
            for arm in arms.values():
                arm()
            found = medians(in_turn(arms, rounds))
            ms = {half: 1e3 * seconds for half, seconds in found.items()}
            results.append(
                figure(
                    f"bfloat16, {what} of {flops / 1e6:.0f} MFLOP an image, {rows} rows",
                    ms[True],
                    ms[False],
                    "float32",
                    unit="ms",
                    less_is_better=True,
                )
            )
            print(
                f"{what:<32}{rows:>5}{flops / 1e6:>8.1f}{ms[False]:>12.1f}{ms[True]:>13.1f}"
                f"{ms[False] / ms[True]:>7.2f}",
                flush=True,
            )
    return results


def spec_of(config: str, channels: int) -> ModelSpec:
    sets = [f"network.base_channels={channels}"]
    classes = [str(i) for i in range(10)]
    return model_spec(load_config(str(program.CONFIGS / f"{config}.yaml"), sets), classes)


def step(network: nn.Module, images: Tensor, half: bool) -> None:
    rows = len(images)
    with torch.autocast("cpu", torch.bfloat16, half):
        out = network(images, torch.arange(rows), torch.arange(rows) % 10)
    out.float().square().mean().backward()


if __name__ == "__main__":
    main()
