"""Langevin dynamics on Gaussian data with the exact score, and the predictor-corrector sampler."""

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.diffusion.schedules import Schedule, cosine, linear
from pipeline.samplers.ancestral import ancestral
from pipeline.samplers.config import SamplingConfig
from pipeline.samplers.langevin import (
    Noise,
    corrected,
    count_evaluations,
    langevin,
    score_of,
    step_sizes,
)
from pipeline.samplers.plan import ALPHA_BAR, Plan, T, make_row, run_plan, with_settings
from pipeline.samplers.spacing import make_times
from pipeline.seeding import key, normal
from pipeline.serving.engine import Engine, ImageRequest
from pipeline.serving.offline import draw
from tests.mixture import GAUSSIAN
from tests.unit.test_engine import make_model

MEAN, STD = GAUSSIAN.means[0], GAUSSIAN.stds[0]
PIXELS = 64


def predict(x: Tensor, rows: Tensor) -> tuple[Tensor, None]:
    return GAUSSIAN.x_0(x, rows[:, T], rows[:, ALPHA_BAR]), None


def noise_of(images: int) -> Noise:
    def noise(what: str, *counters: int) -> Tensor:
        keys = [key(0, what, i, *counters) for i in range(images)]
        return normal(keys, (1, 8, 8), torch.float64)

    return noise


def plan_of(schedule: Schedule, steps: int, sampling: SamplingConfig) -> Plan:
    times = make_times(schedule, steps, "trailing")
    return with_settings(ancestral(schedule, times, "fixed_small"), sampling)


def langevin_config(**settings: object) -> SamplingConfig:
    return SamplingConfig(sampler="langevin", clip_x_0=False, **settings)  # type: ignore[arg-type]


def draw_gaussian(schedule: Schedule, steps: int, images: int, sampling: SamplingConfig) -> Tensor:
    noise = noise_of(images)
    plan = plan_of(schedule, steps, sampling)
    x_T = noise("sample", 0)
    return langevin(schedule, plan, predict, x_T, noise, sampling)


def test_the_score_is_that_of_the_marginal() -> None:
    alpha_bar = torch.tensor(0.6, dtype=torch.float64)
    x = torch.linspace(-2, 2, 11, dtype=torch.float64).requires_grad_()
    variance = 0.6 * STD**2 + 0.4
    log_q = -(x - alpha_bar.sqrt() * MEAN).square() / 2 / variance
    (want,) = torch.autograd.grad(log_q.sum(), x)
    got = score_of(x.detach(), GAUSSIAN.x_0(x.detach(), alpha_bar, alpha_bar), alpha_bar)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def dynamics(sampling: SamplingConfig, t: int, images: int) -> tuple[Tensor, float]:
    """x after many Langevin steps at one level, and the variance v that it should have.

    The mean √ᾱ m is taken off, so that s = -x/v.
    """
    schedule, r = linear(1000), sampling.corrector_snr
    row = make_row(t, float(schedule.alpha_bar[t]), {})
    noise = noise_of(images)
    x = 1 + 2 * noise("sample", 0)  # far from where it belongs
    for j in range(int(6 / r**2)):
        x_0, _ = predict(x, row.expand(images, -1))
        score, z = score_of(x, x_0, row[ALPHA_BAR]), noise("corrector", 0, j)
        x = corrected(x, score, z, step_sizes(schedule, row, score, z, sampling))
    a = float(row[ALPHA_BAR])
    return x - a**0.5 * MEAN, a * STD**2 + 1 - a


@pytest.mark.parametrize(("r", "images"), [(0.3, 1000), (0.15, 200)])
def test_steps_of_a_fixed_size_have_their_exact_stationary_law(r: float, images: int) -> None:
    """x ← (1 - ε/v) x + √(2ε) z with ε = 2r²σ²: the variance becomes v/(1 - ε/2v)."""
    x, v = dynamics(langevin_config(predictor="none", corrector_snr=r), 200, images)
    sigma2 = 1 - float(linear(1000).alpha_bar[200])
    want, n = v / (1 - r**2 * sigma2 / v), x.numel()
    assert x.mean().item() == pytest.approx(0, abs=5 * (want / n) ** 0.5)
    assert x.var().item() == pytest.approx(want, rel=5 * (2 / n) ** 0.5)
    if r == 0.3:
        assert x.var().item() != pytest.approx(v, rel=5 * (2 / n) ** 0.5), "the known bias shows"


def test_steps_of_a_fixed_signal_to_noise_ratio_have_their_exact_stationary_law() -> None:
    """ε = 2αr² v²‖z‖²/‖x‖²: that E‖x‖² stands still means E[v/‖x‖²] = 1/((D+2)(1+αr²)).

    One step takes u = ‖x‖²/v to u - 4αr²‖z‖² + 4αr²(1+αr²)‖z‖⁴/u on average over the direction of
    z, and E‖z‖⁴ = D(D+2).
    """
    r, t, images = 0.3, 200, 1000
    x, v = dynamics(langevin_config(corrector_snr=r), t, images)
    alpha = float(linear(1000).alpha[t])
    inverse = v / x.square().flatten(1).sum(1)
    error = float(inverse.std() / images**0.5 / inverse.mean())
    want = 1 / ((PIXELS + 2) * (1 + alpha * r**2))
    assert inverse.mean().item() == pytest.approx(want, rel=4 * error)
    assert 4 * error < 0.03, "the bias of 9 % shows"
    n = x.numel()
    assert x.mean().item() == pytest.approx(0, abs=5 * (1.1 * v / n) ** 0.5)


@pytest.mark.parametrize(
    ("predictor", "settings"),
    [
        ("ancestral", {"corrector_steps": 1}),
        ("ancestral", {"corrector_steps": 3, "corrector_snr": 0.1}),
        ("none", {"corrector_steps": 12, "corrector_snr": 0.25}),
    ],
)
def test_samples_have_the_mean_and_the_spread_of_the_data(
    predictor: str, settings: dict[str, object]
) -> None:
    images = 60
    x = draw_gaussian(linear(1000), 100, images, langevin_config(predictor=predictor, **settings))
    n = images * PIXELS
    assert x.mean().item() == pytest.approx(MEAN, abs=5 * STD / n**0.5)
    # of 100 levels ancestral sampling leaves the std 3 % low, Langevin at most 2 % high
    assert x.std().item() == pytest.approx(STD, rel=0.03 + 5 / (2 * n) ** 0.5)


def test_correctors_mend_what_too_few_predictor_steps_leave() -> None:
    """Of the right law at the last level, E[x_0 | x_t] has a known spread, less than the data's.

    8 ancestral steps do not come to that law; with Langevin steps at each level they do.
    """
    schedule = linear(1000)
    a = float(schedule.alpha_bar[124])
    best = STD * (a * STD**2 / (a * STD**2 + 1 - a)) ** 0.5

    def spread(**settings: object) -> float:
        return float(draw_gaussian(schedule, 8, 60, langevin_config(**settings)).std())

    assert spread(corrector_steps=0) < 0.9 * best
    assert spread(corrector_steps=40, corrector_snr=0.15) == pytest.approx(best, rel=0.04)


def test_without_correctors_it_is_ancestral_sampling() -> None:
    schedule, images = cosine(100), 3
    sampling = langevin_config(corrector_steps=0)
    plan, noise = plan_of(schedule, 10, sampling), noise_of(images)
    want = run_plan(
        plan,
        lambda x, t, alpha_bar: GAUSSIAN.x_0(x, t, alpha_bar),
        noise("sample", 0),
        lambda i: noise("sample", i + 1),
    )
    assert torch.equal(draw_gaussian(schedule, 10, images, sampling), want)


def test_the_step_is_an_images_own_and_follows_algorithm_5() -> None:
    schedule = cosine(1000)
    row = make_row(700, float(schedule.alpha_bar[700]), {})
    z, score = noise_of(4)("sample", 0), 7 * noise_of(4)("sample", 1)
    got = step_sizes(schedule, row, score, z, langevin_config(corrector_snr=0.2))
    alpha = 1 - float(schedule.beta[700])
    for i in range(4):
        ratio = float(z[i].square().sum() / score[i].square().sum())
        assert got[i].item() == pytest.approx(2 * alpha * 0.2**2 * ratio, rel=1e-12)


def test_network_evaluations_are_counted() -> None:
    for settings, guided_levels in (
        ({"guidance": 0.0}, 0),
        ({"guidance": 1.0}, 5),
        ({"guidance": 1.0, "guidance_interval": (0.1, 1.0)}, 2),
    ):
        calls = []

        def counting(x: Tensor, rows: Tensor) -> tuple[Tensor, None]:
            calls.append(1 + int(rows[0, 2] != 0))  # noqa: B023
            return predict(x, rows)

        for predictor, correctors in (("ancestral", 2), ("none", 3)):
            calls.clear()
            config = langevin_config(predictor=predictor, corrector_steps=correctors, **settings)
            plan, noise = plan_of(cosine(100), 5, config), noise_of(1)
            x_T = noise("sample", 0)
            langevin(cosine(100), plan, counting, x_T, noise, config)
            assert count_evaluations(plan, config) == sum(calls)
            assert int((plan.table[:, 2] != 0).sum()) == guided_levels


SETTINGS = [
    SamplingConfig(sampler="langevin", steps=4),
    SamplingConfig(sampler="langevin", steps=3, corrector_steps=2, guidance=1.5),
    SamplingConfig(sampler="langevin", steps=4, predictor="none", guidance=1.0),
    SamplingConfig(sampler="ancestral", steps=4),
]


def test_an_image_does_not_depend_on_the_company_it_is_drawn_in() -> None:
    model = make_model(["a", "b", "c"])
    requests = [ImageRequest(5, i, i % 3, SETTINGS[i % 4]) for i in range(44)]
    together = draw(model, requests).pixels
    for i in (0, 1, 2, 3, 21, 42):
        assert np.array_equal(draw(model, [requests[i]]).pixels[0], together[i])
    assert len({image.tobytes() for image in together}) == 44


def test_with_a_learned_variance_it_is_still_the_engines_ancestral_sampling() -> None:
    model = make_model(["a", "b"], variance="learned_range")
    want = Engine(model).draw([ImageRequest(1, 0, 0, SamplingConfig(sampler="ancestral", steps=6))])
    bare = SamplingConfig(sampler="langevin", steps=6, corrector_steps=0)
    got = draw(model, [ImageRequest(1, 0, 0, bare)])
    assert np.array_equal(got.pixels, want)
    assert got.evaluations.tolist() == [6]
