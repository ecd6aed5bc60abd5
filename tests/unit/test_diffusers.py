"""Our plans against the schedulers of Hugging Face diffusers, an implementation of others' hands.

Both sides follow the same network from the same noise, and are compared after every evaluation. The
schedulers build their tables in float32; the tests give them our float64 tables instead, so that
what is left is the rounding of float64. A few schedulers cast the image itself to float32 in each
step: FLOAT32 is for these.
"""

import itertools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from pipeline.diffusion.config import DiffusionConfig, Prediction, Variance
from pipeline.diffusion.gaussian import predict_eps
from pipeline.diffusion.parameterisation import target, x_0_from
from pipeline.diffusion.schedules import Schedule, cosine, linear, make_schedule
from pipeline.samplers.ancestral import ancestral
from pipeline.samplers.config import SamplingConfig, Spacing
from pipeline.samplers.ddim import ddim
from pipeline.samplers.deis import deis
from pipeline.samplers.dpm_solver import Form, dpm_solver
from pipeline.samplers.euler import euler
from pipeline.samplers.heun import heun
from pipeline.samplers.plan import ALPHA_BAR, LOG_RANGE, Plan, T, X, Z, run_plan, with_settings
from pipeline.samplers.pndm import pndm
from pipeline.samplers.spacing import make_times
from pipeline.samplers.unipc import unipc
from tests import needs
from tests.mixture import TWO_MODES, Mixture

diffusers = needs.package("diffusers", "diffusers")

pytestmark = [
    # diffusers 0.42 hands torch tensors to numpy in the ways of numpy 1
    pytest.mark.filterwarnings("ignore::DeprecationWarning:diffusers"),
    # and wants to drop the first DPM-Solver in favour of DPM-Solver++
    pytest.mark.filterwarnings("ignore:.*algorithm_type.*dpmsolver:FutureWarning"),
]

FLOAT64 = {"rtol": 1e-12, "atol": 1e-12}
FLOAT32 = {"rtol": 2e-6, "atol": 2e-6}

EDM = make_schedule(DiffusionConfig(schedule="edm", prediction="edm"))
PREDICTION_TYPES: dict[Prediction, str] = {"eps": "epsilon", "x_0": "sample", "v": "v_prediction"}

X_T = torch.randn(2, 3, 4, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def network(prediction: Prediction, x: Tensor, alpha_bar: Tensor) -> Tensor:
    """What a perfect network says of x_t: not linear in it, and another thing at each level."""
    x_0 = TWO_MODES.x_0(x, alpha_bar, alpha_bar)
    return target(prediction, x_0, predict_eps(x, x_0, alpha_bar), alpha_bar)


def noise_stream() -> Callable[[object], Tensor]:
    """Standard normal images; every stream is the same."""
    generator = torch.Generator().manual_seed(1)
    return lambda _: torch.randn(X_T.shape, generator=generator, dtype=torch.float64)


def our_states(plan: Plan, prediction: Prediction = "eps") -> list[Tensor]:
    """x_T, and x after each row of the plan."""
    states = []

    def predict_x_0(x: Tensor, t: Tensor, alpha_bar: Tensor) -> Tensor:
        states.append(x)
        return x_0_from(prediction, network(prediction, x, alpha_bar), x, alpha_bar)

    states.append(run_plan(plan, predict_x_0, X_T, noise_stream()))
    return states


def their_states(
    scheduler: Any,
    alpha_bar: Tensor,
    prediction: Prediction = "eps",
    exploding: bool = False,
    options: Callable[[], Mapping[str, Any]] = dict,
) -> list[Tensor]:
    """x_T, and x after each step, in the variance-preserving frame.

    alpha_bar: (steps + 1,), of each evaluation, and where the last step ends.
    exploding: the scheduler's x is x_0 + σ ε.
    options: makes the arguments of a step.
    """
    scale = alpha_bar.sqrt() if exploding else torch.ones_like(alpha_bar)
    states = [X_T]
    sample = X_T / scale[0]
    for i, t in enumerate(scheduler.timesteps):
        output = network(prediction, states[-1], alpha_bar[i])
        sample = scheduler.step(output, t, sample, **options()).prev_sample
        states.append(sample * scale[i + 1])
    return states


def make_scheduler(name: str, **config: Any) -> Any:
    return getattr(diffusers, name + "Scheduler")(**config)


def with_table(scheduler: Any, schedule: Schedule, steps: int) -> Any:
    """A scheduler that looks ᾱ up, with our table and its own timesteps."""
    scheduler.alphas_cumprod = schedule.alpha_bar
    scheduler.final_alpha_cumprod = scheduler.one = torch.ones((), dtype=torch.float64)
    scheduler.set_timesteps(steps)
    return scheduler


def with_levels(scheduler: Any, times: Tensor, alpha_bar: Tensor) -> Any:
    """A scheduler that works on a list of σ, with ours: alpha_bar (steps + 1,), times (steps,)."""
    scheduler.set_timesteps(len(times))
    scheduler.timesteps = times
    scheduler.sigmas = ((1 - alpha_bar) / alpha_bar).sqrt()
    scheduler.set_begin_index(0)
    scheduler.is_scale_input_called = True  # the network here scales its input itself
    return scheduler


def assert_same(got: list[Tensor], want: list[Tensor], tolerance: Mapping[str, float]) -> None:
    assert len(got) == len(want)
    for i, (ours, theirs) in enumerate(zip(got, want, strict=True)):
        torch.testing.assert_close(
            ours, theirs, **tolerance, msg=lambda text, i=i: f"after {i} steps: {text}"
        )


# Tables and times


@pytest.mark.parametrize(
    ("config", "name"),
    [
        ({"schedule": "linear"}, "linear"),
        ({"schedule": "scaled_linear"}, "scaled_linear"),
        ({"schedule": "cosine"}, "squaredcos_cap_v2"),
        ({"schedule": "linear", "prediction": "v", "zero_terminal_snr": True}, "linear"),
    ],
)
def test_tables_are_theirs_but_for_float32(config: dict[str, Any], name: str) -> None:
    ours = make_schedule(DiffusionConfig(**config))
    ends = {"scaled_linear": (8.5e-4, 0.012)}.get(name, (1e-4, 0.02))
    theirs = make_scheduler(
        "DDIM",
        beta_schedule=name,
        beta_start=ends[0],
        beta_end=ends[1],
        rescale_betas_zero_snr="zero_terminal_snr" in config,
    )
    torch.testing.assert_close(ours.alpha_bar, theirs.alphas_cumprod.double(), rtol=1e-3, atol=2e-7)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize("steps", [1, 10, 30, 50, 64, 999, 1000])
def test_times_are_theirs(spacing: Spacing, steps: int) -> None:
    theirs = make_scheduler("DDIM", timestep_spacing=spacing)
    theirs.set_timesteps(steps)
    times = make_times(linear(1000), steps, spacing)[:-1]
    if (spacing, steps) == ("linspace", 1):  # theirs visits t = 0 alone, where nothing is noise
        assert (times.tolist(), theirs.timesteps.tolist()) == ([999], [0])
    else:
        assert times.tolist() == theirs.timesteps.tolist()


@pytest.mark.parametrize("steps", [2, 18, 40])
def test_karras_levels_are_those_of_edm(steps: int) -> None:
    theirs = make_scheduler("EDMEuler")
    theirs.set_timesteps(steps)
    alpha_bar = EDM.alpha_bar_at(make_times(EDM, steps, "karras"))
    sigma = ((1 - alpha_bar) / alpha_bar).sqrt()
    torch.testing.assert_close(sigma, theirs.sigmas.double(), rtol=1e-6, atol=0)


# Solvers that look ᾱ up


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_ancestral_is_ddpm(variance: Variance, spacing: Spacing) -> None:
    """With any spacing: this scheduler, unlike DDIM's, looks the next timestep up in its list."""
    schedule, steps = linear(1000), 30
    times = make_times(schedule, steps, spacing)
    scheduler = make_scheduler(
        "DDPM", variance_type=variance, clip_sample=False, timestep_spacing=spacing
    )
    generator = torch.Generator().manual_seed(1)
    want = their_states(
        with_table(scheduler, schedule, steps),
        schedule.alpha_bar_at(times),
        options=lambda: {"generator": generator},
    )
    got = our_states(ancestral(schedule, times, variance))
    assert_same(got[:-1], want[:-1], FLOAT64)
    noise = noise_stream()
    z = [noise(i) for i in range(steps)][-1]
    if (t := int(scheduler.timesteps[-1])) > 0:  # there its step to the clean image adds noise, too
        added = 1 - schedule.alpha_bar[t] if variance == "fixed_large" else 1e-20
        want[-1] = want[-1] - added**0.5 * z
    assert_same(got[-1:], want[-1:], FLOAT64)


def test_a_learned_variance_has_the_range_of_ddpm() -> None:
    schedule = cosine(1000)
    times = make_times(schedule, 30, "trailing")
    plan = ancestral(schedule, times, "learned_range")
    scheduler = with_table(
        make_scheduler("DDPM", variance_type="learned_range", timestep_spacing="trailing"),
        schedule,
        30,
    )
    for i, t in enumerate(scheduler.timesteps[:-1]):
        for fraction in (0.0, 0.3, 1.0):
            said = torch.tensor(2 * fraction - 1, dtype=torch.float64)
            want = scheduler._get_variance(t, predicted_variance=said)  # its logarithm
            got = 2 * plan[X, Z][i].log() + fraction * plan.table[i, LOG_RANGE]
            torch.testing.assert_close(got, want, **FLOAT64)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("prediction", ["eps", "x_0", "v"])
@pytest.mark.parametrize(("spacing", "steps"), [("leading", 30), ("trailing", 20)])
def test_ddim_is_ddim_where_the_stride_is_fixed(
    eta: float, prediction: Prediction, spacing: Spacing, steps: int
) -> None:
    schedule = linear(1000)
    times = make_times(schedule, steps, spacing)
    scheduler = make_scheduler(
        "DDIM",
        clip_sample=False,
        timestep_spacing=spacing,
        prediction_type=PREDICTION_TYPES[prediction],
    )
    noise = noise_stream()
    want = their_states(
        with_table(scheduler, schedule, steps),
        schedule.alpha_bar_at(times),
        prediction,
        options=lambda: {"eta": eta, "variance_noise": noise(None) if eta else None},
    )
    assert_same(our_states(ddim(schedule, times, eta), prediction), want, FLOAT64)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ({"clip_sample": True}, {}),
        (
            {"thresholding": True, "dynamic_thresholding_ratio": 0.8, "sample_max_value": 1e9},
            {"threshold_quantile": 0.8},
        ),
    ],
    ids=["clip", "quantile"],
)
def test_thresholds_are_those_of_ddim(theirs: dict[str, Any], ours: dict[str, Any]) -> None:
    """With use_clipped_model_output: theirs keeps the unclipped ε otherwise."""
    schedule = linear(1000)
    times = make_times(schedule, 20, "leading")
    plan = ddim(schedule, times, 0.0)
    want = their_states(
        with_table(make_scheduler("DDIM", **theirs), schedule, 20),
        schedule.alpha_bar_at(times),
        options=lambda: {"use_clipped_model_output": True},
    )
    assert (our_states(plan)[-1] - want[-1]).abs().max() > 0.01  # it matters here
    got = our_states(with_settings(plan, SamplingConfig(**ours)))
    assert_same(got, want, FLOAT64 if not ours else FLOAT32)  # the quantile is taken in float32


def test_pndm_is_plms() -> None:
    """Their last step goes from t = 0 to t = 0."""
    schedule, steps = linear(1000), 30
    times = make_times(schedule, steps, "leading")
    scheduler = with_table(make_scheduler("PNDM", skip_prk_steps=True), schedule, steps)
    scheduler.final_alpha_cumprod = schedule.alpha_bar[0]
    want = their_states(
        scheduler, schedule.alpha_bar_at(torch.cat([scheduler.timesteps, times[-2:-1]]))
    )
    torch.testing.assert_close(want[-1], want[-2])
    assert_same(our_states(pndm(schedule, times[:-1])), want[:-1], FLOAT64)
    clean = our_states(pndm(schedule, times))
    assert_same(clean[:-1], want[:-1], FLOAT64)
    at_0 = schedule.alpha_bar[0]
    assert_same(clean[-1:], [TWO_MODES.x_0(want[-1], at_0, at_0)], FLOAT64)


# Trap: a fixed stride


def std_by_pairs(schedule: Schedule, pairs: list[tuple[int, int]]) -> float:
    """Of DDIM's output for x_0 ~ N(0, ½²): each step multiplies x by a number.

    With exact ε = √(1-ᾱ)/(ᾱ/4 + 1-ᾱ) x, Song et al. 2021, Eq. 12 with σ = 0.
    """
    std = 1.0
    for t, s in pairs:
        a_t, a_s = (float(schedule.alpha_bar[i]) if i >= 0 else 1.0 for i in (t, s))
        slope = (1 - a_t) ** 0.5 / (a_t / 4 + 1 - a_t)
        std *= (a_s / a_t) ** 0.5 * (1 - (1 - a_t) ** 0.5 * slope) + (1 - a_s) ** 0.5 * slope
    return std


@pytest.mark.parametrize(
    ("spacing", "steps", "apart"),
    [("linspace", 10, 0.05), ("linspace", 64, 0.02), ("trailing", 30, 0.002), ("leading", 30, 0.0)],
)
def test_a_fixed_stride_is_another_sampler_unless_it_meets_the_next_timestep(
    spacing: Spacing, steps: int, apart: float
) -> None:
    """Their DDIM takes t - T//N for the next timestep, and then evaluates somewhere else.

    Nothing crashes and the image is plausible: the standard deviation is even nearer to that of the
    data, by coincidence. The scalar recursion with either list of pairs says which one is which.
    """
    schedule = linear(1000)
    data = Mixture((1.0,), (0.0,), (0.5,))
    times = make_times(schedule, steps, spacing)
    timesteps = [int(t) for t in times]
    right = list(itertools.pairwise(timesteps))
    strided = [(t, t - 1000 // steps) for t in timesteps[:-1]]

    x_T = torch.ones(1, 1, dtype=torch.float64)  # the map is linear: its factor is the std
    got = run_plan(ddim(schedule, times, 0.0), data.x_0, x_T, lambda i: x_T)
    assert got.item() == pytest.approx(std_by_pairs(schedule, right), rel=1e-9)

    scheduler = with_table(
        make_scheduler("DDIM", clip_sample=False, timestep_spacing=spacing), schedule, steps
    )
    x = x_T
    for t in scheduler.timesteps:
        a = schedule.alpha_bar[t]
        x = scheduler.step(predict_eps(x, data.x_0(x, t, a), a), t, x).prev_sample
    assert x.item() == pytest.approx(std_by_pairs(schedule, strided), rel=1e-9)

    if apart:
        assert abs(got.item() - x.item()) > apart
    else:
        assert got.item() == pytest.approx(x.item(), rel=1e-9)


# Solvers that work on a list of σ


class Case(NamedTuple):
    """Our solver, and their scheduler with its config where it ends at σ = 0 or above."""

    ours: Callable[[Schedule, Tensor], Plan]
    name: str
    to_clean: dict[str, Any] | None
    """None where theirs cannot end there, since it takes log σ."""
    to_noisy: dict[str, Any]
    tolerance: Mapping[str, float] = FLOAT64
    exploding: bool = False


def deis_case(order: int) -> Case:
    config = {"solver_order": order, "lower_order_final": False}
    return Case(lambda s, t: deis(s, t, order), "DEISMultistep", None, config)


def unipc_case(order: int) -> Case:
    return Case(
        lambda s, t: unipc(s, t, order),
        "UniPCMultistep",
        {"solver_order": order, "lower_order_final": True},
        {"solver_order": order, "lower_order_final": False},
    )


def dpm_case(order: int, name: str, form: Form, **ours: bool) -> Case:
    """Their "zero" makes the last step, to σ = 0, of order 1."""
    algorithm = "dpmsolver" if form == "eps" else "dpmsolver++"
    if "stochastic" in ours:
        algorithm = "sde-dpmsolver++"
    config = {"solver_order": order, "algorithm_type": algorithm, "lower_order_final": False}
    zero = {**config, "final_sigmas_type": "zero", "lower_order_final": name.endswith("Singlestep")}
    return Case(
        lambda s, t: dpm_solver(s, t, order, form, **ours),
        name,
        None if form == "eps" else zero,
        {**config, "final_sigmas_type": "sigma_min"},
        FLOAT32 if name == "DPMSolverMultistep" else FLOAT64,
        name.startswith("EDM"),
    )


CASES = {
    "euler": Case(euler, "EulerDiscrete", {}, {}, FLOAT32, exploding=True),
    "heun": Case(heun, "HeunDiscrete", {}, {}, exploding=True),
    **{f"deis-{p}": deis_case(p) for p in (1, 2, 3)},
    **{f"unipc-{p}": unipc_case(p) for p in (1, 2, 3)},
    **{f"dpm_solver-{p}": dpm_case(p, "DPMSolverMultistep", "eps") for p in (1, 2)},
    **{f"dpm_solver_pp-{p}": dpm_case(p, "DPMSolverMultistep", "x_0") for p in (1, 2)},
    **{
        f"dpm_solver_pp-stochastic-{p}": dpm_case(p, "DPMSolverMultistep", "x_0", stochastic=True)
        for p in (1, 2)
    },
    **{
        f"dpm_solver-singlestep-{p}": dpm_case(p, "DPMSolverSinglestep", "eps", singlestep=True)
        for p in (1, 2)
    },
    **{
        f"dpm_solver_pp-singlestep-{p}": dpm_case(p, "DPMSolverSinglestep", "x_0", singlestep=True)
        for p in (1, 2)
    },
}
EDM_CASES = {
    "euler": Case(euler, "EDMEuler", {}, {}, FLOAT32, exploding=True),
    **{f"dpm_solver_pp-{p}": dpm_case(p, "EDMDPMSolverMultistep", "x_0") for p in (1, 2)},
}
"""Order 3 of DPM-Solver has a test of its own below."""


def ends_of(cases: Mapping[str, Case]) -> list[tuple[str, str]]:
    return [
        (name, end)
        for name, case in cases.items()
        for end in ("clean", "noisy")
        if end == "noisy" or case.to_clean is not None
    ]


def compare(case: Case, schedule: Schedule, times: Tensor, prediction: Prediction) -> None:
    config = case.to_clean if times[-1] < 0 else case.to_noisy
    assert config is not None
    if prediction not in ("eps", "edm"):
        config = {**config, "prediction_type": PREDICTION_TYPES[prediction]}
    plan = case.ours(schedule, times)
    end = schedule.alpha_bar_at(times[-1:])
    alpha_bar = torch.cat([plan.table[:, ALPHA_BAR], end])
    noise = noise_stream()
    stochastic = config.get("algorithm_type", "").startswith("sde")
    want = their_states(
        with_levels(make_scheduler(case.name, **config), plan.table[:, T], alpha_bar),
        alpha_bar,
        prediction,
        case.exploding,
        options=lambda: {"variance_noise": noise(None)} if stochastic else {},
    )
    assert_same(our_states(plan, prediction), want, case.tolerance)


@pytest.mark.parametrize(("name", "end"), ends_of(CASES))
@pytest.mark.parametrize("spacing", ["trailing", "karras"])
def test_a_solver_is_theirs_at_every_step(name: str, end: str, spacing: Spacing) -> None:
    """At even timesteps and at real ones between them."""
    schedule = linear(1000)
    times = make_times(schedule, 13, spacing)
    compare(CASES[name], schedule, times if end == "clean" else times[:-1], "eps")


@pytest.mark.parametrize(("name", "end"), ends_of(EDM_CASES))
def test_a_solver_is_that_of_edm_in_another_frame(name: str, end: str) -> None:
    """Theirs follows x_0 + σ ε with EDM's preconditioning from σ = 80, ours √ᾱ times that."""
    times = make_times(EDM, 18, "karras")
    compare(EDM_CASES[name], EDM, times if end == "clean" else times[:-1], "edm")


@pytest.mark.parametrize("prediction", ["x_0", "v"])
@pytest.mark.parametrize("name", ["unipc-2", "dpm_solver_pp-2", "deis-2"])
def test_a_prediction_is_read_as_theirs(name: str, prediction: Prediction) -> None:
    schedule = cosine(1000)
    compare(CASES[name], schedule, make_times(schedule, 13, "leading")[:-1], prediction)


def test_their_third_order_of_dpm_solver_pp_converges_with_order_two() -> None:
    """It takes the second divided difference for the second derivative, which is twice that.

    It is ours until its first step of order 3, then not: the exact flow tells who is right.
    """
    case = dpm_case(3, "EDMDPMSolverMultistep", "x_0")
    error: dict[tuple[str, int], float] = {}
    for steps in (40, 160):
        times = make_times(EDM, steps, "log_snr")[: steps * 3 // 4]
        plan = case.ours(EDM, times)
        alpha_bar = EDM.alpha_bar_at(times)
        scheduler = with_levels(make_scheduler(case.name, **case.to_noisy), times[:-1], alpha_bar)
        got = our_states(plan, "edm")
        want = their_states(scheduler, alpha_bar, "edm", exploding=True)
        assert_same(got[:3], want[:3], FLOAT64)
        exact = TWO_MODES.flow(X_T, alpha_bar[0], alpha_bar[-1])
        error["ours", steps] = float((got[-1] - exact).abs().max())
        error["theirs", steps] = float((want[-1] - exact).abs().max())
    order = {who: math.log(error[who, 40] / error[who, 160], 4) for who in ("ours", "theirs")}
    assert order["ours"] > 2.7
    assert order["theirs"] < 2.3
