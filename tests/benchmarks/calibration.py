"""What an extractor's figures say of real images that were never trained on, and of spoiled ones.

    python -m tests.benchmarks.calibration REFERENCE --images SOURCE [--size 28] [--channels 1]
    python -m tests.benchmarks.calibration --quick

REFERENCE is the output of the stage of that name, with the features of all training images, as
`ddpm run` leaves it in runs/reference; SOURCE holds other real images, as data.source takes them,
with labels. The first rows are the floor of each figure, for so many images; then images are made
worse step by step. An extractor is of use if the distance grows with the damage, and if the recall
falls where classes are missing.

The peer is the calibration of such a classifier before this project, whose images were others.
Without REFERENCE --quick makes one of digits, and shows them again: its figures say nothing.
"""

import argparse
import tempfile
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageFilter

from pipeline.config import load_config
from pipeline.data.config import DataConfig
from pipeline.data.images import decode
from pipeline.data.input_shards import cut, read
from pipeline.data.source import scan
from pipeline.evaluation.extractors import load_extractor
from pipeline.evaluation.figures import compare, gather
from pipeline.evaluation.real_images import read_train
from tests.benchmarks import program
from tests.benchmarks.own_ray import run_stage, started_ray
from tests.benchmarks.processes import Failed
from tests.benchmarks.program import CONFIGS, Figure, figure

SHOWN = ("fd", "kd", "precision", "recall", "coverage")
BEFORE = 234.0 / 0.18
"""The distance of half of the classes over that of 10,000 real images of Fashion-MNIST: of a
classifier of 242,000 parameters, trained for 4 epochs (92.6 % right)."""
DIGITS = "builtin:digits"
QUICK_EPOCHS = 2


def main() -> None:
    options = program.parser(__doc__)
    options.add_argument("reference", nargs="?", help="the output of the stage `reference`")
    options.add_argument("--images", help="a source of real images")
    options.add_argument("--size", type=int, default=28)
    options.add_argument("--channels", type=int, default=1)
    program.run(options, measure, "torch", "numpy")


def measure(options: argparse.Namespace) -> list[Figure]:
    if options.reference:
        if not options.images:
            raise Failed("--images is missing: a source of real images that were not trained on")
        images, labels = load(options.images, options.size, options.channels)
        return calibrate(options.reference, images, labels)
    if not options.quick:
        raise Failed(
            "REFERENCE is missing: the folder in runs/reference that `ddpm run CONFIG` makes"
        )
    with tempfile.TemporaryDirectory() as folder, started_ray(2):
        sets = [f"storage={folder}", f"evaluation.classifier_epochs={QUICK_EPOCHS}"]
        config = load_config(str(CONFIGS / "digits.yaml"), sets)
        reference = run_stage(config, "reference")
        return calibrate(reference, *load(DIGITS, config.data.image_size, config.data.channels))


def calibrate(reference: str, images: np.ndarray, labels: np.ndarray) -> list[Figure]:
    extractor = load_extractor(reference)
    if extractor is None:
        raise Failed(f"{reference} has no extractor")
    train = read_train(reference)
    print(
        f"{extractor.name}, {extractor.digest[:16]}; {train.moments.n} training images, "
        f"{train.some.shape[1]} features; {len(images)} images"
    )
    print(f"{'':<32}" + "".join(f"{name:>20}" for name in SHOWN))
    distances = {}
    for what, pixels in sets(images, labels):
        features = extractor(pixels).features
        figures, _ = compare(extractor.name, gather([features]), train)
        cells = [figures.get(f"{name}_{extractor.name}") for name in SHOWN]
        shown = [
            "-" if c is None else f"{c['value']:.3f} ± {c['standard_error']:.3f}" for c in cells
        ]
        print(f"{what:<32}" + "".join(f"{cell:>20}" for cell in shown), flush=True)
        if cells[0] is not None:
            distances[what] = cells[0]["value"]
    half, whole = half_of(labels), f"{len(images)} real images"
    what, peer = (
        f"Fréchet distance of {half} over that of {whole}",
        "a classifier before this project",
    )
    return [figure(what, distances[half] / distances[whole], BEFORE, peer, 1, "ratio")]


def half_of(labels: np.ndarray) -> str:
    return f"classes 0 to {labels.max() // 2}"


def load(source: str, size: int, channels: int) -> tuple[np.ndarray, np.ndarray]:
    """(N, H, W, C) uint8 and labels (N,)."""
    config = DataConfig(source=source, image_size=size, channels=channels)
    pixels, labels = [], []
    for shard in cut(scan(config), 10_000):
        for item, raw in read(shard):
            assert raw is not None and item.label is not None
            pixels.append(decode(raw, size, channels).pixels)
            labels.append(item.label)
    return np.stack(pixels), np.array(labels)


def sets(images: np.ndarray, labels: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """What is measured, by name."""
    rng = np.random.default_rng(0)
    order = rng.permutation(len(images))
    for n in (len(images), 5000, 2000, 1000, 500):
        if n <= len(images):
            yield f"{n} real images", images[order[:n]]
    for sigma in (0.05, 0.1, 0.2, 0.5):
        noise = rng.normal(0, sigma * 127.5, images.shape)
        yield f"noise of {sigma:g}", (images + noise).round().clip(0, 255).astype(np.uint8)
    yield "3x3 mean", np.stack([blurred(image) for image in images])
    yield "flipped", images[:, :, ::-1].copy()
    yield half_of(labels), images[labels <= labels.max() // 2]
    yield "uniform noise", rng.integers(0, 256, images.shape, dtype=np.uint8)
    yield "one image again and again", np.repeat(images[:1], len(images), axis=0)


def blurred(image: np.ndarray) -> np.ndarray:
    channels = [
        np.asarray(Image.fromarray(image[..., c]).filter(ImageFilter.BoxBlur(1)))
        for c in range(image.shape[-1])
    ]
    return np.stack(channels, axis=-1)


if __name__ == "__main__":
    main()
