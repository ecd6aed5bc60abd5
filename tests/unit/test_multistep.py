"""PNDM, DEIS and UniPC against the exact probability flow: the order with which they converge."""

import math
from collections.abc import Callable

import numpy
import pytest
import torch
from torch import Tensor

from pipeline.diffusion.schedules import Schedule, cosine, from_sde, with_zero_terminal_snr
from pipeline.diffusion.sde import VP
from pipeline.samplers.ddim import ddim
from pipeline.samplers.deis import deis
from pipeline.samplers.multistep import exponential_weights
from pipeline.samplers.plan import ALPHA_BAR, X_0, Plan, X, run_plan
from pipeline.samplers.pndm import pndm
from pipeline.samplers.spacing import make_times
from pipeline.samplers.unipc import unipc
from tests.mixture import GAUSSIAN, TWO_MODES, Mixture

SCHEDULE = from_sde(VP(), 1000)
Solver = Callable[[Schedule, Tensor], Plan]


def of_order(solver: Callable[[Schedule, Tensor, int], Plan], order: int) -> Solver:
    return lambda schedule, times: solver(schedule, times, order)


def log_snr_times(schedule: Schedule, first: float, last: float, steps: int) -> Tensor:
    """(steps+1,) times at even distances in the log-SNR, from first to last, without the -1."""
    ends = schedule.alpha_bar_at(torch.tensor([first, last], dtype=torch.float64)).logit()
    return schedule.t_at(torch.linspace(*ends.tolist(), steps + 1, dtype=torch.float64))


def errors(solver: Solver, data: Mixture, first: float, last: float, steps: int) -> Tensor:
    """The largest distance to the exact flow at each row and at the end, over four x_T."""
    times = log_snr_times(SCHEDULE, first, last, steps)
    plan = solver(SCHEDULE, times)
    alpha_bar = torch.cat([plan.table[:, ALPHA_BAR], SCHEDULE.alpha_bar_at(times[-1:])])
    x_T = torch.tensor([-1.4, -0.3, 0.2, 1.1], dtype=torch.float64).reshape(4, 1)
    states = []

    def predict_x_0(x: Tensor, t: Tensor, alpha_bar: Tensor) -> Tensor:
        states.append(x)
        return data.x_0(x, t, alpha_bar)

    states.append(run_plan(plan, predict_x_0, x_T, lambda i: torch.zeros_like(x_T)))
    exact = data.flow(x_T, alpha_bar[0], alpha_bar.reshape(-1, 1, 1))
    return (torch.stack(states) - exact).abs().amax((1, 2))


def order_of(solver: Solver, data: Mixture) -> float:
    """By which power of N the error falls from 80 to 320 steps.

    The error is the largest of the whole path: at one point it may pass through 0.
    """
    coarse, fine = (errors(solver, data, 999, 0, steps).max() for steps in (80, 320))
    return math.log(coarse / fine, 4)


def order_at_the_end(solver: Solver, data: Mixture, first: float, last: float) -> float:
    coarse, fine = (errors(solver, data, first, last, steps)[-1] for steps in (80, 320))
    return math.log(coarse / fine, 4)


def test_the_flow_of_a_gaussian_is_its_closed_form() -> None:
    """x_s = √ᾱ_s m + √(ᾱ_s std²+1-ᾱ_s)/√(ᾱ_t std²+1-ᾱ_t) (x_t - √ᾱ_t m): the oracle is sound."""
    x_t = torch.linspace(-2, 2, 5, dtype=torch.float64)
    a_t, a_s = torch.tensor([0.01, 0.9], dtype=torch.float64)
    std_t, std_s = ((a * 0.5**2 + 1 - a).sqrt() for a in (a_t, a_s))
    want = a_s.sqrt() * 0.4 + std_s / std_t * (x_t - a_t.sqrt() * 0.4)
    torch.testing.assert_close(GAUSSIAN.flow(x_t, a_t, a_s), want, rtol=0, atol=1e-13)


both = pytest.mark.parametrize("data", [GAUSSIAN, TWO_MODES], ids=["gaussian", "mixture"])


@both
@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis_converges_with_its_order(data: Mixture, order: int) -> None:
    """At low λ, where it starts, the flow hardly turns: the lower orders there do not show yet."""
    assert order_of(of_order(deis, order), data) == pytest.approx(order, abs=0.1)


@both
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc_converges_with_one_order_more_by_its_corrector(data: Mixture, order: int) -> None:
    """Zhao et al. 2023, theorem 3.1 and its corollary: UniPC-p is of order p+1."""
    assert order_of(of_order(unipc, order), data) == pytest.approx(order + 1, abs=0.1)


@both
def test_pndm_converges_with_order_two(data: Mixture) -> None:
    assert order_of(pndm, data) == pytest.approx(2, abs=0.1)


def test_a_start_where_the_flow_turns_shows_the_order_of_the_first_steps() -> None:
    """From the middle of the schedule deis starts with a step of DDIM: h², whatever follows.

    Of unipc that step is corrected to h³, which is what UniPC-2 makes of the others, too.
    """
    start, end = 500, 50
    for solver, order in ((of_order(deis, 3), 2), (of_order(unipc, 2), 3), (pndm, 2)):
        assert order_at_the_end(solver, TWO_MODES, start, end) == pytest.approx(order, abs=0.1)


def test_ten_steps_of_a_higher_order_are_worth_more_than_ten_of_ddim() -> None:
    plain = errors(lambda s, t: ddim(s, t, 0.0), TWO_MODES, 999, 0, 10)[-1]
    for solver in (of_order(deis, 3), of_order(unipc, 2), of_order(unipc, 3), pndm):
        assert errors(solver, TWO_MODES, 999, 0, 10)[-1] < plain / 3


@pytest.mark.parametrize("steps", [1, 2, 3, 10])
def test_deis_of_order_one_is_ddim(steps: int) -> None:
    times = make_times(SCHEDULE, steps, "trailing")
    got, want = deis(SCHEDULE, times, 1), ddim(SCHEDULE, times, 0.0)
    for source in (X, X_0):
        torch.testing.assert_close(got[X, source], want[X, source], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 7, 50])
@pytest.mark.parametrize(
    ("solver", "rows"),
    [
        *((of_order(deis, order), lambda n: n) for order in (1, 2, 3)),
        *((of_order(unipc, order), lambda n: n) for order in (1, 2, 3)),
        (pndm, lambda n: n + (n > 1)),
    ],
)
def test_the_last_row_is_the_clean_image(
    solver: Solver, rows: Callable[[int], int], steps: int
) -> None:
    """One evaluation a step, but for PNDM's warm-up; then x = x̂_0 and nothing else."""
    plan = solver(SCHEDULE, make_times(SCHEDULE, steps, "trailing"))
    assert len(plan) == rows(steps)
    assert [plan[X, source][-1].item() for source in range(7)] == [0, 0, 0, 0, 0, 1, 0]
    assert plan[X, X_0].isfinite().all()


@pytest.mark.parametrize("solver", [deis, unipc])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_a_start_at_a_signal_to_noise_ratio_of_zero_is_finite(
    solver: Callable[[Schedule, Tensor, int], Plan], order: int
) -> None:
    """λ is -∞ there: the level counts as x̂_0 or ε, never as a node of a polynomial."""
    schedule = with_zero_terminal_snr(cosine(1000))
    plan = solver(schedule, make_times(schedule, 50, "trailing"), order)
    x_T = torch.tensor([-1.4, -0.3, 0.2, 1.1], dtype=torch.float64).reshape(4, 1)
    got = run_plan(plan, TWO_MODES.x_0, x_T, lambda i: x_T)
    want = TWO_MODES.flow(x_T, *schedule.alpha_bar_at(torch.tensor([999, 0])))
    assert (got - want).abs().max() < 0.1


def test_pndm_refuses_to_start_at_a_signal_to_noise_ratio_of_zero() -> None:
    schedule = with_zero_terminal_snr(cosine(1000))
    with pytest.raises(ValueError, match="sampler=pndm cannot start"):
        pndm(schedule, make_times(schedule, 10, "trailing"))


@pytest.mark.parametrize("h", [1e-6, 0.01, 0.999, 1.001, 5.0, 20.0])
def test_exponential_weights_integrate_polynomials_exactly(h: float) -> None:
    """Against Gauss-Legendre quadrature of high degree, of e^{-hu} (2u-1)³ + 5u."""
    nodes = [0.0, -1.3, -2.1, 1.0]
    x, w = numpy.polynomial.legendre.leggauss(60)
    u = (x + 1) / 2
    want = (w / 2 * numpy.exp(-h * u) * ((2 * u - 1) ** 3 + 5 * u)).sum()
    weights = exponential_weights(h, nodes)
    got = sum(w * ((2 * u - 1) ** 3 + 5 * u) for w, u in zip(weights, nodes, strict=True))
    assert got == pytest.approx(want, rel=1e-11)
