"""Figures of merit against their definitions, against torchmetrics, and against resampling."""

import math
from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import Tensor
from torchmetrics.image.fid import FrechetInceptionDistance
from torchmetrics.image.inception import InceptionScore
from torchmetrics.image.kid import KernelInceptionDistance

from pipeline.errors import DataError
from pipeline.evaluation.estimate import NORMAL_95, Estimate, mean_of, share_of
from pipeline.evaluation.frechet import (
    fit_gaussian,
    frechet_distance,
    frechet_error,
    gaussian,
    merged,
    moments,
)
from pipeline.evaluation.kernel import kernel_distance
from pipeline.evaluation.neighbours import memorised, nearest, neighbourhood
from pipeline.evaluation.score import class_score


def features(n: int, dim: int, seed: int, shift: float = 0.0, scale: float = 1.0) -> Tensor:
    """Correlated, skewed and not negative, as those of a network are."""
    rng = np.random.default_rng(seed)
    mixing = np.random.default_rng(99).normal(size=(dim, dim)) / math.sqrt(dim)
    x = np.maximum(rng.normal(size=(n, dim)) @ mixing * scale + shift, 0.1 * rng.random((n, dim)))
    return torch.from_numpy(x).float()


class AsFeatures(torch.nn.Module):
    """An extractor for torchmetrics, whose images are features already."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.num_features = dim

    def forward(self, images: Tensor) -> Tensor:
        return images.flatten(1).double()


# --- Fréchet distance ---------------------------------------------------------------------------


def test_the_distance_is_that_of_torchmetrics() -> None:
    real, fake = features(700, 24, 0), features(500, 24, 1, shift=0.2)
    theirs = FrechetInceptionDistance(
        feature=AsFeatures(24), normalize=True, input_img_size=(24, 1, 1)
    ).set_dtype(torch.float64)
    theirs.update(real[:, :, None, None].double(), real=True)
    theirs.update(fake[:, :, None, None].double(), real=False)
    ours = frechet_distance(fit_gaussian(fake), fit_gaussian(real))
    assert ours == pytest.approx(float(theirs.compute()), rel=1e-6)


def test_moments_of_parts_are_those_of_all_even_far_from_zero() -> None:
    x = features(1000, 9, 0).double() + 1e4
    whole = gaussian(merged(moments(part) for part in torch.split(x, [1, 499, 37, 463])))
    np.testing.assert_allclose(whole.mean.numpy(), x.numpy().mean(0), rtol=1e-14)
    np.testing.assert_allclose(whole.covariance.numpy(), np.cov(x.numpy().T), atol=1e-10)


@pytest.mark.parametrize("shift", [0.05, 0.5])
def test_the_error_of_the_distance_is_that_of_drawing_again(shift: float) -> None:
    real = fit_gaussian(features(20_000, 12, 0))
    draws = [features(600, 12, seed, shift) for seed in range(1, 301)]
    found = [frechet_distance(fit_gaussian(draw), real) for draw in draws]
    stated = [frechet_error(draw, 600, fit_gaussian(draw), real) for draw in draws[:20]]
    assert np.mean(stated) == pytest.approx(np.std(found), rel=0.15)


def test_the_error_can_be_told_from_some_of_the_images() -> None:
    real, fake = fit_gaussian(features(9000, 8, 0)), features(8000, 8, 1, shift=0.3)
    fitted = fit_gaussian(fake)
    some = frechet_error(fake[::8], 8000, fitted, real)
    assert some == pytest.approx(frechet_error(fake, 8000, fitted, real), rel=0.1)


# --- kernel distance ----------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Metric .* will save all extracted features")
def test_the_kernel_distance_is_that_of_torchmetrics() -> None:
    real, fake = features(300, 24, 0), features(300, 24, 1, shift=0.2)
    theirs = KernelInceptionDistance(
        feature=AsFeatures(24), normalize=True, subsets=1, subset_size=300
    )
    theirs.update(real[:, :, None, None].double(), real=True)
    theirs.update(fake[:, :, None, None].double(), real=False)
    want, _ = theirs.compute()
    assert kernel_distance(fake, real).value == pytest.approx(float(want), rel=1e-6)


def test_the_kernel_distance_is_its_definition_for_sets_of_different_size() -> None:
    x, y = features(1100, 5, 0).double(), features(41, 5, 1, shift=0.5).double()

    def k(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / 5 + 1) ** 3

    def between_pairs(a: Tensor) -> Tensor:
        products = k(a, a)
        return (products.sum() - products.trace()) / (len(a) * (len(a) - 1))

    want = between_pairs(x) + between_pairs(y) - 2 * k(x, y).mean()
    assert kernel_distance(x, y).value == pytest.approx(float(want), rel=1e-9)


@pytest.mark.parametrize(("shift", "least", "most"), [(0.5, 0.9, 1.1), (0.0, 0.9, 1.4)])
def test_the_error_of_the_kernel_distance_is_that_of_drawing_again(
    shift: float, least: float, most: float
) -> None:
    """Where both are of one law, it is stated too large and never too small."""
    real = features(600, 6, 0)
    found = [kernel_distance(features(200, 6, seed, shift), real) for seed in range(1, 301)]
    spread = np.std([one.value for one in found])
    stated = np.sqrt(np.mean([one.error**2 for one in found]))
    assert least < stated / spread < most


def test_of_one_law_the_kernel_distance_is_zero_on_average() -> None:
    found = [
        kernel_distance(features(100, 6, 2 * i), features(100, 6, 2 * i + 1)).value
        for i in range(100)
    ]
    assert abs(np.mean(found)) < 3 * np.std(found) / 10


# --- neighbours ---------------------------------------------------------------------------------


def by_definition(real: Tensor, samples: Tensor, k: int) -> tuple[float, float, float, float]:
    """The four figures with a loop a pair."""

    def distance(a: Tensor, b: Tensor) -> float:
        return math.dist(a.tolist(), b.tolist())

    def radius(of: Tensor, i: int) -> float:
        return sorted(distance(of[i], of[j]) for j in range(len(of)) if j != i)[k - 1]

    real_radii = [radius(real, i) for i in range(len(real))]
    sample_radii = [radius(samples, i) for i in range(len(samples))]
    apart = [[distance(r, s) for s in samples] for r in real]
    inside = [[apart[r][s] <= real_radii[r] for s in range(len(samples))] for r in range(len(real))]
    precision = np.mean([any(inside[r][s] for r in range(len(real))) for s in range(len(samples))])
    recall = np.mean(
        [any(apart[r][s] <= sample_radii[s] for s in range(len(samples))) for r in range(len(real))]
    )
    density = np.sum(inside) / (k * len(samples))
    coverage = np.mean([any(row) for row in inside])
    return float(precision), float(recall), float(density), float(coverage)


@pytest.mark.parametrize("k", [1, 3])
def test_precision_recall_density_and_coverage_are_their_definitions(
    k: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pipeline.evaluation.neighbours.ROWS", 32)
    real, samples = features(90, 4, 0), features(70, 4, 1, shift=0.8, scale=0.7)
    got = neighbourhood(real, samples, k, k)
    want = by_definition(real, samples, k)
    assert [one.value for one in got] == pytest.approx(want, rel=1e-12)
    assert all(0.05 < one < 0.95 for one in (want[0], want[1], want[3])), "it would tell little"


def test_a_copied_image_is_in_the_ball_of_its_original() -> None:
    real = features(50, 64, 0) * 1000
    got = neighbourhood(real, torch.cat([real[:10]] * 2), 1, 1)
    assert got.precision.value == 1.0
    distance, row = nearest(real[20:30].clone(), real)
    assert distance.tolist() == [0.0] * 10
    assert row.tolist() == list(range(20, 30))


def test_copies_of_training_images_are_told_from_new_ones() -> None:
    train, held_out, new = (features(n, 6, seed) for seed, n in enumerate((2000, 1000, 1000)))
    to_train = nearest(held_out, train)[0].sqrt()
    fresh = memorised(nearest(new, train)[0].sqrt(), to_train)
    copies = torch.cat([new[:900], train[:100] + 1e-4])
    copied = memorised(nearest(copies, train)[0].sqrt(), to_train)
    assert fresh.value == pytest.approx(0.01, abs=0.012)
    assert copied.value == pytest.approx(0.1 + 0.9 * fresh.value, abs=0.01)


# --- score, intervals ---------------------------------------------------------------------------


def test_the_score_of_even_and_sure_classes_is_their_number_and_of_unsure_ones_is_one() -> None:
    sure = torch.eye(10).repeat(7, 1).clamp(min=1e-30).log()
    assert class_score(sure).value == pytest.approx(10)
    assert class_score(torch.zeros(5, 10).log_softmax(1)).value == pytest.approx(1)
    assert class_score(sure[::10]).value == pytest.approx(1), "one class alone"


@pytest.mark.filterwarnings("ignore:Metric .* will save all extracted features")
@pytest.mark.filterwarnings("ignore:.*degrees of freedom")  # of the one part, which it spreads
def test_the_score_is_that_of_torchmetrics_and_its_error_that_of_drawing_again() -> None:
    def logits(n: int, seed: int) -> Tensor:
        return 2 * torch.randn(n, 10, generator=torch.Generator().manual_seed(seed)).double()

    theirs = InceptionScore(feature=AsFeatures(10), splits=1)
    theirs.update(logits(400, 0)[:, :, None, None])
    ours = class_score(logits(400, 0).log_softmax(1))
    assert ours.value == pytest.approx(float(theirs.compute()[0]), rel=1e-6)
    again = [class_score(logits(400, seed).log_softmax(1)).value for seed in range(300)]
    assert ours.error == pytest.approx(np.std(again), rel=0.15)


def test_the_interval_of_a_mean_has_it_in_95_of_100_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(1000):
        low, high = mean_of(torch.rand(50, generator=generator)).to_json()["interval"]
        held += low < 0.5 < high
    assert 0.92 < held / 1000 < 0.97


def test_the_interval_of_a_share_has_it_in_95_of_100_draws_and_never_shrinks_to_a_point() -> None:
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(2000):
        low, high = share_of(torch.rand(40, generator=generator) < 0.95).to_json()["interval"]
        held += low < 0.95 < high
    assert 0.93 < held / 2000 < 0.98
    low, high = share_of(torch.ones(500, dtype=torch.bool)).to_json()["interval"]
    assert high == 1.0
    assert 0.99 < low < 0.995
    p, error, _ = share_of(torch.arange(10) < 3)
    assert (p, error) == (0.3, pytest.approx(math.sqrt(0.3 * 0.7 / 10)))


def test_of_one_image_no_interval_is_claimed() -> None:
    assert mean_of(torch.ones(1)).to_json() == {
        "value": 1.0,
        "standard_error": None,
        "interval": None,
    }
    assert Estimate(2.0, 1.0).to_json()["interval"] == [2 - NORMAL_95, 2 + NORMAL_95]


# --- too few ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("compute", "sentence"),
    [
        (lambda: kernel_distance(features(1, 3, 0), features(9, 3, 1)), "needs two images a set"),
        (lambda: neighbourhood(features(9, 3, 0), features(5, 3, 1)), "need at least 6 images a"),
        (lambda: memorised(torch.ones(9), torch.ones(199)), "from at least 200 held-out images"),
    ],
)
def test_too_few_images_are_refused(compute: Callable[[], object], sentence: str) -> None:
    with pytest.raises(DataError, match=sentence):
        compute()
