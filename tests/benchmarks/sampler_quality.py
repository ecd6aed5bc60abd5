"""How good the samples of each sampler are for how many evaluations of the network.

    python -m tests.benchmarks.sampler_quality MODEL
    python -m tests.benchmarks.sampler_quality --quick [MODEL]

MODEL is a checkpoint's folder, the folder of a finished training, or NAME@ALIAS, as `ddpm run`
leaves them; without one --quick trains a small network on digits first. Quality is the
Fréchet distance between the samples and the real training images in the feature space of the
judge, the classifier of pipeline/evaluation/features.py; so the figures compare with each other and
with no published FID. They are biased upwards by the number of samples, which is the same for all:
the distance of as many real images is shown beside them. Class accuracy is the judge's, too.

Every sampler draws the same images of the same seeds, with the most steps that need at most so many
evaluations. With one seed ± is the standard deviation over bootstrap resamples of the samples; with
several, figures are means over the seeds and ± is the mean's standard error. The sampler that is
best at 20 evaluations is compared with ancestral sampling; since it is chosen by the same figures,
a lead within ± says little.
"""

import argparse
import os
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from pipeline import storage
from pipeline.config import load_config
from pipeline.data.parts import images_at
from pipeline.data.shards import ImageSet
from pipeline.errors import RequestError
from pipeline.evaluation.extractors import CLASSIFIER, Extractor, by_classifier, load_classifier
from pipeline.evaluation.features import TrainedClassifier, train_classifier
from pipeline.evaluation.frechet import Gaussian, fit_gaussian, frechet_distance
from pipeline.loading import load_model
from pipeline.registry.versions import read_tag, resolve
from pipeline.samplers.config import SamplingConfig, check_sampling
from pipeline.samplers.model import SOLVERS, Model, make_plan
from pipeline.serving.engine import Engine, ImageRequest
from pipeline.training.checkpoint import checkpoint_name
from tests.benchmarks import program
from tests.benchmarks.own_ray import run_stage, started_ray
from tests.benchmarks.processes import Failed
from tests.benchmarks.program import CONFIGS, Figure, figure

SAMPLERS: dict[str, dict[str, Any]] = {
    "ancestral": {"sampler": "ancestral"},
    "ddim": {"sampler": "ddim"},
    "euler": {"sampler": "euler"},
    "heun": {"sampler": "heun"},
    "dpm_solver 2": {"sampler": "dpm_solver", "order": 2},
    "dpm_solver_pp 2M": {"sampler": "dpm_solver_pp", "order": 2},
    "dpm_solver_pp 3M": {"sampler": "dpm_solver_pp", "order": 3},
    "dpm_solver_pp 2M SDE": {"sampler": "dpm_solver_pp", "order": 2, "stochastic": True},
    "pndm": {"sampler": "pndm"},
    "unipc": {"sampler": "unipc", "order": 2},
    "deis": {"sampler": "deis", "order": 2},
    "euler_maruyama": {"sampler": "euler_maruyama"},
}
EVALUATIONS = (5, 10, 20, 50, 100)
COMPARED_AT = 20
GOAL = 1 / 1.05
"""Within 5 % of ancestral sampling."""
NUM_RESAMPLES = 40
SMALL = [
    "network.base_channels=8",
    "training.steps=40",
    "training.log_every=20",
    "training.checkpoint_every=40",
    "training.warmup_steps=5",
    "evaluation.during_training=0",
]
"""What makes configs/digits.yaml small."""


@dataclass(frozen=True)
class Judge:
    """The classifier, and the real training images in its feature space."""

    classifier: TrainedClassifier
    extractor: Extractor
    real: Gaussian

    def distance(self, of: Tensor) -> float:
        return frechet_distance(fit_gaussian(of), self.real)


@dataclass(frozen=True)
class Result:
    """One sampler with a number of network evaluations an image."""

    name: str
    asked: int
    evaluations: int
    distance: float
    """The mean over the seeds."""
    spread: np.ndarray
    """Of each seed or, when there is one, of each bootstrap resample: its distance."""
    num_seeds: int
    accuracy: float
    seconds: float

    @property
    def deviation(self) -> float:
        return uncertainty(self.spread, self.num_seeds)


def uncertainty(spread: np.ndarray, num_seeds: int) -> float:
    """The standard deviation of one seed's figure, or the standard error of several seeds' mean."""
    return float(spread.std(ddof=1) / num_seeds**0.5)


def main() -> None:
    program.run(parser(), measure_all, "torch")


def measure_all(options: argparse.Namespace) -> list[Figure]:
    complete(options)
    if options.model:
        return compare_samplers(options)
    if not options.quick:
        raise Failed("a MODEL is missing: `ddpm run configs/digits.yaml` makes digits@champion")
    with tempfile.TemporaryDirectory() as options.storage:
        options.model = train_small(options.storage)
        return compare_samplers(options)


def train_small(folder: str) -> str:
    """A network that has seen digits for some steps; the output of the stage `train`."""
    config = load_config(str(CONFIGS / "digits.yaml"), [*SMALL, f"storage={folder}"])
    with started_ray(config.cluster.min_workers + 1):  # and a preview
        return run_stage(config, "train")


def compare_samplers(options: argparse.Namespace) -> list[Figure]:
    torch.set_num_threads(options.threads)
    uri, tracking_uri, shard_set = locate(options)
    model = load_model(uri, tracking_uri)
    judge, train, holdout = make_judge(options, shard_set, model.spec.num_classes)
    n, spec = options.n, model.spec
    print(
        f"{options.model}: {n} images of {spec.image_shape} a seed, "
        f"seeds {' '.join(map(str, options.seeds))}, guidance {options.guidance:g}, "
        f"{spec.diffusion.schedule} schedule, prediction {spec.diffusion.prediction}\n"
        f"judge: {judge.classifier.holdout_accuracy:.1%} right on {judge.classifier.holdout_n} "
        f"images held out; features of {len(train)} training images\n"
        f"{options.threads} threads, load {os.getloadavg()[0]:.2f}"
    )
    floor = real_distances(judge, train, holdout, n)
    results = []
    for name, asked, sampling in arms(model, options):
        result = measure(model, judge, name, asked, sampling, options)
        print(
            f"{name:<26} {result.evaluations:>4} evaluations: {show(result)}, "
            f"{result.seconds:.0f} s",
            flush=True,
        )
        results.append(result)

    print()
    print_table(results)
    if options.no_reference:
        return []
    reference = next(r for r in results if r.asked == options.reference)
    for what, distance in floor.items():
        print(f"{what:<26} {distance:8.2f}")
    out = options.out or Path(options.storage) / "sampler_quality.png"
    draw_curves(results, reference, floor, out)
    print(f"curves in {out}; load {os.getloadavg()[0]:.2f}")
    return [compare(results, reference)]


def parser() -> argparse.ArgumentParser:
    made = program.parser(__doc__)
    made.add_argument("model", nargs="?", help="a folder, or NAME@ALIAS")
    made.add_argument("-n", type=int, help="images a sampler (2000; quick: 100)")
    made.add_argument(
        "--evaluations", type=int, nargs="+", help=f"of the network, {COMPARED_AT} among them"
    )
    made.add_argument("--guidance", type=float, default=0.0)
    made.add_argument("--spacing", nargs="+", help="one or more; trailing")
    made.add_argument("--only", nargs="+", choices=SAMPLERS, help="these; all")
    made.add_argument("--no-reference", action="store_true", help="no ancestral sampling")
    made.add_argument("--seeds", type=int, nargs="+", default=[0])
    made.add_argument("--threads", type=int, default=2)
    made.add_argument("--rows", type=int, default=256, help="of a network call")
    made.add_argument("--storage", default="runs", help="where the stages' outputs lie")
    made.add_argument("--shards", help="the ShardSet's folder, if the model does not say")
    made.add_argument("--tracking", default="sqlite:///mlflow.db")
    made.add_argument("--judge-epochs", type=int, help="if there is no judge yet (30; quick: 2)")
    made.add_argument("--out", type=Path, help="PNG (STORAGE/sampler_quality.png)")
    return made


def complete(options: argparse.Namespace) -> None:
    """What was not given."""
    options.n = options.n or (100 if options.quick else 2000)
    options.judge_epochs = options.judge_epochs or (2 if options.quick else 30)
    if options.evaluations is None:
        options.evaluations = (5, COMPARED_AT) if options.quick else EVALUATIONS
    elif COMPARED_AT not in options.evaluations:
        raise Failed(f"--evaluations must have {COMPARED_AT}, where samplers are compared")
    options.reference = 100 if options.quick else 1000


# --- the model and its judge --------------------------------------------------------------------


def locate(options: argparse.Namespace) -> tuple[str, str | None, str]:
    """(what load_model takes, the registry's URI, the ShardSet it was trained on)."""
    folder = Path(options.model)
    tracking_uri, shard_set_id = None, None
    if folder.is_dir():
        manifest = storage.read_manifest(str(folder))
        if manifest is not None and manifest.stage == "train":
            uri = str(folder / checkpoint_name(manifest.stats["step"]))
        else:
            uri, manifest = str(folder), storage.read_manifest(str(folder.absolute().parent))
        shard_set_id = manifest.inputs.get("preprocess") if manifest else None
    else:
        reference = resolve(options.model, options.tracking)
        uri, tracking_uri = reference.uri, options.tracking
        shard_set_id = read_tag(reference, "ddpm.shard_set_id")
    if options.shards:
        return uri, tracking_uri, options.shards
    if shard_set_id is None:
        raise Failed(f"{options.model} does not name its ShardSet: give --shards FOLDER")
    return uri, tracking_uri, storage.join(options.storage, "preprocess", shard_set_id)


def make_judge(
    options: argparse.Namespace, shard_set: str, num_classes: int
) -> tuple[Judge, ImageSet, ImageSet]:
    """The judge that the run made of the same images, or a new one; and the images."""
    manifest = storage.read_manifest(shard_set)
    if manifest is None:
        raise Failed(f"there is no complete ShardSet at {shard_set}")
    counts = manifest.stats["num_images"]
    train, holdout = (
        images_at(shard_set, split, np.arange(counts[split])) for split in ("train", "holdout")
    )
    classifier = None
    parent = storage.join(options.storage, "reference")
    for name in storage.list_names(parent):
        there = storage.read_manifest(storage.join(parent, name))
        if (
            there
            and CLASSIFIER[0] in [entry.path for entry in there.files]
            and there.inputs.get("preprocess") == manifest.id
        ):
            classifier = load_classifier(storage.join(parent, name))
    if classifier is None:
        if num_classes < 2:
            raise Failed("a model without classes has no judge to measure it with")
        print(f"training a judge, {options.judge_epochs} epochs ...", flush=True)
        classifier = train_classifier(train, holdout, num_classes, 0, options.judge_epochs)
    extractor = by_classifier("judge", "", classifier)
    real = fit_gaussian(extractor(train.images).features)
    return Judge(classifier, extractor, real), train, holdout


def real_distances(judge: Judge, train: ImageSet, holdout: ImageSet, n: int) -> dict[str, float]:
    """What real images score: the floor, which is above 0 for a finite number of them."""
    found = {}
    rows = np.random.default_rng(0).permutation(len(train))[:n]
    for what, images in (("training", train.images[rows]), ("held-out", holdout.images[:n])):
        of = judge.extractor(images).features
        if len(of) > of.shape[1]:
            found[f"{len(of)} real {what} images"] = judge.distance(of)
    return found


# --- drawing and measuring ----------------------------------------------------------------------


def arms(model: Model, options: argparse.Namespace) -> list[tuple[str, int, SamplingConfig]]:
    """(name, evaluations asked for, sampling) of all that is to be measured."""
    reference = min(options.reference, model.schedule.timesteps)
    options.reference = reference
    ancestral = SamplingConfig(sampler="ancestral", steps=reference, guidance=options.guidance)
    found = [] if options.no_reference else [("ancestral", reference, ancestral)]
    for label in options.only or SAMPLERS:
        settings = SAMPLERS[label]
        if settings["sampler"] not in SOLVERS:
            print(f"{label}: skipped, it is not among the samplers")
            continue
        for spacing in options.spacing or ["trailing"]:
            name = label if spacing == "trailing" else f"{label}, {spacing}"
            for asked in options.evaluations:
                if (name, asked) == ("ancestral", reference):
                    continue
                base = {**settings, "spacing": spacing, "guidance": options.guidance}
                try:
                    found.append((name, asked, with_evaluations(model, base, asked)))
                except RequestError as error:
                    print(f"{name} with {asked} evaluations: skipped, {error}")
    return found


def with_evaluations(model: Model, settings: dict[str, Any], evaluations: int) -> SamplingConfig:
    """`settings` with the most steps whose plan has at most so many rows."""
    for steps in range(min(evaluations, model.schedule.timesteps), 0, -1):
        sampling = SamplingConfig.model_validate({**settings, "steps": steps})
        check_sampling(model.spec.diffusion, sampling)
        if len(make_plan(model, sampling)) <= evaluations:
            return sampling
    raise RequestError(f"no number of steps needs at most {evaluations}")


def measure(
    model: Model,
    judge: Judge,
    name: str,
    asked: int,
    sampling: SamplingConfig,
    options: argparse.Namespace,
) -> Result:
    num_classes = model.spec.num_classes
    labels = [i % num_classes for i in range(options.n)]
    engine = Engine(model, "fast", options.rows)
    distances, accuracies = [], []
    begin = time.monotonic()
    for seed in options.seeds:
        pixels = engine.draw([ImageRequest(seed, i, k, sampling) for i, k in enumerate(labels)])
        of, log_probs = judge.extractor(pixels)
        assert log_probs is not None  # it is a classifier
        distances.append(judge.distance(of))
        accuracies.append(float((log_probs.argmax(1) == torch.tensor(labels)).double().mean()))
    seconds = time.monotonic() - begin
    spread = distances if len(distances) > 1 else bootstrap(judge, of)
    return Result(
        name,
        asked,
        len(make_plan(model, sampling)),
        float(np.mean(distances)),
        np.array(spread),
        len(distances),
        float(np.mean(accuracies)),
        seconds,
    )


def bootstrap(judge: Judge, of: Tensor) -> list[float]:
    """The same resamples for every sampler, so that ratios of two of them are paired."""
    rng = np.random.default_rng(0)
    return [judge.distance(of[rng.integers(0, len(of), len(of))]) for _ in range(NUM_RESAMPLES)]


def compare(results: list[Result], reference: Result) -> Figure:
    """The best sampler at COMPARED_AT evaluations against the reference."""
    best = min((r for r in results if r.asked == COMPARED_AT), key=lambda r: r.distance)
    ratio_error = uncertainty(reference.spread / best.spread, best.num_seeds)
    print(
        f"best at {COMPARED_AT} evaluations: {best.name}, {show(best)}; ancestral with "
        f"{reference.evaluations}: {show(reference)}; ratio "
        f"{reference.distance / best.distance:.3f} ± {ratio_error:.3f}"
    )
    return figure(
        f"Fréchet distance at {COMPARED_AT} network evaluations, best sampler: {best.name}",
        best.distance,
        reference.distance,
        f"ancestral, {reference.evaluations} evaluations",
        round(GOAL, 4),
        "squared distance in the judge's features",
        less_is_better=True,
    )


# --- for people ---------------------------------------------------------------------------------


def show(result: Result) -> str:
    return f"{result.distance:.2f} ± {result.deviation:.2f}, {result.accuracy:.1%} right"


def print_table(results: list[Result]) -> None:
    """A row a sampler, a column a number of evaluations: distance ± deviation (accuracy)."""
    columns = sorted({result.asked for result in results})
    cells = {
        (r.name, r.asked): f"{r.distance:.2f} ± {r.deviation:.2f} ({r.accuracy:.1%})"
        for r in results
    }
    print(f"{'evaluations, at most':<26}" + "".join(f"{column:>24}" for column in columns))
    for name in dict.fromkeys(result.name for result in results):
        row = "".join(f"{cells.get((name, column), '-'):>24}" for column in columns)
        print(f"{name:<26}{row}")


def draw_curves(
    results: list[Result], reference: Result, floor: dict[str, float], out: Path
) -> None:
    """Distance over evaluations, a line a sampler, on logarithmic axes."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogFormatter, NullFormatter

    figure = Figure(figsize=(9.5, 6), dpi=120, layout="constrained")
    ax = figure.subplots()
    within = [reference.distance * 0.95, reference.distance * 1.05]
    ax.axhspan(*within, color="#E5E7EB", label=f"ancestral, {reference.evaluations}, within 5 %")
    for style, (what, distance) in zip((":", "--"), floor.items(), strict=False):
        ax.axhline(distance, color="#6B7280", linestyle=style, linewidth=1, label=what)
    colors = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#000000"]
    names = list(dict.fromkeys(result.name for result in results))
    for i, name in enumerate(names):
        of = sorted((r for r in results if r.name == name), key=lambda r: r.evaluations)
        aside = 1.012 ** (i - len(names) / 2)  # so that no error bar hides another
        ax.errorbar(
            [r.evaluations * aside for r in of],
            [r.distance for r in of],
            yerr=[r.deviation for r in of],
            color=colors[i % len(colors)],
            linestyle=("-", "--", ":", "-.")[i // len(colors) % 4],
            marker="os^Dv*"[i % 6],
            markersize=4,
            linewidth=1.4,
            elinewidth=0.7,
            label=name,
        )
    ax.set_xscale("log")
    ax.set_yscale("log")
    ticks = sorted({result.asked for result in results})
    ax.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    ax.xaxis.set_minor_formatter(NullFormatter())
    ax.yaxis.set_major_formatter(LogFormatter())
    ax.yaxis.set_minor_formatter(LogFormatter(minor_thresholds=(4, 1)))
    ax.set_xlabel("network evaluations an image")
    ax.set_ylabel("Fréchet distance to the training images, judge's features")
    ax.grid(color="#E5E7EB", linewidth=0.8)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside right upper", frameon=False, fontsize=9)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, facecolor="white")


if __name__ == "__main__":
    main()
