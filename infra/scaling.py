"""How the pipeline grows to a thousand nodes and a billion images: the tables of scaling.md.

    python infra/scaling.py [--cores-per-node 64] [--network-gbit 200] ...
    python infra/scaling.py --write         puts the tables into scaling.md

What this project does was measured: the constants are read from tests/benchmarks/RESULTS.md, each
from the section that `CONSTANTS` names, and parameters and operations of the networks are counted
from the networks. What hardware there is has to be assumed: those are the options, shown above the
tables.
"""

import argparse
import json
import re
from dataclasses import dataclass, fields
from pathlib import Path

import torch

from pipeline.config import load_config
from pipeline.networks.config import PRESETS
from pipeline.samplers.model import ModelSpec
from pipeline.training.watch import training_flops

HERE = Path(__file__).parent
RESULTS = HERE.parent / "tests" / "benchmarks" / "RESULTS.md"
PAGE = HERE / "scaling.md"
BEGIN, END = "<!-- what scaling.py prints -->\n", "<!-- end -->\n"

CONSTANTS = {
    "decoded": ("preprocess", "preprocess 256-pixel JPEG to 64x64"),
    "tasks": ("scale", "tasks of preprocess that its driver sees to"),
    "task_bytes": ("scale", "memory of the driver, an empty task"),
    "scan_us": ("scale", "an image scanned and cut"),
    "scan_bytes": ("scale", "memory of a scan, an image"),
    "listed_bytes": ("scale", "memory of a listing, an object"),
    "list_bytes": ("scale", "list of shards, a shard"),
    "opened_us": ("scale", "an opened ShardSet, a shard"),
    "opened_bytes": ("scale", "memory of an opened ShardSet, a shard"),
    "choice_10": ("scale", "an image's replica chosen of 10"),
    "choice_100": ("scale", "an image's replica chosen of 100"),
    "choice_1000": ("scale", "an image's replica chosen of 1,000"),
    "let_in": ("scale", "a request let in beside 10,000"),
    "digits": ("scale", "checkpoint of digits"),
    "fashion_mnist": ("scale", "checkpoint of fashion_mnist"),
    "cifar10": ("scale", "checkpoint of cifar10"),
    "records": ("scale", "records of 12 figures into MLflow's sqlite"),
    "rows": ("engine", "engine, exact"),
}
"""(section of RESULTS.md, what it says there)."""
MEASURED_ON = "AVX-512 with bf16"
"""The kind of machine, behind the name in the heading of a section."""
WORKERS_MEASURED = 2
"""Of `decoded`, which is of both."""
INGRESS = (
    r"([\d.]+) rows a request on average",
    r"service, exact, 2 replicas +([\d.]+) ",
    r"exact, x2: .* ingress ([\d.]+),",
)
"""In section serve_load: rows of a request, which is for an image; rows a second; CPU seconds a
second of the ingress."""
ROWS_PER_IMAGE = 50
IMAGES_PER_TASK = 48
"""Of an evaluation, see tasks/stages/drawing.py."""
FILES_PER_SHARD = 3
"""A part to train on, one held out, and the record."""
LOOSE, ARCHIVE = 1, 10_000
"""Images in a file of the source."""
SIZES = ((1, 10**6), (10, 10**7), (100, 10**8), (1_000, 10**9))
"""(nodes, images)."""


@dataclass(frozen=True)
class Assumed:
    """The cluster, which nothing here has been run on."""

    cores_per_node: int = 64
    gpus_per_node: int = 8
    tflops: float = 100.0
    """10^12 operations a second that a GPU does of a training step, not its peak."""
    network_gbit: float = 200.0
    """10^9 bits a second from each GPU to the next."""
    hop_us: float = 10.0
    """Microseconds from a GPU to the next."""
    batch_per_gpu: int = 32
    images_per_shard: int = 512
    head_gib: float = 256.0
    """Memory of the node of the driver."""
    list_ms: float = 100.0
    """Milliseconds in which an object store lists 1,000 objects."""
    write_mb: float = 500.0
    """10^6 bytes a second that a process writes to an object store."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    for field in fields(Assumed):
        name = f"--{field.name.replace('_', '-')}"
        parser.add_argument(name, type=type(field.default), default=field.default)
    parser.add_argument("--write", action="store_true", help=f"into {PAGE.name}")
    options = vars(parser.parse_args())
    write = options.pop("write")
    text = tables(Assumed(**options))
    print(text)
    if write:
        before, _, rest = PAGE.read_text().partition(BEGIN)
        PAGE.write_text(before + BEGIN + text + END + rest.partition(END)[2])


def measured() -> dict[str, float]:
    """The constants of this project; `ingress` is CPU seconds of an image.

    Raises:
        KeyError, IndexError: RESULTS.md does not have one of them.
    """
    found: dict[tuple[str, str], float] = {}
    ingress = 0.0
    for part in re.split(r"(?m)^(?=## )", RESULTS.read_text()):
        section, _, kind = part.removeprefix("## ").split("\n", 1)[0].partition(", ")
        if kind != MEASURED_ON:
            continue
        for line in re.findall(r"(?m)^\[\{.*\}\]$", part):
            found |= {(section, entry["what"]): entry["ours"] for entry in json.loads(line)}
        if section == "serve_load":
            rows, rate, cpu = (float(re.findall(pattern, part)[0]) for pattern in INGRESS)
            ingress = cpu / (rate / rows)
    return {name: found[where] for name, where in CONSTANTS.items()} | {"ingress": ingress}


def tables(assumed: Assumed) -> str:
    """All of them, in Markdown."""
    constants = measured()
    return "\n".join(
        [
            "Assumed: " + ", ".join(f"{n} {v:g}" for n, v in vars(assumed).items()) + ".\n",
            "### Preprocess\n",
            preprocess(constants, assumed),
            "### Training\n",
            training(constants, assumed),
            "### Evaluation\n",
            evaluation(constants, assumed),
            "### Serving\n",
            serving(constants),
        ]
    )


def table(head: list[str], rows: list[tuple[str, list[str]]]) -> str:
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *([name, *of] for name, of in rows)]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def number(value: float) -> str:
    """Three digits of it."""
    if value >= 100 or value == int(value):
        return f"{float(f'{value:.3g}'):,.0f}" if value >= 1000 else f"{value:.0f}"
    return f"{value:.3g}" if value >= 0.01 else f"{value:.1g}"


def seconds(value: float) -> str:
    for unit, size in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if value >= 2 * size:
            return f"{number(value / size)} {unit}"
    return f"{number(value)} s" if value >= 1 else f"{number(1e3 * value)} ms"


def num_bytes(value: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if value >= size:
            return f"{number(value / size)} {unit}"
    return f"{value:.0f} B"


def preprocess(c: dict[str, float], assumed: Assumed) -> str:
    """Of JPEG files of 256 pixels, to 64x64."""
    per_core = c["decoded"] / WORKERS_MEASURED
    rows: dict[str, list[str]] = {}

    def row(name: str, value: str) -> None:
        rows.setdefault(name, []).append(value)

    for nodes, images in SIZES:
        shards = images / assumed.images_per_shard
        row("tasks, each of a shard", number(shards))
        row("objects written", number(FILES_PER_SHARD * shards))
        row("bytes of the ShardSet, raw", num_bytes(images * 64 * 64 * 3))
        row("listing it, loose files", seconds(images / 1000 * assumed.list_ms / 1000))
        archives = images / ARCHIVE
        row("listing it, 10,000 images a file", seconds(archives / 1000 * assumed.list_ms / 1000))
        row("driver: memory of the listing, loose files", num_bytes(images * c["listed_bytes"]))
        row("driver: the list of images", seconds(images * c["scan_us"] / 1e6))
        decoding = images / per_core / nodes / assumed.cores_per_node
        handing_out = shards / c["tasks"]
        row("tasks: decoding, on all cores", seconds(decoding))
        row("driver: its tasks", seconds(handing_out))
        row("cores that it keeps busy", f"{min(1.0, decoding / handing_out):.1%}")
        memory = images * c["scan_bytes"] + shards * c["task_bytes"]
        row("driver: memory", num_bytes(memory))
        row("manifest and list of shards", num_bytes(shards * c["list_bytes"]))
        row("to open it, each process", seconds(shards * c["opened_us"] / 1e6))
        row("memory of it opened", num_bytes(shards * c["opened_bytes"]))
    each = c["scan_bytes"] + c["task_bytes"] / assumed.images_per_shard
    most = assumed.head_gib * 2**30 / each
    head = ["", *(f"{of_nodes(nodes)}, {images:.0e} images" for nodes, images in SIZES)]
    busy = c["tasks"] * assumed.images_per_shard / per_core
    return table(head, list(rows.items())) + (
        f"\nThe memory of the driver's node is full at {number(most)} images. Its tasks keep "
        f"{number(busy)} cores busy with {assumed.images_per_shard} images each, "
        f"{number(8 * busy)} with {8 * assumed.images_per_shard}.\n"
    )


def networks() -> dict[str, ModelSpec]:
    """Those of the shipped configs, and two published ones at 64 and 256 pixels."""
    from tasks.stages.train_worker import model_spec

    specs, ten = {}, [str(i) for i in range(10)]
    for name in ("digits", "fashion_mnist", "cifar10"):
        specs[name] = model_spec(
            load_config(str(HERE.parent / "configs" / f"{name}.yaml"), []), ten
        )
    for preset, size in (("ddpm_256", 256), ("adm_64", 64)):
        assert preset in PRESETS
        sets = [f"network.preset={preset}", f"data.image_size={size}"]
        config = load_config(str(HERE.parent / "configs" / "cifar10.yaml"), sets)
        specs[preset] = model_spec(config, ten)
    return specs


def training(c: dict[str, float], assumed: Assumed) -> str:
    """One process a GPU; gradients in float32, summed by a ring after the step, none beside it."""
    rows: dict[str, list[str]] = {}

    def row(name: str, value: str) -> None:
        rows.setdefault(name, []).append(value)

    specs = networks()
    for name, spec in specs.items():
        with torch.device("meta"):
            network = spec.make_network()
        parameters = sum(parameter.numel() for parameter in network.parameters())
        gradient = 4.0 * parameters
        flops = training_flops(network, spec.image_shape, spec.num_classes)
        step = assumed.batch_per_gpu * flops / (assumed.tflops * 1e12)
        row("parameters", f"{parameters:,}")
        row("operations of an image, forward and backward", f"{number(flops / 1e9)} G")
        row(f"step of {assumed.batch_per_gpu} images a GPU", seconds(step))
        for nodes, _ in SIZES:
            n = nodes * assumed.gpus_per_node
            ring = all_reduce(gradient, n, assumed)
            row(f"sum of the gradients, {n:,} GPUs", seconds(ring))
            row(f"share of the time that is the step, {n:,} GPUs", f"{step / (step + ring):.0%}")
        size = c.get(name, 4 * gradient)  # weights, their average, two moments
        row("checkpoint", num_bytes(size))
        row("written by one process", seconds(size / 1e6 / assumed.write_mb))
    return table(["", *specs], list(rows.items())) + (
        "\nMLflow: one process writes a record of 12 figures every `log_every` steps, however many "
        f"GPUs there are. Its sqlite takes {number(c['records'])} records a second.\n"
    )


def of_nodes(number: int) -> str:
    return f"{number:,} node" + "s" * (number > 1)


def all_reduce(size: float, n: int, assumed: Assumed) -> float:
    """Seconds in which a ring of n sums so many bytes: 2·size·(n-1)/n over the network's speed, and
    2·(n-1) hops (Thakur, Rabenseifner and Gropp 2005)."""
    return (
        2 * size * (n - 1) / n / (assumed.network_gbit * 1e9 / 8)
        + 2 * (n - 1) * assumed.hop_us / 1e6
    )


def evaluation(c: dict[str, float], assumed: Assumed) -> str:
    """Of the model of fashion_mnist on CPU cores."""
    images = 50_000
    rows: dict[str, list[str]] = {"tasks": [], "drawing them": []}
    for nodes, _ in SIZES:
        cores = nodes * assumed.cores_per_node
        tasks = -(-images // IMAGES_PER_TASK)
        waves = -(-tasks // cores)
        rows["tasks"].append(f"{tasks:,}")
        rows["drawing them"].append(seconds(waves * IMAGES_PER_TASK * ROWS_PER_IMAGE / c["rows"]))
    head = [f"{images:,} samples of fashion_mnist", *(of_nodes(nodes) for nodes, _ in SIZES)]
    return table(head, list(rows.items()))


def serving(c: dict[str, float]) -> str:
    """Of the model of fashion_mnist, a replica a core, images of 50 steps."""
    rows: dict[str, list[str]] = {}

    def row(name: str, value: str) -> None:
        rows.setdefault(name, []).append(value)

    replicas = (10, 100, 1_000)
    for count in replicas:
        rate = count * c["rows"] / ROWS_PER_IMAGE
        choice = c[f"choice_{count}"]
        row("images a second of the replicas", number(rate))
        row("choosing a replica", f"{number(choice)} µs")
        row("images a second that the router can choose for", number(1e6 / choice))
        row("images a second of one ingress", number(1 / c["ingress"]))
        row("services that are needed for them", number(-(-rate * c["ingress"] // 1)))
    return table(["", *(f"{count:,} replicas" for count in replicas)], list(rows.items())) + (
        f"\nTo let a request in beside 10,000 others takes {number(c['let_in'])} µs.\n"
    )


if __name__ == "__main__":
    main()
