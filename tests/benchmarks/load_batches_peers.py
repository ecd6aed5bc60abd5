"""What tests/benchmarks/load_batches.py measures, one contender a process, and the peers.

    python load_batches_peers.py NAME FOLDER NUM_WORKERS

runs in an environment of the peers' own, so it imports nothing of this project. A contender says
"ready", then for each line it reads it goes through its images once in batches of 64 and answers
with the rate, images a second, that it reached after the first few batches: what was prefetched
while it waited does not count, nor does the start of an epoch.
"""

import glob
import importlib.machinery
import sys
import time
import types
from collections.abc import Callable, Iterator
from typing import Any

BATCH_SIZE = 64
NOT_COUNTED = 8
"""Batches; more than any contender prefetches."""

Epoch = Callable[[], Iterator[Any]]
"""Gives an iterator over (images (64, H, W, 3) uint8, labels (64,)) tensors."""


def serve(epoch: Epoch) -> None:
    """Answer each line of stdin with the rate of an epoch."""
    print("ready", flush=True)
    for _ in sys.stdin:
        began, count = 0.0, 0
        for i, (images, labels) in enumerate(epoch()):
            assert len(images) == len(labels) == BATCH_SIZE and images.ndim == 4
            assert str(images.dtype) == "torch.uint8" and images.shape[3] == 3
            count += BATCH_SIZE
            if i + 1 == NOT_COUNTED:
                began, count = time.perf_counter(), 0
        print(count / (time.perf_counter() - began), flush=True)


def loader(dataset: Any, num_workers: int, **values: Any) -> Any:
    from torch.utils.data import DataLoader

    return DataLoader(
        dataset, num_workers=num_workers, persistent_workers=num_workers > 0, **values
    )


def folder_of_png(folder: str, num_workers: int) -> Epoch:
    """torch.utils.data over CLASS/NUMBER.png, as in every tutorial."""
    import numpy as np
    import torch
    from PIL import Image
    from torch.utils.data import Dataset

    paths = sorted(glob.glob(f"{folder}/png/*/*.png"))

    class Folder(Dataset):  # type: ignore[type-arg]
        def __len__(self) -> int:
            return len(paths)

        def __getitem__(self, i: int) -> Any:
            with Image.open(paths[i]) as image:
                return torch.from_numpy(np.array(image)), int(paths[i].split("/")[-2])

    batches = loader(Folder(), num_workers, batch_size=BATCH_SIZE, shuffle=True, drop_last=True)
    return lambda: iter(batches)


def webdataset(folder: str, num_workers: int, kind: str) -> Epoch:
    """Tar files of PNG, or of arrays as they are, with a shuffle buffer of 2,048."""
    import torch
    import webdataset as wds

    urls = sorted(glob.glob(f"{folder}/{kind}.*.tar"))
    samples = wds.WebDataset(urls, shardshuffle=len(urls), seed=0).shuffle(2048)
    samples = samples.decode("rgb8").to_tuple(kind, "cls").batched(BATCH_SIZE, partial=False)
    samples = samples.map_tuple(torch.as_tensor, torch.as_tensor)
    batches = loader(samples, num_workers, batch_size=None)
    return lambda: iter(batches)


def mosaic(folder: str, num_workers: int) -> Epoch:
    """MosaicML streaming over MDS files of arrays as they are, shuffled as it does by itself."""
    _without_torchvision()
    from streaming import StreamingDataset

    dataset = StreamingDataset(local=f"{folder}/mds", shuffle=True, batch_size=BATCH_SIZE)
    batches = loader(dataset, num_workers, batch_size=BATCH_SIZE, drop_last=True)

    def epoch() -> Iterator[Any]:
        for batch in batches:
            yield batch["image"], batch["label"]

    return epoch


def write_mosaic(folder: str) -> None:
    import numpy as np

    _without_torchvision()
    from streaming import MDSWriter

    images, labels = np.load(f"{folder}/images.npy"), np.load(f"{folder}/labels.npy")
    shape = ",".join(map(str, images.shape[1:]))
    columns = {"image": f"ndarray:uint8:{shape}", "label": "int"}
    with MDSWriter(out=f"{folder}/mds", columns=columns, size_limit=1 << 24) as writer:
        for image, label in zip(images, labels, strict=True):
            writer.write({"image": image, "label": int(label)})


def _without_torchvision() -> None:
    """Streaming imports three names of it, for classes that are not used here."""
    try:
        import torchvision  # noqa: F401
    except ImportError:
        for name, values in (
            ("torchvision", ()),
            ("torchvision.datasets", ("VisionDataset", "CIFAR10")),
            ("torchvision.transforms", ()),
            ("torchvision.transforms.functional", ("to_tensor",)),
        ):
            sys.modules[name] = types.ModuleType(name)
            # transformers, which streaming imports, looks for it
            sys.modules[name].__spec__ = importlib.machinery.ModuleSpec(name, None)
            for value in values:
                setattr(sys.modules[name], value, type(value, (), {}))


PEERS: dict[str, Callable[[str, int], Epoch]] = {
    "folder of PNG": folder_of_png,
    "webdataset, PNG": lambda folder, workers: webdataset(folder, workers, "png"),
    "webdataset, npy": lambda folder, workers: webdataset(folder, workers, "npy"),
    "streaming, raw": mosaic,
}


if __name__ == "__main__":
    import torch

    torch.set_num_threads(1)
    name, folder, num_workers = sys.argv[1:]
    if name == "write streaming":
        write_mosaic(folder)
    else:
        serve(PEERS[name](folder, int(num_workers)))
