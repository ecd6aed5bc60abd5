"""What samples are compared with: the features of real images, in files of a folder.

    extractor.json                     what found them, see extractors.py
    features/train-00000.safetensors   (n, D) of a few thousand training images, in their order
    features/holdout-00000.safetensors the same of held-out images
    train.safetensors                  the moments of all training images, and some vectors
    holdout.safetensors                some vectors of held-out images, and how near the first of
                                       them lie to the training images

The vectors that are kept lie in a random order: those of a source may lie class by class.
"""

import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from pipeline import storage
from pipeline.data.parts import Part, choose
from pipeline.device import CPU
from pipeline.evaluation.extractors import Extractor, load_extractor
from pipeline.evaluation.figures import (
    MOST_KEPT,
    FeatureSet,
    gather,
    nearest_in_chunks,
)
from pipeline.evaluation.frechet import Moments
from pipeline.seeding import key, permutation

FEATURES = "features"
TRAIN, HOLDOUT = "train.safetensors", "holdout.safetensors"
MOST_NEAREST = 1000
"""Held-out images whose nearest training image is looked for."""


@functools.lru_cache(maxsize=2)  # a worker process extracts from many files of images
def extractor_of(folder: str, device: torch.device = CPU) -> Extractor | None:
    """`load_extractor`, kept by the process."""
    return load_extractor(folder, device)


def features_path(split: str, number: int) -> str:
    return f"{FEATURES}/{split}-{number:05d}.safetensors"


def extract(folder: str, parts: Sequence[Part], path: str, device: torch.device = CPU) -> None:
    """Write the features of all images of some parts to a path below `folder`."""
    extractor = extractor_of(folder, device)
    assert extractor is not None
    found = []
    for part in parts:
        for group in range(len(part.group_sizes)):
            images, _ = part.read_group(group)
            if len(images):
                found.append(extractor(images).features)
    write_tensors(storage.join(folder, path), {"features": torch.cat(found)})


def read_features(folder: str, split: str) -> Iterator[Tensor]:
    """The features (n, D) of a split, a file of them at a time, in the order of the images."""
    names = storage.list_names(storage.join(folder, FEATURES))
    for name in sorted(names, key=len):  # a name of more than five digits is longer
        if name.startswith(f"{split}-"):
            tensors = read_tensors(storage.join(folder, FEATURES, name))
            assert tensors is not None
            yield tensors["features"]


def summarise(folder: str, seed: int) -> None:
    """Write what is kept of the training images and, if there are any, of the held-out ones."""
    train = _gather(folder, "train", seed)
    assert train is not None  # the stage that makes ShardSets sees to it
    kept = {
        "n": torch.tensor(train.moments.n),
        "mean": train.moments.mean,
        "scatter": train.moments.scatter,
        "some": train.some,
    }
    write_tensors(storage.join(folder, TRAIN), kept)
    if (holdout := _gather(folder, "holdout", seed)) is not None:
        few = holdout.some[:MOST_NEAREST]
        distances, _ = nearest_in_chunks(few, read_features(folder, "train"))
        kept = {"some": holdout.some, "squared_distances": distances}
        write_tensors(storage.join(folder, HOLDOUT), kept)


def _gather(folder: str, split: str, seed: int) -> FeatureSet | None:
    """What is kept of a split; None if it has no images."""
    sizes = [len(chunk) for chunk in read_features(folder, split)]
    if not sizes:
        return None
    chosen = torch.from_numpy(choose(sum(sizes), MOST_KEPT, seed))
    begins = list(itertools.accumulate(sizes, initial=0))

    def keep(number: int) -> Tensor:
        begin, end = begins[number : number + 2]
        return chosen[(chosen >= begin) & (chosen < end)] - begin

    gathered = gather(read_features(folder, split), keep)
    order = permutation(key(seed, "features", len(chosen)), len(chosen))
    return replace(gathered, some=gathered.some[torch.from_numpy(order)])


def read_train(folder: str) -> FeatureSet:
    """What is kept of the features of the training images."""
    kept = load_tensors(storage.read_bytes(storage.join(folder, TRAIN)))
    return FeatureSet(Moments(int(kept["n"]), kept["mean"], kept["scatter"]), kept["some"])


def read_held_out(folder: str) -> tuple[Tensor, Tensor]:
    """What is kept of held-out images: (K, D) features, and of the first of them the squared
    distances (M,) to the training images that are nearest; empty if none were held out."""
    kept = read_tensors(storage.join(folder, HOLDOUT))
    if kept is None:
        return torch.empty(0, 0), torch.empty(0)
    return kept["some"], kept["squared_distances"]


def write_tensors(uri: str, tensors: dict[str, Tensor]) -> None:
    storage.write_bytes(uri, save_tensors({n: t.contiguous() for n, t in tensors.items()}))


def read_tensors(uri: str) -> dict[str, Tensor] | None:
    """The tensors of a file; None if it is not there, or is damaged."""
    try:
        return load_tensors(storage.read_bytes(uri))
    except (FileNotFoundError, SafetensorError):
        return None
