"""A classifier of real images, the judge of class-conditional samples.

For small grey images published practice replaces Inception by a classifier trained on the same data
and says so: its figures are named after it and do not compare with Inception ones. It is trained on
the training split only; its accuracy on the held-out split is the ceiling of any sample's score.
"""

import json
from dataclasses import dataclass

import numpy as np
import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn
from torch.nn import functional as F

from pipeline.data.images import to_unit
from pipeline.data.shards import NO_LABEL, ImageSet
from pipeline.device import CPU, send
from pipeline.seeding import key, normal, permutation


class Classifier(nn.Module):
    """Three 3×3 convolutions and two linear layers: (B, C, H, W) in [-1, 1] to (B, classes)."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()
        self.channels = channels
        self.num_classes = num_classes
        self.conv1 = nn.Conv2d(channels, 32, 3, padding=1)
        self.conv2 = nn.Conv2d(32, 64, 3, padding=1)
        self.conv3 = nn.Conv2d(64, 64, 3, padding=1)
        self.hidden = nn.Linear(64 * 16, 128)
        self.out = nn.Linear(128, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """The penultimate layer: (B, 128)."""
        h = F.silu(self.conv1(x))
        h = F.silu(self.conv2(F.adaptive_avg_pool2d(h, max(4, x.shape[-1] // 2))))
        h = F.silu(self.conv3(h))
        return F.silu(self.hidden(F.adaptive_max_pool2d(h, 4).flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.features(x))
        return out


@dataclass(frozen=True)
class TrainedClassifier:
    """A classifier with its accuracy on images it was not trained on."""

    network: Classifier
    holdout_accuracy: float
    holdout_n: int


def train_classifier(
    train: ImageSet,
    holdout: ImageSet,
    num_classes: int,
    seed: int,
    epochs: int,
    device: torch.device = CPU,
) -> TrainedClassifier:
    """Fit on the labelled images of `train` with light noise, measure on those of `holdout`.

    It is fitted on `device`, and on the CPU afterwards.
    """
    x, y = _labelled(train, device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(key(seed, "classifier/init"))
        network = Classifier(x.shape[1], num_classes).to(device)
    batch = 64
    steps = epochs * -(-len(x) // batch)
    optimizer = torch.optim.AdamW(network.parameters(), lr=2e-3, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, total_steps=steps)
    for epoch in range(epochs):
        order = torch.from_numpy(permutation(key(seed, "classifier/order", epoch), len(x)))
        for i, rows in enumerate(torch.split(order, batch)):
            noise = normal([key(seed, "classifier/noise", epoch, i)], (len(rows), *x.shape[1:]))[0]
            rows, noise = send(rows, device), send(noise, device)
            loss = F.cross_entropy(network(x[rows] + 0.2 * noise), y[rows])
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
    network.eval().requires_grad_(False)
    x, y = _labelled(holdout, device)
    accuracy = float((predict(network, x) == y).double().mean()) if len(y) else float("nan")
    return TrainedClassifier(network.to(CPU), accuracy, len(y))


@torch.inference_mode()
def predict(network: Classifier, x: Tensor) -> Tensor:
    """The most likely class of each image: (B,) int64."""
    if not len(x):
        return torch.empty(0, dtype=torch.int64, device=x.device)
    return torch.cat([network(part).argmax(1) for part in torch.split(x, 256)])


def to_files(classifier: TrainedClassifier) -> dict[str, bytes]:
    """The classifier as files: safetensors and JSON."""
    facts = {
        "channels": classifier.network.channels,
        "num_classes": classifier.network.num_classes,
        "holdout_accuracy": classifier.holdout_accuracy,
        "holdout_n": classifier.holdout_n,
    }
    return {
        "classifier.safetensors": save_tensors(classifier.network.state_dict()),
        "classifier.json": json.dumps(facts, indent=1).encode(),
    }


def from_files(files: dict[str, bytes]) -> TrainedClassifier:
    facts = json.loads(files["classifier.json"])
    network = Classifier(facts["channels"], facts["num_classes"])
    network.load_state_dict(load_tensors(files["classifier.safetensors"]))
    network.eval().requires_grad_(False)
    return TrainedClassifier(network, facts["holdout_accuracy"], facts["holdout_n"])


def _labelled(images: ImageSet, device: torch.device) -> tuple[Tensor, Tensor]:
    rows = np.flatnonzero(images.labels != NO_LABEL)
    pixels, labels = torch.from_numpy(images.images[rows]), torch.from_numpy(images.labels[rows])
    return to_unit(send(pixels, device)), send(labels, device)
