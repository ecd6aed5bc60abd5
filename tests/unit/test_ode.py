"""The adaptive solver, row by row, against scipy; the probability flow against known flow maps."""

import itertools

import numpy as np
import pytest
import torch
from scipy.integrate import solve_ivp
from torch import Tensor

from pipeline.diffusion.gaussian import one_by_one
from pipeline.diffusion.ode import flow, integrate
from pipeline.diffusion.schedules import cosine, linear
from pipeline.diffusion.sde import VP
from pipeline.errors import UserError
from pipeline.samplers.config import SamplingConfig
from pipeline.samplers.probability_flow import probability_flow
from pipeline.serving.engine import ImageRequest
from pipeline.serving.offline import draw
from tests.mixture import GAUSSIAN, TWO_MODES, Mixture
from tests.unit.test_engine import make_model


def rabbits_and_foxes(x: Tensor, t: Tensor) -> Tensor:
    """Lotka-Volterra with a season: nonlinear, and not the same at all times."""
    rabbits, foxes = x[:, 0], x[:, 1]
    return torch.stack([rabbits * (1.5 - foxes) + 0.1 * t.sin(), foxes * (rabbits - 3)], dim=1)


STARTS = torch.tensor([[10.0, 5.0], [1.0, 1.0], [3.0, 1.5]], dtype=torch.float64)


@pytest.mark.parametrize("tolerance", [1e-3, 1e-6, 1e-9])
@pytest.mark.parametrize(("start", "end"), [(0.0, 6.0), (6.0, 0.0)])
def test_each_row_takes_the_steps_that_scipy_takes_with_it(
    tolerance: float, start: float, end: float
) -> None:
    got = integrate(rabbits_and_foxes, STARTS, start, end, tolerance, tolerance)
    for i, x in enumerate(STARTS):
        want = solve_ivp(
            lambda t, y: rabbits_and_foxes(torch.tensor(y)[None], torch.tensor([t]))[0].numpy(),
            (start, end),
            x.numpy(),
            rtol=tolerance,
            atol=tolerance,
        )
        assert got.evaluations[i] == want.nfev
        np.testing.assert_allclose(got.x[i].numpy(), want.y[:, -1], rtol=1e-6)
    assert len(set(got.evaluations.tolist())) == 3, "the rows had to differ for this to mean much"


def test_a_row_alone_is_the_row_in_a_batch_bit_for_bit() -> None:
    together = integrate(rabbits_and_foxes, STARTS.repeat(7, 1), 0.0, 6.0, 1e-5, 1e-5)
    for i, x in enumerate(STARTS):
        alone = integrate(rabbits_and_foxes, x[None], 0.0, 6.0, 1e-5, 1e-5)
        for j in range(i, 21, 3):
            assert torch.equal(alone.x[0], together.x[j])
            assert alone.evaluations[0] == together.evaluations[j]


@pytest.mark.parametrize("function", [torch.sigmoid, torch.exp, linear(1000).t_at])
def test_coefficients_do_not_depend_on_how_many_there_are(function: object) -> None:
    c = torch.linspace(-9, 9, 37, dtype=torch.float64)
    together = one_by_one(function, c)  # type: ignore[arg-type]
    for i in range(37):
        assert torch.equal(one_by_one(function, c[i : i + 1])[0], together[i])  # type: ignore[arg-type]


def test_a_solver_that_cannot_go_on_says_so() -> None:
    def blows_up(x: Tensor, t: Tensor) -> Tensor:  # 1/(1-t): infinite at t = 1
        return x.square()

    one = torch.ones(1, 1, dtype=torch.float64)
    with pytest.raises(UserError, match="steps have become too small: raise rtol=1e-06"):
        integrate(blows_up, one, 0.0, 2.0, 1e-6, 1e-6)
    with pytest.raises(UserError, match=r"after \d+ network evaluations, and that is its limit"):
        integrate(rabbits_and_foxes, STARTS, 0.0, 6.0, 1e-9, 1e-9, max_evaluations=500)
    with pytest.raises(UserError, match="too small"):
        integrate(lambda x, t: x * torch.nan, one, 0.0, 1.0, 1e-6, 1e-6)


# --- the probability flow -----------------------------------------------------------------------


def flow_of(data: Mixture, x: Tensor, log_snr: Tensor) -> Tensor:
    return flow(x, data.x_0(x, log_snr, log_snr.sigmoid()), log_snr)


def test_the_flow_is_that_of_the_sde_in_another_time() -> None:
    """dx/dt = f x - ½ g² s (Song et al. 2021, Eq. 13) is dx/dλ · dλ/dt."""
    sde, data = VP(), TWO_MODES
    t = torch.linspace(0.05, 1, 20, dtype=torch.float64, requires_grad=True)
    mean, std = sde.marginal(t)
    log_snr = 2 * (mean / std).log()
    (slope_of_log_snr,) = torch.autograd.grad(log_snr.sum(), t)
    x = torch.linspace(-2, 2, 20, dtype=torch.float64)[:, None]
    mean, std, log_snr, t = (c.detach()[:, None] for c in (mean, std, log_snr, t))
    x_0 = data.x_0(x, t[:, 0], mean[:, 0] ** 2)
    score = (mean * x_0 - x) / std**2
    want = sde.drift(t) * x - sde.diffusion(t) ** 2 * score / 2
    got = flow(x, x_0, log_snr[:, 0]) * slope_of_log_snr[:, None]
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("data", [GAUSSIAN, TWO_MODES], ids=["Gaussian", "mixture"])
def test_the_flow_keeps_the_quantile_and_its_error_falls_with_the_tolerance(data: Mixture) -> None:
    high, low = torch.tensor([-9.0, 8.0], dtype=torch.float64)
    x = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    want = data.flow(x, high.sigmoid(), low.sigmoid())
    errors = []
    for tolerance in (1e-5, 1e-7, 1e-9):
        got = integrate(
            lambda x, log_snr: flow_of(data, x, log_snr), x, -9.0, 8.0, tolerance, tolerance
        )
        errors.append(float((got.x - want).abs().max()))
        assert errors[-1] < 10 * tolerance
    assert all(finer < coarser / 20 for coarser, finer in itertools.pairwise(errors))


def test_forth_and_back_returns() -> None:
    x = torch.linspace(-1.5, 1.5, 7, dtype=torch.float64)[:, None]

    def slope(x: Tensor, log_snr: Tensor) -> Tensor:
        return flow_of(TWO_MODES, x, log_snr)

    there = integrate(slope, x, 8.0, -9.0, 1e-9, 1e-9).x
    assert (there - x).abs().max() > 0.1
    torch.testing.assert_close(
        integrate(slope, there, -9.0, 8.0, 1e-9, 1e-9).x, x, atol=1e-6, rtol=0
    )


# --- the sampler --------------------------------------------------------------------------------


def test_the_sampler_ends_in_x_0_of_the_flow_at_the_first_level() -> None:
    schedule = cosine(1000)
    x_T = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(9, 1, 1, 1)
    ends = schedule.alpha_bar[[-1, 0]]
    sampling = SamplingConfig(sampler="ode", rtol=1e-9, atol=1e-9, clip_x_0=False)

    def predict(x: Tensor, rows: Tensor) -> tuple[Tensor, None]:
        return TWO_MODES.x_0(x, rows[:, 0], rows[:, 1]), None

    got, evaluations = probability_flow(schedule, predict, x_T, sampling)
    first = TWO_MODES.flow(x_T, *ends)
    want = TWO_MODES.x_0(first, ends[1], ends[1])
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert ((evaluations - 3) % 6 == 0).all(), "2 to begin, 6 a step, 1 for x̂_0 at the end"


ODE = SamplingConfig(sampler="ode", rtol=1e-2, atol=1e-2)
SETTINGS = [
    ODE,
    ODE.model_copy(update={"clip_x_0": False, "guidance": 1.0, "guidance_rescale": 0.5}),
    ODE.model_copy(update={"guidance": 2.0, "guidance_interval": (0.1, 5.0)}),
]


def test_an_image_does_not_depend_on_the_company_it_is_drawn_in() -> None:
    model = make_model(["a", "b", "c"])
    requests = [ImageRequest(3, i, i % 3, SETTINGS[i % 3]) for i in range(6)]
    requests += [ImageRequest(3, i, 0, ODE) for i in range(20, 35)]
    together = draw(model, requests)
    for i in (1, 2, 9, 20):
        alone = draw(model, [requests[i]])
        assert np.array_equal(alone.pixels[0], together.pixels[i])
        assert alone.evaluations[0] == together.evaluations[i]
    assert len(set(together.evaluations[6:])) > 1, "the images took different steps"
