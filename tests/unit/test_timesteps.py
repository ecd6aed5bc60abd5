"""Which timesteps are drawn: their law, their weights, and that no rank draws others."""

import math

import pytest
import torch
from torch import Tensor

from pipeline.diffusion.config import DiffusionConfig
from pipeline.diffusion.schedules import Schedule, cosine, make_schedule
from pipeline.training.config import TimestepSampler
from pipeline.training.timesteps import HISTORY, UNIFORM_SHARE, LossHistory, draw_timesteps

EDM = make_schedule(DiffusionConfig(schedule="edm"))


def draws(
    sampler: TimestepSampler,
    schedule: Schedule | None,
    history: LossHistory | None = None,
    step: int = 0,
    rows: int = 20_000,
    timesteps: int = 10,
) -> tuple[Tensor, Tensor]:
    return draw_timesteps(sampler, 0, step, range(rows), rows, timesteps, schedule, history)


def full_history(timesteps: int) -> LossHistory:
    """A history in which the losses rise with t."""
    history = LossHistory(timesteps)
    for i in range(HISTORY):
        t = torch.arange(timesteps)
        history.update(t, (t + 1.0) * (1 + 0.1 * i))
    return history


def chi_squared(t: Tensor, p: Tensor) -> float:
    counts = torch.bincount(t.long(), minlength=len(p)).double()
    assert len(counts) == len(p)
    return float(((counts - len(t) * p) ** 2 / (len(t) * p)).sum())


def test_uniform_timesteps_have_equal_frequencies() -> None:
    t, weight = draws("uniform", cosine(10))
    assert chi_squared(t, torch.full((10,), 0.1)) < 33.7  # 9 degrees of freedom, p = 1e-4
    assert (weight == 1).all()


@pytest.mark.parametrize("schedule", [EDM, None], ids=["continuous", "learned"])
def test_timesteps_of_continuous_time_are_real(schedule: Schedule | None) -> None:
    t, _ = draws("uniform", schedule, timesteps=1000)
    assert t.dtype == torch.float64
    assert (t != t.round()).double().mean() > 0.999
    assert t.min() >= 0
    assert t.max() <= 999
    assert t.mean().item() == pytest.approx(499.5, abs=10)


@pytest.mark.parametrize("sampler", ["uniform", "stratified", "log_normal", "loss_second_moment"])
@pytest.mark.parametrize("world_size", [2, 4])
def test_any_number_of_workers_draws_the_same_timesteps(
    sampler: TimestepSampler, world_size: int
) -> None:
    schedule, history = cosine(10), full_history(10)

    def draw(rows: range, step: int = 5) -> Tensor:
        t, weight = draw_timesteps(sampler, 7, step, rows, 8, 10, schedule, history)
        return torch.stack([t, weight])

    share = 8 // world_size
    parts = [draw(range(rank * share, (rank + 1) * share)) for rank in range(world_size)]
    assert torch.equal(torch.cat(parts, dim=1), draw(range(8)))
    assert not torch.equal(draw(range(8), step=6), draw(range(8)))


def test_stratified_rows_have_one_in_each_stratum() -> None:
    """Of a batch of 64 exactly one row lies in each 64th of the range, at every step."""
    firsts = []
    for step in range(200):
        t, weight = draws("stratified", EDM, step=step, rows=64, timesteps=1000)
        strata = (t / 999 * 64).floor().long().sort().values
        assert torch.equal(strata, torch.arange(64))
        assert (weight == 1).all()
        firsts.append(float(t[0] / 999))
    spread = torch.tensor(firsts)  # a single row is still uniform
    assert spread.mean().item() == pytest.approx(0.5, abs=0.1)
    assert spread.std().item() == pytest.approx(1 / math.sqrt(12), abs=0.04)


def test_log_normal_noise_levels_have_the_stated_law() -> None:
    """ln σ ~ N(-1.2, 1.2²), Karras et al. 2022; within 0.002 .. 80 nothing is cut."""
    t, _ = draws("log_normal", EDM, timesteps=1000)
    log_sigma = -EDM.alpha_bar_at(t).logit() / 2
    assert log_sigma.mean().item() == pytest.approx(-1.2, abs=0.03)
    assert log_sigma.std().item() == pytest.approx(1.2, abs=0.03)


def test_log_normal_timesteps_are_the_nearest_of_a_discrete_schedule() -> None:
    schedule = cosine(50)
    t, _ = draws("log_normal", schedule, rows=5000, timesteps=50)
    assert torch.equal(t, t.round())
    # the share of a timestep is the mass of ln σ between the midpoints to its neighbours
    middle = torch.arange(49, dtype=torch.float64) + 0.5
    edges = -schedule.alpha_bar_at(middle).logit() / 2
    mass = torch.special.ndtr((edges + 1.2) / 1.2)
    p = torch.cat([mass[:1], mass.diff(), 1 - mass[-1:]])
    likely = p > 1e-3
    counts = torch.bincount(t.long(), minlength=50)
    expected = 5000 * p[likely]
    assert ((counts[likely] - expected) ** 2 / expected).sum() < 93  # 49 degrees, p = 1e-4


# --- by the losses so far ------------------------------------------------------------------------


def test_until_all_histories_are_full_the_draw_is_even() -> None:
    history = LossHistory(4)
    for i in range(HISTORY):
        assert torch.equal(history.probabilities(), torch.full((4,), 0.25).double())
        history.update(torch.tensor([0, 1, 2, 3]), torch.tensor([1.0, 2.0, 3.0, float(i)]))
    assert history.probabilities()[2] > 0.25


def test_shares_are_the_root_mean_square_of_the_last_ten_losses() -> None:
    history = LossHistory(2)
    seen: list[list[float]] = [[], []]
    for i in range(37):
        t = torch.tensor([i % 2, 1])
        loss = torch.tensor([1.0 + i, 3.0 - 0.1 * i])
        history.update(t, loss)
        for row in range(2):
            seen[int(t[row])].append(float(loss[row]))
    second = [math.sqrt(sum(x * x for x in losses[-10:]) / 10) for losses in seen]
    want = [(1 - UNIFORM_SHARE) * value / sum(second) + UNIFORM_SHARE / 2 for value in second]
    assert history.probabilities().tolist() == pytest.approx(want, rel=1e-12)


def test_weighted_draws_are_unbiased() -> None:
    """Σ p_t w_t f(t) is the mean of f, exactly, and by the drawn frequencies."""
    history = full_history(10)
    p = history.probabilities()
    assert float(p.sum()) == pytest.approx(1, abs=1e-12)
    assert p.max() / p.min() > 5  # or there would be nothing to correct
    t, weight = draws("loss_second_moment", cosine(10), history)
    assert chi_squared(t, p) < 33.7  # 9 degrees of freedom, p = 1e-4

    weight_of = torch.full((10,), torch.nan, dtype=torch.float64)
    weight_of[t.long()] = weight
    for f in (torch.arange(10.0), torch.arange(10.0) ** 2, (torch.arange(10.0) == 0).float()):
        f = f.double()
        assert float((p * weight_of * f).sum()) == pytest.approx(float(f.mean()), abs=1e-12)
        drawn = weight * f[t.long()]
        error = float(drawn.std()) / math.sqrt(len(drawn))
        assert float(drawn.mean()) == pytest.approx(float(f.mean()), abs=5 * error)
    # f(t) = t + 1 is what the shares follow: the estimate hardly varies
    assert float((weight * (t + 1)).std()) < 0.05 * float((t + 1).std())


def test_a_history_survives_being_stored() -> None:
    history = full_history(5)
    other = LossHistory(5)
    other.load({name: tensor.clone() for name, tensor in history.tensors().items()})
    assert torch.equal(other.probabilities(), history.probabilities())
    for one in (history, other):
        one.update(torch.tensor([3]), torch.tensor([9.0]))
    assert torch.equal(other.losses, history.losses)
