"""The judge knows real digits, and the figures are what they say."""

import math

import numpy as np
import pytest
import torch

from pipeline.data import input_shards, source
from pipeline.data.images import to_unit
from pipeline.data.shards import NO_LABEL, ImageSet
from pipeline.evaluation.features import (
    TrainedClassifier,
    from_files,
    predict,
    to_files,
    train_classifier,
)
from pipeline.evaluation.metrics import holdout_loss
from pipeline.samplers.model import build_model
from tests.unit.test_engine import make_model


def digits() -> tuple[ImageSet, ImageSet]:
    """The real digits, the first 300 held out."""
    config = source.DataConfig(source="builtin:digits", image_size=8, channels=1)
    (shard,) = input_shards.cut(source.scan(config), 4000)
    items, raws = zip(*input_shards.read(shard), strict=True)
    images = np.stack([np.asarray(raw) for raw in raws])
    labels = np.array([item.label for item in items])
    return ImageSet(images[300:], labels[300:]), ImageSet(images[:300], labels[:300])


@pytest.fixture(scope="module")
def judge() -> TrainedClassifier:
    train, holdout = digits()
    return train_classifier(train, holdout, 10, seed=0, epochs=15)


def test_the_judge_knows_held_out_digits(judge: TrainedClassifier) -> None:
    assert judge.holdout_n == 300
    assert judge.holdout_accuracy > 0.93


def test_the_judge_is_not_fooled_by_noise_or_wrong_classes(judge: TrainedClassifier) -> None:
    _, holdout = digits()

    def share(images: np.ndarray, labels: np.ndarray) -> float:
        x = to_unit(torch.from_numpy(images))
        return float((predict(judge.network, x).numpy() == labels).mean())

    assert share(holdout.images, holdout.labels) == judge.holdout_accuracy
    assert share(holdout.images, (holdout.labels + 1) % 10) < 0.05
    noise = np.random.default_rng(0).integers(0, 256, (300, 8, 8, 1), dtype=np.uint8)
    assert share(noise, holdout.labels) < 0.3


def test_the_judge_is_the_same_after_a_trip_to_files(judge: TrainedClassifier) -> None:
    again = from_files(to_files(judge))
    assert (again.holdout_accuracy, again.holdout_n) == (judge.holdout_accuracy, 300)
    x = torch.randn(20, 1, 8, 8)
    assert torch.equal(again.network.features(x), judge.network.features(x))
    assert torch.equal(predict(again.network, x), predict(judge.network, x))


def test_the_same_seed_trains_the_same_judge() -> None:
    train, holdout = digits()
    few = ImageSet(train.images[:100], train.labels[:100])
    files = [to_files(train_classifier(few, holdout, 10, seed, 1)) for seed in (0, 0, 1)]
    assert files[0] == files[1]
    assert files[0] != files[2]


def test_images_without_labels_do_not_count(judge: TrainedClassifier) -> None:
    train, holdout = digits()
    unlabelled = ImageSet(holdout.images, np.full(300, NO_LABEL))
    few = ImageSet(train.images[:64], train.labels[:64])
    got = train_classifier(few, unlabelled, 10, 0, 1)
    assert got.holdout_n == 0
    assert math.isnan(got.holdout_accuracy)


def test_holdout_loss_of_a_model_that_predicts_zero_is_one() -> None:
    """E‖ε‖² = 1 a pixel, with the standard error of 64·300 squared normals."""
    model = make_model(["a"] * 10)
    zeros = {name: torch.zeros_like(t) for name, t in model.network.state_dict().items()}
    _, holdout = digits()
    found = holdout_loss(build_model(model.spec, zeros, ""), holdout, seed=0)
    loss, error, _ = found.estimate()
    assert loss == pytest.approx(1.0, abs=4 * error)
    assert error == pytest.approx(math.sqrt(2 / 64 / 300), rel=0.2)
    again = holdout_loss(build_model(model.spec, zeros, ""), holdout, seed=0)
    assert torch.equal(again.loss, found.loss)
    curve = found.curve()
    assert len(curve["t"]) == 20
    assert curve["t"] == sorted(curve["t"])
    assert np.mean(curve["loss"]) == pytest.approx(loss)
    empty = ImageSet(holdout.images[:0], holdout.labels[:0])
    assert math.isnan(holdout_loss(model, empty, 0).estimate().value)
