"""infra/scaling.md follows from infra/scaling.json, which the benchmarks have measured."""

import json
import math

import pytest
import torch

from pipeline.config import load_config
from pipeline.training.watch import training_flops
from tasks.stages.train_worker import model_spec
from tests.conftest import ROOT

PAGE = (ROOT / "infra" / "scaling.md").read_text()
MEASURED = json.loads((ROOT / "infra" / "scaling.json").read_text())
C = {name: entry["value"] for name, entry in MEASURED.items()}
UNITS = {"": 1.0, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "min": 60.0, "h": 3600.0, "%": 0.01, "G": 1e9}
UNITS |= {"B": 1.0, "kB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
GPU, NETWORK, HOP, WRITE = 100e12, 200e9 / 8, 10e-6, 500e6
NETWORKS = {
    "digits": ("digits", []),
    "fashion_mnist": ("fashion_mnist", []),
    "cifar10": ("cifar10", []),
    "ddpm_256": ("cifar10", ["network.preset=ddpm_256", "data.image_size=256"]),
    "adm_64": ("cifar10", ["network.preset=adm_64", "data.image_size=64"]),
}


def rows(section: str) -> dict[str, list[float]]:
    """The table of a section: a row's name and its numbers, in SI units."""
    text = PAGE.split(f"### {section}\n")[1].split("\n#")[0]
    cells = [line.strip("| ").split(" | ") for line in text.splitlines() if line.startswith("| ")]
    return {name: [number(cell) for cell in row] for name, *row in cells[2:]}


def number(cell: str) -> float:
    value, _, unit = cell.replace(",", "").replace("%", " %").partition(" ")
    return float(value) * UNITS[unit]


def check(found: dict[str, list[float]], wanted: dict[str, list[float]], digit: float) -> None:
    """Each row has what it should have, to three digits, or to `digit`."""
    for name, values in wanted.items():
        assert found[name] == pytest.approx(values, rel=0.005, abs=digit), name


def test_the_constants_are_what_the_benchmarks_measured_last() -> None:
    measured, section = {}, ""
    for line in (ROOT / "tests" / "benchmarks" / "RESULTS.md").read_text().splitlines():
        if line.startswith("## "):
            section = line.removeprefix("## ").partition(", AVX-512 with bf16")[0]
        if line.startswith("[{"):
            measured |= {(section, entry["what"]): entry["ours"] for entry in json.loads(line)}
    for name, entry in MEASURED.items():
        if entry["what"] is not None:
            assert measured[entry["section"], entry["what"]] == entry["value"], name


def test_preprocess() -> None:
    images, nodes = (1e6, 1e9), (1, 1_000)
    shards = [n / 512 for n in images]
    us, core = 1e-6, C["images_decoded"] / 2
    check(
        rows("Preprocess"),
        {
            "tasks, each of a shard": shards,
            "objects written, two parts and a record a shard": [3 * n for n in shards],
            "bytes of the ShardSet, raw": [n * 64 * 64 * 3 for n in images],
            "listing the source, loose files": [n / 1000 * 0.1 for n in images],
            "listing the source, 10,000 images a file": [n / 10_000 / 1000 * 0.1 for n in images],
            "driver: memory of the listing, loose files": [
                n * C["file_listed_memory"] for n in images
            ],
            "driver: the list of images": [n * C["image_scanned"] * us for n in images],
            "tasks: decoding, on all cores": [
                n / core / 64 / m for n, m in zip(images, nodes, strict=True)
            ],
            "driver: its tasks": [n / C["tasks"] for n in shards],
            "driver: memory": [
                n * (C["image_scanned_memory"] + C["task_memory"] / 512) for n in images
            ],
            "list of shards": [n * C["shard_listed"] for n in shards],
            "to open it, each process": [n * C["shard_opened"] * us for n in shards],
            "memory of it opened": [n * C["shard_opened_memory"] for n in shards],
        },
        0,
    )
    full = 256 * 2**30 / (C["image_scanned_memory"] + C["task_memory"] / 512)
    assert f"full at {float(f'{full:.3g}'):,.0f} images" in PAGE
    assert f"{C['tasks'] * 512 / core:.0f} cores busy with 512 images" in PAGE


def test_training() -> None:
    found = rows("Training")
    for i, (name, (config, sets)) in enumerate(NETWORKS.items()):
        loaded = load_config(str(ROOT / "configs" / f"{config}.yaml"), sets)
        spec = model_spec(loaded, [str(label) for label in range(10)])
        with torch.device("meta"):
            network = spec.make_network()
        parameters = sum(parameter.numel() for parameter in network.parameters())
        flops = training_flops(network, spec.image_shape, spec.num_classes)
        step, size = 32 * flops / GPU, C.get(f"checkpoint_{name}", 16 * parameters)
        wanted = {
            "operations of an image, forward and backward": flops,
            "checkpoint": size,
            "checkpoint, written by one process": size / WRITE,
        }
        for n in (8, 800, 8_000):
            ring = 2 * 4 * parameters * (n - 1) / n / NETWORK + 2 * (n - 1) * HOP
            wanted[f"sum of the gradients, {n:,} GPUs"] = ring
        column = {row: [values[i]] for row, values in found.items()}
        assert column["parameters"] == [parameters]
        check(column, {row: [value] for row, value in wanted.items()}, 0)
        check(column, {"step of 32 images a GPU": [step]}, 0.0005e-3)
        for n in (8, 8_000):
            share = f"share of the time that is the step, {n:,} GPUs"
            check(
                column,
                {share: [step / (step + wanted[f"sum of the gradients, {n:,} GPUs"])]},
                0.005,
            )
        if name in ("digits", "fashion_mnist", "cifar10"):
            # weights, their average and two moments, as is taken for networks that were not written
            assert 0 < size - 16 * parameters < 4 * 200 * len(list(network.parameters()))
    assert f"takes {C['mlflow_records']:.0f}\nrecords a second" in PAGE


def test_evaluation_and_serving() -> None:
    an_image = 50 / C["rows"]
    for cores, text in ((64, "110 s on the cores of one node"), (6_400, "6.5 s on those of 100")):
        assert text.startswith(f"{math.ceil(1_042 / cores) * 48 * an_image:.3g} s")
        assert text in PAGE
    replicas = (10, 100, 1_000)
    choices = [C[f"choice_of_{n}"] * 1e-6 for n in replicas]
    check(
        rows("Serving"),
        {
            "images a second of the replicas": [n / an_image for n in replicas],
            "choosing a replica": choices,
            "images a second that the router can choose for": [1 / each for each in choices],
            "images a second of one ingress": [1 / C["ingress"]] * 3,
            "services that are needed for them": [
                math.ceil(n / an_image * C["ingress"]) for n in replicas
            ],
        },
        0,
    )
    assert f"takes {C['request_let_in'] / 1000:.3g} ms" in PAGE
