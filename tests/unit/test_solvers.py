"""Solvers of the probability flow and of the reverse SDE, held to exact solutions.

The data are one-dimensional, with E[x_0 | x_t] in closed form: a normal distribution, for which a
plan is linear and its output law exact, and a mixture of two, for which the flow is not linear. In
one dimension the flow moves a point to the same quantile of the next marginal.
"""

import itertools
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from pipeline.diffusion.schedules import (
    Schedule,
    cosine,
    from_sde,
    linear,
    with_zero_terminal_snr,
)
from pipeline.diffusion.sde import VE, VP, SubVP
from pipeline.samplers.ddim import ddim
from pipeline.samplers.dpm_solver import Form, dpm_solver
from pipeline.samplers.euler import euler
from pipeline.samplers.euler_maruyama import euler_maruyama
from pipeline.samplers.heun import heun
from pipeline.samplers.plan import (
    ALPHA_BAR,
    MATRIX,
    NUM_SOURCES,
    X_0,
    Plan,
    T,
    X,
    needs_noise,
    run_plan,
)
from pipeline.samplers.spacing import make_times
from tests.mixture import Mixture

MEAN, STD = 0.7, 0.4
MIXTURE = Mixture((0.3, 0.7), (-1.0, 0.8), (0.5, 0.4))
NORMAL = Mixture((1.0,), (MEAN,), (STD,))
POINTS = torch.linspace(-2, 2, 9, dtype=torch.float64).reshape(-1, 1, 1, 1)

Make = Callable[[Schedule, Tensor], Plan]


def dpm(order: int, form: Form, singlestep: bool = False, stochastic: bool = False) -> Make:
    return lambda schedule, times: dpm_solver(
        schedule, times, order, form, singlestep=singlestep, stochastic=stochastic
    )


FLOW: dict[str, tuple[Make, int]] = {
    "ddim": (lambda schedule, times: ddim(schedule, times, 0.0), 1),
    "euler": (euler, 1),
    "heun": (heun, 2),
    "dpm-1": (dpm(1, "eps"), 1),
    "dpm-2": (dpm(2, "eps"), 2),
    "dpm-2-single": (dpm(2, "eps", singlestep=True), 2),
    "dpm-3": (dpm(3, "eps"), 3),
    "dpm-3-single": (dpm(3, "eps", singlestep=True), 3),
    "dpm++-1": (dpm(1, "x_0", singlestep=True), 1),
    "dpm++-2": (dpm(2, "x_0"), 2),
    "dpm++-2-single": (dpm(2, "x_0", singlestep=True), 2),
    "dpm++-3": (dpm(3, "x_0"), 3),
    "dpm++-3-single": (dpm(3, "x_0", singlestep=True), 3),
}
"""Solvers of the probability flow, with their orders."""
REVERSE: dict[str, Make] = {
    "sde-dpm++-1": dpm(1, "x_0", stochastic=True),
    "sde-dpm++-2": dpm(2, "x_0", stochastic=True),
    "euler churned": lambda schedule, times: euler(schedule, times, 5.0, 0.05, 20.0),
    "heun churned": lambda schedule, times: heun(schedule, times, 5.0, 0.05, 20.0),
    "euler_maruyama": euler_maruyama,
}
ALL = {name: make for name, (make, _) in FLOW.items()} | REVERSE

SCHEDULES = {
    "vp": from_sde(VP(), 1000),
    "subvp": from_sde(SubVP(), 1000),
    "ve": from_sde(VE(), 1000),
    "linear": linear(1000),
}


def normal_law(alpha_bar: Tensor) -> tuple[float, float]:
    """Mean and variance of x_t for x_0 ~ N(MEAN, STD²)."""
    return float(alpha_bar.sqrt() * MEAN), float(alpha_bar * STD**2 + 1 - alpha_bar)


def law_of(plan: Plan) -> tuple[float, float]:
    """Mean and variance of the plan's output for normal data, from the true law at its first level.

    The plan is linear: image 0 carries the mean, 1 a unit of the start, each other one a unit of
    one row's noise.
    """
    mean, variance = normal_law(plan.table[0, ALPHA_BAR])
    x = torch.full((len(plan) + 2, 1, 1, 1), mean, dtype=torch.float64)
    x[1] += math.sqrt(variance)

    def unit(i: int) -> Tensor:
        z = torch.zeros_like(x)
        z[2 + i] = 1
        return z

    out = run_plan(plan, NORMAL.x_0, x, unit).flatten()
    return out[0].item(), (out[1:] - out[0]).square().sum().item()


def refuse(i: int) -> Tensor:
    raise AssertionError(f"row {i} asks for noise")


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def times_between(schedule: Schedule, high: float, low: float, steps: int) -> Tensor:
    """Times with evenly spaced log-SNR, (steps+1,): neither end is the clean image."""
    return schedule.t_at(torch.linspace(high, low, steps + 1, dtype=torch.float64))


def order_of(errors: dict[int, float]) -> float:
    """The slope of -log error against log N, by least squares."""
    n = torch.tensor(list(errors), dtype=torch.float64).log()
    error = torch.tensor(list(errors.values()), dtype=torch.float64).log()
    n, error = n - n.mean(), error - error.mean()
    return -float((n * error).sum() / (n * n).sum())


@pytest.mark.parametrize("name", FLOW)
@pytest.mark.parametrize("process", ["vp", "ve"])
def test_solvers_of_the_flow_converge_at_their_order(name: str, process: str) -> None:
    """On a mixture, where the flow is not linear. The multistep solvers start at order 1, which
    costs nothing where x̂_0 is still constant: they begin at the noisiest levels."""
    make, order = FLOW[name]
    schedule = SCHEDULES[process]
    errors = {}
    for steps in (64, 96, 144):
        times = times_between(schedule, float(schedule.log_snr[-1]) + 0.1, 1.0, steps)
        alpha_bar = schedule.alpha_bar_at(times)
        got = run_plan(make(schedule, times), MIXTURE.x_0, POINTS, refuse)
        want = MIXTURE.flow(POINTS, alpha_bar[0], alpha_bar[-1])
        errors[steps] = float((got - want).abs().max())
    assert order_of(errors) == pytest.approx(order, abs=0.2)


@pytest.mark.parametrize("name", FLOW)
def test_solvers_of_the_flow_reach_the_normal_law(name: str) -> None:
    make, order = FLOW[name]
    schedule = SCHEDULES["vp"]
    plan = make(schedule, times_between(schedule, -9.5, 3.0, 200))
    want = normal_law(schedule.alpha_bar_at(times_between(schedule, -9.5, 3.0, 1)[-1]))
    tolerance = {1: 2e-2, 2: 2e-4, 3: 2e-6}[order]
    assert law_of(plan) == pytest.approx(want, abs=tolerance)


@pytest.mark.parametrize("process", SCHEDULES)
def test_euler_maruyama_converges_weakly_at_order_1(process: str) -> None:
    schedule = SCHEDULES[process]
    first, last = times_between(schedule, -6.0, 4.0, 1).tolist()
    mean, variance = normal_law(schedule.alpha_bar_at(torch.tensor(last, dtype=torch.float64)))
    of_mean, of_variance = {}, {}
    for steps in (64, 128, 256):
        times = torch.linspace(first, last, steps + 1, dtype=torch.float64)
        got = law_of(euler_maruyama(schedule, times))
        of_mean[steps], of_variance[steps] = abs(got[0] - mean), abs(got[1] - variance)
    assert of_variance[256] < 4e-3
    assert order_of(of_variance) == pytest.approx(1, abs=0.25)
    if process == "ve":  # no drift: the mean stays
        assert of_mean[64] < 1e-12
    else:
        assert order_of(of_mean) == pytest.approx(1, abs=0.25)


@pytest.mark.parametrize(
    ("name", "order"),
    [("sde-dpm++-1", 1), ("sde-dpm++-2", 2), ("euler churned", 1), ("heun churned", 2)],
)
@pytest.mark.parametrize("process", ["vp", "subvp", "ve"])
def test_noisy_solvers_converge_to_the_variance_and_keep_the_mean(
    name: str, order: int, process: str
) -> None:
    """Their noise is drawn from exact transitions, so that for linear x̂_0 the mean has no error."""
    schedule = SCHEDULES[process]
    errors = {}
    for steps in (64, 128, 256):
        times = times_between(schedule, -6.0, 4.0, steps)
        mean, variance = normal_law(schedule.alpha_bar_at(times[-1]))
        plan = REVERSE[name](schedule, times)
        assert needs_noise(plan.table).any()
        got = law_of(plan)
        assert got[0] == pytest.approx(mean, abs=1e-12)
        errors[steps] = abs(got[1] - variance)
    assert order_of(errors) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("process", [*SCHEDULES, "cosine"])
def test_the_last_row_returns_x_0_and_every_entry_is_finite(name: str, process: str) -> None:
    schedule = cosine(1000) if process == "cosine" else SCHEDULES[process]
    for steps in (1, 2, 3, 10):
        for spacing in ("trailing", "karras"):
            plan = ALL[name](schedule, make_times(schedule, steps, spacing))
            assert plan.table[:, MATRIX].isfinite().all()
            assert plan.table[:, ALPHA_BAR].gt(0).all()
            assert plan[X, X_0][-1] == 1
            assert plan.table[-1, MATRIX][:NUM_SOURCES].count_nonzero() == 1


@pytest.mark.parametrize("name", FLOW)
def test_without_churn_no_row_asks_for_noise(name: str) -> None:
    schedule = cosine(1000)
    plan = FLOW[name][0](schedule, make_times(schedule, 20, "trailing"))
    assert not needs_noise(plan.table).any()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("process", ["vp", "linear"])
def test_the_timestep_of_a_row_has_its_noise_level(name: str, process: str) -> None:
    """Between the visited times, too, and where churn has raised the level."""
    schedule = SCHEDULES[process]
    plan = ALL[name](schedule, make_times(schedule, 20, "trailing")[1:])
    got = schedule.alpha_bar_at(plan.table[:, T]).logit()
    torch.testing.assert_close(got, plan.table[:, ALPHA_BAR].logit(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("name", ALL)
def test_a_terminal_snr_of_0_is_left_by_a_finite_step(name: str) -> None:
    schedule = with_zero_terminal_snr(linear(1000))
    times = make_times(schedule, 20, "trailing")
    if name == "euler_maruyama":
        with pytest.raises(ValueError, match="cannot start at a signal-to-noise ratio of 0"):
            ALL[name](schedule, times)
        return
    plan = ALL[name](schedule, times)
    assert plan.table[:, MATRIX].isfinite().all()
    assert plan.table[0, ALPHA_BAR] == 0
    assert plan.table[0, T] == 999
    if name in FLOW:  # from there the flow starts at N(0, 1)
        mean, variance = law_of(plan)
        assert mean == pytest.approx(MEAN, abs=0.05)
        assert variance**0.5 == pytest.approx(STD, abs=0.15)


@pytest.mark.parametrize("make", [euler, dpm(1, "eps"), dpm(1, "x_0"), dpm(1, "x_0", True)])
@pytest.mark.parametrize("process", ["vp", "linear"])
def test_solvers_of_order_1_are_ddim(make: Make, process: str) -> None:
    schedule = SCHEDULES[process]
    times = make_times(schedule, 30, "trailing")
    want = ddim(schedule, times, 0.0).table
    torch.testing.assert_close(make(schedule, times).table, want, rtol=1e-12, atol=1e-14)


def test_the_stochastic_solver_of_order_1_is_ddim_with_eta_1() -> None:
    times = make_times(cosine(1000), 30, "trailing")
    got = dpm_solver(cosine(1000), times, 1, "x_0", stochastic=True).table
    torch.testing.assert_close(got, ddim(cosine(1000), times, 1.0).table, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    ("name", "evaluations"),
    [("heun", 19), ("dpm-2", 10), ("dpm-3-single", 28), ("dpm++-2-single", 19), ("euler", 10)],
)
def test_network_evaluations_of_10_steps(name: str, evaluations: int) -> None:
    schedule = linear(1000)
    assert len(FLOW[name][0](schedule, make_times(schedule, 10, "trailing"))) == evaluations


@pytest.mark.parametrize("make", [euler, heun])
@pytest.mark.parametrize("process", ["ve", "linear"])
def test_churn_follows_algorithm_2_of_karras(make: Callable[..., Plan], process: str) -> None:
    """The paper's loop in its own frame, x̃ = x/√ᾱ, with the same noise."""
    schedule = SCHEDULES[process]
    steps, churn, low, high, scale = 12, 4.0, 0.1, 10.0, 1.007
    times = make_times(schedule, steps, "karras")
    alpha_bar = schedule.alpha_bar_at(times)
    sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
    z = torch.randn(2 * steps, 9, 1, 1, 1, dtype=torch.float64, generator=generator())

    def denoise(x: Tensor, sigma: Tensor) -> Tensor:
        a = 1 / (1 + sigma**2).expand(len(x))
        return MIXTURE.x_0(x / (1 + sigma**2).sqrt(), a, a)

    row = -1  # churn draws its noise from the row before
    x = POINTS * (1 + sigma[0] ** 2).sqrt()
    for i in range(steps):
        gamma = min(churn / steps, math.sqrt(2) - 1) if low <= sigma[i] <= high else 0.0
        sigma_hat = sigma[i] * (1 + gamma)
        if gamma:
            x = x + (sigma_hat**2 - sigma[i] ** 2).sqrt() * scale * z[row]
        slope = (x - denoise(x, sigma_hat)) / sigma_hat
        following = x + (sigma[i + 1] - sigma_hat) * slope
        row += 1
        if make is heun and sigma[i + 1] > 0:
            corrected = (following - denoise(following, sigma[i + 1])) / sigma[i + 1]
            following = x + (sigma[i + 1] - sigma_hat) * (slope + corrected) / 2
            row += 1
        x = following
    plan = make(schedule, times, churn, low, high, scale)
    got = run_plan(plan, MIXTURE.x_0, POINTS, lambda i: z[i])
    torch.testing.assert_close(got, x, rtol=0, atol=1e-9)
    assert needs_noise(plan.table).any()


def test_churn_at_the_first_level_starts_above_it() -> None:
    schedule = SCHEDULES["ve"]
    plan = euler(schedule, make_times(schedule, 10, "karras"), churn=1.0)
    first = plan.table[0, ALPHA_BAR]
    assert float(((1 - first) / first).sqrt()) == pytest.approx(50 * 1.1, rel=1e-12)
    assert plan.table[0, T] == pytest.approx(999)
    assert needs_noise(plan.table).tolist() == [True] * 9 + [False]


def test_churn_is_bounded_by_the_square_root_of_2() -> None:
    schedule = SCHEDULES["ve"]
    first = euler(schedule, make_times(schedule, 10, "karras"), churn=100.0).table[0, ALPHA_BAR]
    assert float(((1 - first) / first).sqrt()) == pytest.approx(50 * math.sqrt(2), rel=1e-12)


@pytest.mark.parametrize("process", ["vp", "subvp", "ve"])
def test_euler_maruyama_follows_the_sde_in_its_own_frame(process: str) -> None:
    """Song et al. 2021, Eq. 6, on x_t = m x_0 + s ε, with the same noise."""
    schedule, steps = SCHEDULES[process], 50
    sde = schedule.sde
    assert sde is not None
    times = make_times(schedule, steps, "linspace")
    z = torch.randn(steps, 9, 1, 1, 1, dtype=torch.float64, generator=generator())
    u = sde.t_min + (1 - sde.t_min) * times / 999
    mean, std = sde.marginal(u)

    def denoise(x: Tensor, i: int) -> Tensor:
        norm = (mean[i] ** 2 + std[i] ** 2).sqrt()
        a = (mean[i] / norm).square().expand(len(x))
        return MIXTURE.x_0(x / norm, a, a)

    x = POINTS * (mean[0] ** 2 + std[0] ** 2).sqrt()
    for i in range(steps - 1):
        dt = u[i + 1] - u[i]
        score = -(x - mean[i] * denoise(x, i)) / std[i] ** 2
        g = sde.diffusion(u[i])
        x = x + (sde.drift(u[i]) * x - g**2 * score) * dt + g * (-dt).sqrt() * z[i]
    x = denoise(x, steps - 1)
    got = run_plan(euler_maruyama(schedule, times), MIXTURE.x_0, POINTS, lambda i: z[i])
    torch.testing.assert_close(got, x, rtol=0, atol=1e-10)


def test_dpm_solver_3_follows_algorithm_2_of_the_paper() -> None:
    """Lu et al. 2022a, with r_1 = 1/3 and r_2 = 2/3, for ε̂."""
    schedule = SCHEDULES["vp"]
    times = times_between(schedule, -8.0, 4.0, 6)

    def eps(x: Tensor, half_log_snr: Tensor) -> Tensor:
        a = (2 * half_log_snr).sigmoid()
        return (x - a.sqrt() * MIXTURE.x_0(x, a, a.expand(len(x)))) / (1 - a).sqrt()

    def alpha_sigma(half_log_snr: Tensor) -> tuple[Tensor, Tensor]:
        return (2 * half_log_snr).sigmoid().sqrt(), (-2 * half_log_snr).sigmoid().sqrt()

    x = POINTS
    levels = schedule.alpha_bar_at(times).logit() / 2
    for t, s in itertools.pairwise(levels):
        h, r_1, r_2 = s - t, 1 / 3, 2 / 3
        (a_t, _), (a_s, n_s) = alpha_sigma(t), alpha_sigma(s)
        (a_1, n_1), (a_2, n_2) = alpha_sigma(t + r_1 * h), alpha_sigma(t + r_2 * h)
        e = eps(x, t)
        u = a_1 / a_t * x - n_1 * (r_1 * h).expm1() * e
        d_1 = eps(u, t + r_1 * h) - e
        u = (
            a_2 / a_t * x
            - n_2 * (r_2 * h).expm1() * e
            - n_2 * r_2 / r_1 * ((r_2 * h).expm1() / (r_2 * h) - 1) * d_1
        )
        d_2 = eps(u, t + r_2 * h) - e
        x = a_s / a_t * x - n_s * h.expm1() * e - n_s / r_2 * (h.expm1() / h - 1) * d_2
    got = run_plan(dpm_solver(schedule, times, 3, "eps", True), MIXTURE.x_0, POINTS, refuse)
    torch.testing.assert_close(got, x, rtol=0, atol=1e-10)


def test_dpm_solver_pp_2_follows_algorithm_2_of_the_paper() -> None:
    """Lu et al. 2022b, multistep; the last step, to the clean image, returns x̂_0."""
    schedule = linear(1000)
    times = make_times(schedule, 8, "trailing")
    alpha_bar = schedule.alpha_bar_at(times)
    a, n, level = alpha_bar.sqrt(), (1 - alpha_bar).sqrt(), alpha_bar.logit() / 2
    x, q = POINTS, []
    for i in range(8):
        q.append(MIXTURE.x_0(x, times[i], alpha_bar[i].expand(len(x))))
        h = level[i + 1] - level[i]
        d = q[-1]
        if 0 < i < 7:
            r = (level[i] - level[i - 1]) / h
            d = (1 + 1 / (2 * r)) * q[-1] - 1 / (2 * r) * q[-2]
        x = n[i + 1] / n[i] * x - a[i + 1] * (-h).expm1() * d
    got = run_plan(dpm_solver(schedule, times, 2, "x_0"), MIXTURE.x_0, POINTS, refuse)
    torch.testing.assert_close(got, x, rtol=0, atol=1e-12)
