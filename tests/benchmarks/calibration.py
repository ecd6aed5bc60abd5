"""What an extractor's figures say of real images that were never trained on, and of spoiled ones.

    python -m tests.benchmarks.calibration REFERENCE --images SOURCE [--size 28] [--channels 1]

REFERENCE is the output of the stage of that name, with the features of all training images; SOURCE
holds other real images, as data.source takes them, with labels. The first rows are the floor of
each figure, for so many images; then images are made worse step by step. An extractor is of use if
the distance grows with the damage, and if the recall falls where classes are missing.

The last line is JSON: [{"what", "ours", "peer", "peer_name", "unit", "ratio", "goal"}]; the peer is
the calibration of such a classifier before this project, whose images were not the same.
"""

import argparse
import json
from collections.abc import Iterator

import numpy as np
from PIL import Image, ImageFilter

from pipeline.data.config import DataConfig
from pipeline.data.images import decode
from pipeline.data.input_shards import cut, read
from pipeline.data.sources import scan
from pipeline.evaluation.extractors import load_extractor
from pipeline.evaluation.figures import compare, gather
from pipeline.evaluation.real_images import read_train

SHOWN = ("fd", "kd", "precision", "recall", "coverage")
WHOLE, HALF = "10000 real images", "classes 0 to 4"
BEFORE = {WHOLE: 0.18, HALF: 234.0}
"""Of a classifier of 242,000 parameters, trained for 4 epochs (92.6 % right)."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("reference", help="the output of the stage `reference`")
    parser.add_argument("--images", required=True, help="a source of real images")
    parser.add_argument("--size", type=int, default=28)
    parser.add_argument("--channels", type=int, default=1)
    options = parser.parse_args()
    extractor = load_extractor(options.reference)
    if extractor is None:
        parser.error(f"{options.reference} has no extractor")
    train = read_train(options.reference)
    images, labels = load(options.images, options.size, options.channels)
    print(
        f"{extractor.name}, {extractor.digest[:16]}; {train.moments.n} training images, "
        f"{train.some.shape[1]} features; {len(images)} images of {options.images}"
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
    contrast = {name: of[HALF] / of[WHOLE] for name, of in (("ours", distances), ("peer", BEFORE))}
    print(
        json.dumps(
            [
                {
                    "what": f"Fréchet distance of {HALF} over that of {WHOLE}",
                    **{name: round(value, 1) for name, value in contrast.items()},
                    "peer_name": "a classifier before this project",
                    "unit": "ratio",
                    "ratio": round(contrast["ours"] / contrast["peer"], 3),
                    "goal": 1,
                }
            ]
        )
    )


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
    half = labels.max() // 2
    yield f"classes 0 to {half}", images[labels <= half]
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
