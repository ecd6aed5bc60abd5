"""Likelihoods by the probability-flow ODE against densities that are known, and their report."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.data.images import to_unit
from pipeline.data.shards import NO_LABEL, ImageSet
from pipeline.diffusion.elbo import Elbo
from pipeline.diffusion.likelihood import (
    bits_per_dim,
    dequantised,
    draw_signs,
    exact_trace,
    hutchinson_trace,
    log_density,
)
from pipeline.errors import UserError
from pipeline.evaluation.likelihood import (
    IMAGES_PER_CHUNK,
    OdeBits,
    choose_chunks,
    elbo_of,
    ode_bits_of,
    summarise_elbo,
    summarise_ode,
)
from pipeline.samplers.model import Model, build_model
from pipeline.seeding import key
from tests.unit.test_engine import make_model

FIRST, LAST = 6.0, -40.0
"""log-SNR of the data's end and of the noise's, where N(0, I) is wrong by 1e-9."""

MEANS = torch.tensor([[0.8, 0.5], [-0.6, 0.2], [0.1, -0.9]], dtype=torch.float64)
STDS = torch.tensor([[0.3, 0.2], [0.15, 0.4], [0.25, 0.25]], dtype=torch.float64)
LOG_WEIGHTS = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log()


def log_q(x: Tensor, alpha_bar: Tensor, components: slice = slice(None)) -> Tensor:
    """log of the marginal at ᾱ (B,) of a mixture of Gaussians in the plane, at x (B, 2)."""
    a = alpha_bar[:, None, None]
    mean, std = MEANS[components], STDS[components]
    variance = a * std**2 + 1 - a
    each = -((x[:, None] - a.sqrt() * mean) ** 2 / variance + (2 * math.pi * variance).log()) / 2
    weights = LOG_WEIGHTS[components] - LOG_WEIGHTS[components].logsumexp(0)
    return (weights + each.sum(-1)).logsumexp(-1)


def exact_x_0(x: Tensor, log_snr: Tensor, components: slice = slice(None)) -> Tensor:
    """E[x_0 | x_t] by Tweedie's formula from the density: (x + (1-ᾱ) ∇ log q)/√ᾱ."""
    a = log_snr.sigmoid()
    if not x.requires_grad:
        x = x.detach().requires_grad_()
    with torch.enable_grad():
        (score,) = torch.autograd.grad(log_q(x, a, components).sum(), x, create_graph=True)
    return (x + (1 - a)[:, None] * score) / a.sqrt()[:, None]


def points(n: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 2, generator=generator, dtype=torch.float64) * 0.7


ONE, ALL = slice(0, 1), slice(None)


@pytest.mark.parametrize("components", [ONE, ALL], ids=["Gaussian", "mixture"])
def test_with_the_exact_trace_it_is_the_density_at_the_first_level(components: slice) -> None:
    x = points(12)
    want = log_q(x, torch.full((12,), FIRST, dtype=torch.float64).sigmoid(), components)
    errors = []
    for tolerance in (1e-6, 1e-8):
        got, evaluations = log_density(
            lambda x, log_snr: exact_x_0(x, log_snr, components),
            x,
            FIRST,
            LAST,
            None,
            tolerance,
            tolerance,
        )
        errors.append(float((got - want).abs().max()))
    assert errors[0] < 1e-4
    assert errors[1] < 2e-6
    assert evaluations.min() > 100


def test_hutchinsons_estimate_is_exact_where_dimensions_do_not_mix() -> None:
    x = points(12)
    want = log_q(x, torch.full((12,), FIRST, dtype=torch.float64).sigmoid(), ONE)
    signs = draw_signs(list(range(12)), (2,))
    got, _ = log_density(
        lambda x, log_snr: exact_x_0(x, log_snr, ONE), x, FIRST, LAST, signs, 1e-8, 1e-8
    )
    torch.testing.assert_close(got, want, rtol=0, atol=2e-6)


def test_hutchinsons_estimate_is_unbiased_where_they_do() -> None:
    """In the plane vᵀJv = tr J ± (J_12 + J_21): four signs, which average to the trace."""
    x = points(6)
    four = torch.tensor([[1, 1], [1, -1], [-1, 1], [-1, -1]], dtype=torch.float64)
    got, _ = log_density(
        exact_x_0, x.repeat_interleave(4, 0), FIRST, LAST, four.repeat(6, 1), 1e-8, 1e-8
    )
    got = got.reshape(6, 4)
    want = log_q(x, torch.full((6,), FIRST, dtype=torch.float64).sigmoid())
    torch.testing.assert_close(got.mean(1), want, rtol=0, atol=5e-6)
    assert got.std(1).max() > 0.01, "the estimate has a variance here"


def test_traces_are_those_of_the_jacobian() -> None:
    generator = torch.Generator().manual_seed(0)
    A = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    x = torch.randn(3, 5, generator=generator, dtype=torch.float64).requires_grad_()
    y = (x @ A.T).sin()
    jacobians = [torch.diag((A @ row).cos()) @ A for row in x.detach()]
    trace = torch.stack([J.trace() for J in jacobians])
    torch.testing.assert_close(exact_trace(y, x), trace, rtol=1e-12, atol=0)
    v = draw_signs([1, 2, 3], (5,))
    want = torch.stack([u @ J @ u for J, u in zip(jacobians, v, strict=True)])
    torch.testing.assert_close(hutchinson_trace((x @ A.T).sin(), x, v), want, rtol=1e-12, atol=0)
    # over many draws the mean is the trace, within 4 standard errors
    n = 20_000
    v = draw_signs(list(range(n)), (5,))
    estimates = torch.einsum("ni,ij,nj->n", v, jacobians[0], v)
    assert abs(float(estimates.mean() - trace[0])) < 4 * float(estimates.std()) / n**0.5
    assert v.abs().min() == v.abs().max() == 1


def test_the_mean_over_the_dequantisation_is_the_probability_of_the_pixel() -> None:
    """E_u[2^-bits] = P(k), the mass of the model's law in the bin of k: the offset, to 4 digits.

    The model is an image of one pixel with x_0 ~ N(m, s²); its law at the first level is known.
    """
    m, s, log_snr = 0.2, 0.02, 6.0
    a = torch.tensor(log_snr, dtype=torch.float64).sigmoid()

    def predict_x_0(x: Tensor, log_snr: Tensor) -> Tensor:
        a = log_snr.sigmoid()[:, None]
        return m + a.sqrt() * s**2 / (a * s**2 + 1 - a) * (x - a.sqrt() * m)

    sigma = float((s**2 + (1 - a) / a).sqrt())  # of x_t/√ᾱ
    for pixel in (147, 152, 160):
        x_0 = to_unit(torch.full((400, 1, 1, 1), pixel, dtype=torch.uint8)).reshape(400, 1)
        x = dequantised(x_0, list(range(400)))
        assert ((x - x_0).abs() <= 1 / 255 + 1e-7).all()
        bits, _ = bits_per_dim(predict_x_0, x, log_snr, LAST, None, 1e-8, 1e-8)
        probabilities = (-bits * math.log(2)).exp()
        edges = torch.tensor([pixel - 0.5, pixel + 0.5], dtype=torch.float64) / 127.5 - 1
        below, above = torch.special.ndtr((edges - m) / sigma)
        error = float(probabilities.std()) / 20
        assert float(probabilities.mean()) == pytest.approx(float(above - below), abs=4 * error)
        assert error < 0.01 * float(above - below)


# --- of a model ---------------------------------------------------------------------------------


SHORT = make_model(["a", "b"], schedule="betas", betas=[0.5, 0.5], timesteps=2)
"""A network that was not trained, whose ODE is over after a few steps."""


@pytest.fixture(scope="module")
def images() -> ImageSet:
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (40, 8, 8, 1), dtype=np.uint8)
    return ImageSet(pixels, generator.integers(NO_LABEL, 2, 40))


def at(images: ImageSet, *rows: int) -> ImageSet:
    return ImageSet(images.images[list(rows)], images.labels[list(rows)])


def zero_network(model: Model) -> Model:
    zeros = {name: torch.zeros_like(t) for name, t in model.network.state_dict().items()}
    return build_model(model.spec, zeros, "")


def test_a_model_that_predicts_zero_noise_has_bits_in_closed_form(images: ImageSet) -> None:
    """With ε̂ = 0 the flow is dx/dλ = ½σ²x, which scales x: by √(ᾱ_noise/ᾱ_data)."""
    model = zero_network(make_model(["a", "b"], timesteps=12))
    got = ode_bits_of(model, at(images, 0, 1, 2, 3, 4), np.arange(5), 7, "hutchinson", draws=2)
    first, last = model.schedule.alpha_bar[[0, -1]]
    scale = float((last / first).sqrt())
    for draw in range(2):
        x_0 = to_unit(torch.from_numpy(images.images[:5]))
        x = dequantised(x_0, [key(7, "dequantise", i, draw) for i in range(5)])
        x_T = (x * float(first.sqrt()) * scale).flatten(1)
        log_p = -(x_T.square() + math.log(2 * math.pi)).sum(1) / 2 + 64 * math.log(scale)
        nats = -log_p / 64 - float(first.log()) / 2 + math.log(127.5)
        torch.testing.assert_close(got.bits[:, draw], nats / math.log(2), rtol=0, atol=1e-4)


def test_hutchinsons_estimate_agrees_with_the_exact_trace_of_a_network(images: ImageSet) -> None:
    """Each image has the same dequantisation by both, and the difference is 0 on average."""
    few = ImageSet(images.images[:, :4, :4], images.labels)  # of 16 dimensions
    exact, estimate = (
        ode_bits_of(SHORT, at(few, *range(12)), np.arange(12), 0, trace).bits[:, 0]
        for trace in ("exact", "hutchinson")
    )
    difference = estimate - exact
    error = float(difference.std()) / 12**0.5
    assert abs(float(difference.mean())) < 3 * error
    assert 0.001 < error < 0.1


def test_chunks_are_of_the_whole_and_in_no_order() -> None:
    chunks = choose_chunks(40, 1000, seed=3)
    assert [len(chunk) for chunk in chunks] == [IMAGES_PER_CHUNK, IMAGES_PER_CHUNK, 8]
    chosen = np.concatenate(chunks)
    assert len(set(chosen)) == 40
    assert chosen.min() >= 0
    assert chosen.max() < 1000
    assert 300 < chosen.mean() < 700
    more = np.concatenate(choose_chunks(60, 1000, seed=3))
    assert np.array_equal(more[:40], chosen)
    assert sorted(np.concatenate(choose_chunks(99, 20, seed=3))) == list(range(20))
    assert choose_chunks(0, 20, 3) == choose_chunks(5, 0, 3) == []


def test_an_images_figures_do_not_depend_on_its_chunk(images: ImageSet) -> None:
    model = make_model(["a", "b"], variance="learned_range", timesteps=12)
    together = elbo_of(model, at(images, 3, 9, 5), np.array([3, 9, 5]), seed=1)
    alone = elbo_of(model, at(images, 5), np.array([5]), seed=1)
    torch.testing.assert_close(alone.total[0], together.total[2], rtol=1e-5, atol=0)
    other = elbo_of(model, at(images, 5), np.array([5]), seed=2)
    assert abs(float(other.total[0] / alone.total[0]) - 1) > 1e-4
    odes = ode_bits_of(SHORT, at(images, 3, 5), np.array([3, 5]), 1, "hutchinson")
    ode = ode_bits_of(SHORT, at(images, 5), np.array([5]), 1, "hutchinson")
    torch.testing.assert_close(ode.bits[0], odes.bits[1], rtol=1e-5, atol=0)


def test_a_model_whose_last_level_is_noise_alone_is_refused(images: ImageSet) -> None:
    model = make_model(["a"], zero_terminal_snr=True, prediction="v")
    with pytest.raises(UserError, match="ode_images must be 0 for a model with zero_terminal_snr"):
        ode_bits_of(model, at(images, 0), np.arange(1), 0, "exact")


def test_the_report_of_the_bound_adds_up() -> None:
    generator = torch.Generator().manual_seed(0)
    terms = torch.rand(10, 200, generator=generator, dtype=torch.float64)
    prior = torch.rand(10, generator=generator, dtype=torch.float64)
    report = summarise_elbo([Elbo(prior[:6], terms[:6]), Elbo(prior[6:], terms[6:])])
    total = prior + terms.sum(1)
    assert report["value"] == pytest.approx(float(total.mean()))
    assert report["value"] == pytest.approx(sum(report["by_term"].values()))
    assert report["standard_error"] == pytest.approx(float(total.std()) / 10**0.5)
    assert (report["n"], report["network_evaluations"]) == (10, 200)
    t, bits = report["per_timestep"]["t"], report["per_timestep"]["bits"]
    widths = np.diff([*t, 200])
    assert t[0] == 1
    assert float((widths * bits).sum()) == pytest.approx(report["by_term"]["kl"])
    short = summarise_elbo([Elbo(prior[:1], terms[:1, :2])])
    assert short["per_timestep"]["t"] == [1]
    assert short["standard_error"] is None


def test_the_report_of_the_ode_states_the_spread_of_draws() -> None:
    bits = torch.tensor([[3.0, 3.2], [4.0, 4.4]], dtype=torch.float64)
    counts = torch.tensor([[80, 86], [92, 98]])
    report = summarise_ode([OdeBits(bits[:1], counts[:1]), OdeBits(bits[1:], counts[1:])], "exact")
    assert report["value"] == pytest.approx(3.65)
    assert report["standard_error"] == pytest.approx(0.55)
    assert report["spread_of_draws"] == pytest.approx(((0.02 + 0.08) / 2) ** 0.5)
    assert (report["n"], report["draws"], report["trace"]) == (2, 2, "exact")
    assert report["network_evaluations"] == 89
    once = summarise_ode([OdeBits(bits[:1, :1], counts[:1, :1])], "hutchinson")
    assert once["spread_of_draws"] is once["standard_error"] is None
