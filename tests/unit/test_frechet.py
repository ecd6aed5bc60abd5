"""The Fréchet distance against closed forms and against SciPy's matrix square root."""

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from pipeline.errors import DataError
from pipeline.evaluation.frechet import Gaussian, fit_gaussian, frechet_distance


def normal(*shape: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


def random_gaussian(dim: int, rank: int, seed: int) -> Gaussian:
    factor = normal(dim, rank, seed=seed)
    return Gaussian(normal(dim, seed=seed + 1000), factor @ factor.T / rank)


def by_scipy(p: Gaussian, q: Gaussian) -> float:
    """The formula with the square root of the unsymmetric product, as it is mostly implemented."""
    root = scipy.linalg.sqrtm((p.covariance @ q.covariance).numpy())
    difference = (p.mean - q.mean).numpy()
    trace = np.trace(p.covariance.numpy() + q.covariance.numpy() - 2 * np.real(root))
    return float(difference @ difference + trace)


@pytest.mark.parametrize("dim", [1, 2, 17, 128])
def test_it_is_what_scipys_square_root_gives(dim: int) -> None:
    p, q = random_gaussian(dim, 2 * dim, seed=0), random_gaussian(dim, 3 * dim, seed=1)
    assert frechet_distance(p, q) == pytest.approx(by_scipy(p, q), rel=1e-9)
    assert frechet_distance(p, q) == pytest.approx(frechet_distance(q, p), rel=1e-12)


def test_of_one_dimension_it_is_the_difference_of_means_and_of_deviations() -> None:
    p = Gaussian(torch.tensor([1.0]).double(), torch.tensor([[4.0]]).double())
    q = Gaussian(torch.tensor([-2.0]).double(), torch.tensor([[0.25]]).double())
    assert frechet_distance(p, q) == pytest.approx(3**2 + 1.5**2, rel=1e-14)


def test_of_commuting_covariances_it_is_the_difference_of_their_roots() -> None:
    """With Σ_i = U diag(s_i²) Uᵀ, d² = ‖μ_1 - μ_2‖² + ‖s_1 - s_2‖²."""
    basis, _ = torch.linalg.qr(normal(40, 40, seed=0))
    s_1, s_2 = normal(40, seed=1).abs(), normal(40, seed=2).abs()
    mean_1, mean_2 = normal(40, seed=3), normal(40, seed=4)
    p = Gaussian(mean_1, (basis * s_1**2) @ basis.T)
    q = Gaussian(mean_2, (basis * s_2**2) @ basis.T)
    want = (mean_1 - mean_2).square().sum() + (s_1 - s_2).square().sum()
    assert frechet_distance(p, q) == pytest.approx(float(want), rel=1e-12)


@pytest.mark.parametrize("rank", [128, 5])
def test_the_distance_to_itself_is_zero_even_where_the_covariance_is_singular(rank: int) -> None:
    """With SciPy's root of the product, the singular one comes out 2e-5 off."""
    p = random_gaussian(128, rank, seed=0)
    assert abs(frechet_distance(p, p)) < 1e-11 * float(p.covariance.trace())


def test_of_disjoint_supports_it_is_the_sum_of_the_traces() -> None:
    p = Gaussian(torch.zeros(6).double(), torch.diag(torch.tensor([1.0, 2, 3, 0, 0, 0]).double()))
    q = Gaussian(torch.zeros(6).double(), torch.diag(torch.tensor([0.0, 0, 0, 4, 5, 6]).double()))
    assert frechet_distance(p, q) == pytest.approx(21, rel=1e-14)


def test_the_fit_is_numpys_mean_and_covariance_even_far_from_zero() -> None:
    x = normal(200, 7, seed=0) + 1e4
    fitted = fit_gaussian(x)
    np.testing.assert_allclose(fitted.mean.numpy(), x.numpy().mean(0), rtol=1e-14)
    np.testing.assert_allclose(fitted.covariance.numpy(), np.cov(x.numpy().T), atol=1e-12)
    assert fit_gaussian(x.float()).covariance.dtype == torch.float64


def test_samples_of_a_known_law_come_near_its_distance() -> None:
    """x ~ N(0, I), y ~ N(m, 4 I): d² = ‖m‖² + D, up to the sampling error of 50,000 vectors."""
    shift = torch.tensor([1.0, -2.0, 0.5, 0.0]).double()
    x = normal(50_000, 4, seed=0)
    y = 2 * normal(50_000, 4, seed=1) + shift
    got = frechet_distance(fit_gaussian(x), fit_gaussian(y))
    # a mean is off by 2/√50,000 a dimension, so ‖m‖² by about 2 ‖m‖ · 0.01
    assert got == pytest.approx(float(shift.square().sum()) + 4, abs=0.15)


def test_too_few_images_are_refused() -> None:
    fit_gaussian(normal(9, 8, seed=0))
    with pytest.raises(DataError, match="8 feature dimensions needs at least 9 images a set, here"):
        fit_gaussian(normal(8, 8, seed=0))
