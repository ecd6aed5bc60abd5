"""What the sampling engine makes of the network's own speed.

    python -m tests.benchmarks.engine [--quick] [--config CONFIG]

Of the network of configs/fashion_mnist.yaml, untrained, on one thread. R(B) is the rows/s of the
bare network with B rows a call, R* the best of them. Then

- efficiency: the useful rows/s of the engine under a saturating mix (10, 20, 50 and 250 steps,
  guided and not, three samplers) as a share of R*, in exact and in fast mode;
- a request alone: one image by the engine in fast mode against the plain loop, same network;
- the scheduler: what a step takes beside its network call.

All arms take turns; medians count.
"""

import argparse
import itertools
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported

import torch

from pipeline.config import load_config
from pipeline.samplers.config import SamplingConfig
from pipeline.samplers.model import Model, ModelSpec, build_model, make_plan
from pipeline.samplers.plan import run_plan
from pipeline.seeding import key, normal
from pipeline.serving.config import Mode
from pipeline.serving.engine import Engine, ImageRequest
from tests.benchmarks import program
from tests.benchmarks.program import CONFIGS, Figure, figure

CONFIG = CONFIGS / "fashion_mnist.yaml"
QUICK_NETWORK = ["network.base_channels=16"]
SIZES = (1, 2, 4, 8, 16, 32)
STEPS, GUIDANCE = (10, 20, 50, 250), (0.0, 1.0)
SAMPLERS: tuple[dict[str, Any], ...] = (
    {"sampler": "ddim"},
    {"sampler": "ancestral"},
    {"sampler": "dpm_solver_pp"},
)
IN_HAND = 48
ALONE = SamplingConfig(steps=50)
GOAL = 0.95


def main() -> None:
    options = program.parser(__doc__)
    options.add_argument("--config", default=str(CONFIG))
    program.run(options, measure, "torch")


def measure(options: argparse.Namespace) -> list[Figure]:
    torch.set_num_threads(1)
    calls, rounds = (3, 2) if options.quick else (25, 7)
    model = untrained(options.config, QUICK_NETWORK if options.quick else [])
    shape = "x".join(map(str, model.spec.image_shape))
    print(f"{Path(options.config).stem}: {shape}, {parameters(model):,} parameters, 1 thread")

    mixes = {mode: Mix(model, mode) for mode in ("exact", "fast")}
    arms: dict[str, Callable[[], float]] = {
        **{f"bare, {size} rows": lambda size=size: bare(model, size, calls) for size in SIZES},
        **{f"engine, {mode}": lambda mix=mix: mix.rate(calls) for mode, mix in mixes.items()},
        "alone, plain loop": lambda: 1 / plain_loop(model),
        "alone, engine": lambda: 1 / alone(model),
        "scheduler": lambda: 1 / mixes["exact"].outside(calls),
    }
    rates = program.rates_in_turn(arms, rounds)
    medians = program.medians(rates)
    print(f"{'':<22}{'rows/s, median (least to most)':>34}")
    for name in [*arms][:-3]:
        print(f"{name:<22}{program.spread(rates[name]):>34}")
    for name in ("alone, plain loop", "alone, engine"):
        print(f"{name:<22}{1 / medians[name]:>12.3f} s an image of {ALONE.steps} steps")
    print(f"a step beside its network call, exact: {1e6 / medians['scheduler']:.0f} µs")
    best = max(SIZES, key=lambda size: medians[f"bare, {size} rows"])
    top = medians[f"bare, {best} rows"]
    bare_name, unit = f"bare network, {best} rows", "rows/s"
    exact, fast = medians["engine, exact"], medians["engine, fast"]
    alone_rates = [medians[f"alone, {how}"] * ALONE.steps for how in ("engine", "plain loop")]
    return [
        figure("engine, exact", exact, top, bare_name, GOAL, unit),
        figure("engine, fast", fast, top, bare_name, GOAL, unit),
        figure("exact mode", exact, fast, "fast mode", GOAL, unit),
        figure("one image alone, fast", *alone_rates, "the plain loop", GOAL, unit),
    ]


def untrained(path: str, overrides: Sequence[str] = ()) -> Model:
    config = load_config(path, list(overrides))
    spec = ModelSpec(
        network=config.network,
        diffusion=config.diffusion,
        channels=config.data.channels,
        image_size=config.data.image_size,
        class_names=[str(i) for i in range(10)],
        has_null_label=True,
    )
    torch.manual_seed(0)
    weights = {
        name: 0.02 * torch.randn_like(tensor) if tensor.ndim > 1 else tensor
        for name, tensor in spec.make_network().state_dict().items()
    }
    return build_model(spec, weights, "")


def parameters(model: Model) -> int:
    return sum(parameter.numel() for parameter in model.network.parameters())


def bare(model: Model, size: int, calls: int) -> float:
    """Rows/s of the network alone."""
    x = torch.randn(size, *model.spec.image_shape)
    t, alpha_bar = torch.full((size,), 500.0).double(), torch.full((size,), 0.5).double()
    labels = torch.arange(size) % 10
    model.output(x, t, alpha_bar, labels)
    begin = time.perf_counter()
    for _ in range(calls):
        model.output(x, t, alpha_bar, labels)
    return size * calls / (time.perf_counter() - begin)


class Mix:
    """An engine that always has images of all kinds in hand."""

    def __init__(self, model: Model, mode: Mode) -> None:
        self.engine = Engine(model, mode)
        kinds = itertools.product(STEPS, GUIDANCE, SAMPLERS)
        self.kinds = itertools.cycle(
            [SamplingConfig(steps=n, guidance=w, **sampler) for n, w, sampler in kinds]
        )
        self.numbers = itertools.count()

    def fill(self) -> None:
        while self.engine.num_images < IN_HAND:
            number = next(self.numbers)
            self.engine.add(ImageRequest(0, number, number % 10, next(self.kinds)))

    def rate(self, calls: int) -> float:
        """Useful rows/s; what is added is part of it."""
        self.fill()
        rows, begin = self.engine.num_useful_rows, time.perf_counter()
        for _ in range(calls):
            self.engine.step()
            self.fill()
        return (self.engine.num_useful_rows - rows) / (time.perf_counter() - begin)

    def outside(self, calls: int) -> float:
        """The seconds of a step that are not in the network's call."""
        model, inside = self.engine.model, 0.0
        output = model.output

        def timed(*arguments: Any) -> Any:
            nonlocal inside
            begin = time.perf_counter()
            found = output(*arguments)
            inside += time.perf_counter() - begin
            return found

        self.fill()
        object.__setattr__(model, "output", timed)  # a frozen dataclass; of this object alone
        try:
            begin = time.perf_counter()
            for _ in range(calls):
                self.engine.step()
                self.fill()
            seconds = time.perf_counter() - begin
        finally:
            object.__delattr__(model, "output")
        return (seconds - inside) / calls


def plain_loop(model: Model) -> float:
    """Seconds for one image."""
    plan, label = make_plan(model, ALONE), torch.tensor([3])
    begin = time.perf_counter()
    x_T = normal([key(0, "sample", 0, 0)], model.spec.image_shape)
    run_plan(plan, lambda x, t, a: model.predict_x_0(x, t, a, label), x_T, lambda i: x_T)
    return time.perf_counter() - begin


def alone(model: Model) -> float:
    engine = Engine(model, "fast")
    begin = time.perf_counter()
    engine.draw([ImageRequest(0, 0, 3, ALONE)])
    return time.perf_counter() - begin


if __name__ == "__main__":
    main()
