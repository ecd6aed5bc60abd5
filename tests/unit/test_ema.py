"""Averages of the weights against their closed forms, and power averages made afterwards."""

import math
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from pipeline import storage
from pipeline.errors import ConfigError, CorruptArtifact
from pipeline.training import checkpoint
from pipeline.training.config import EmaConfig, sigma_rel_to_gamma
from pipeline.training.ema import Ema, decays
from pipeline.training.posthoc import (
    Profile,
    find_snapshots,
    reconstruct,
    save_snapshots,
    snapshot_due,
    snapshot_files,
    solve_weights,
)

DECAY = EmaConfig(kind="decay", decay=0.9)
HALF_LIFE = EmaConfig(kind="half_life", half_life=1600, ramp_up=0.05)
POWER = EmaConfig(kind="power", sigma_rel=[0.05, 0.10])
KINDS = pytest.mark.parametrize("config", [DECAY, HALF_LIFE, POWER], ids=lambda c: c.kind)


class Weights(nn.Module):
    """A network that is one vector."""

    def __init__(self, initial: Tensor) -> None:
        super().__init__()
        self.theta = nn.Parameter(initial.clone())

    def move(self, theta: Tensor) -> None:
        with torch.no_grad():
            self.theta.copy_(theta)


def averaged(config: EmaConfig, trajectory: Tensor, batch_size: int = 64) -> dict[str, Tensor]:
    """The averages of weights (n, d) after each of n steps, from zeros: (d,) float64 each."""
    network = Weights(torch.zeros_like(trajectory[0]))
    ema = Ema(network, config, batch_size)
    for step, theta in enumerate(trajectory):
        network.move(theta)
        ema.update(network, step)
    return {name: weights["theta"].double() for name, weights in ema.averages.items()}


def influences(config: EmaConfig, steps: int, batch_size: int = 64) -> dict[str, Tensor]:
    """How much the weights after each step count in the averages after all: (n,) float64 each."""
    return averaged(config, torch.eye(steps), batch_size)


# --- closed forms --------------------------------------------------------------------------------


@KINDS
def test_weights_that_do_not_move_stay_to_the_bit(config: EmaConfig) -> None:
    network = Weights(torch.tensor([0.1, -3.3, 1e-8]))
    ema = Ema(network, config, 64)
    for step in range(50):
        ema.update(network, step)
    for average in ema.averages.values():
        assert torch.equal(average["theta"], network.theta)


def test_a_constant_decay_has_a_warm_up_in_which_influence_is_a_polynomial() -> None:
    """Π (1+j)/(10+j) telescopes; beyond step 80 the decay is 0.9."""
    n = 60
    i = torch.arange(n, dtype=torch.float64)
    rising = torch.stack([(i + k) / (n + k - 1) for k in range(2, 11)]).prod(0)
    torch.testing.assert_close(influences(DECAY, n)["ema"], 9 / (10 + i) * rising)
    tail = influences(DECAY, 300)["ema"][80:]
    want = 0.1 * 0.9 ** torch.arange(219, -1, -1, dtype=torch.float64)
    torch.testing.assert_close(tail, want, rtol=1e-5, atol=0)


@pytest.mark.parametrize("batch_size", [32, 64])
def test_a_half_life_is_in_images_whatever_the_batch_size(batch_size: int) -> None:
    steps = 1600 // batch_size  # those of a half-life
    influence = influences(HALF_LIFE, 25 * steps, batch_size)["ema"]
    after = influence[21 * steps :]  # 1600 images are less than 5 % of those seen from 20 on
    torch.testing.assert_close(after[:-steps], after[steps:] / 2, rtol=1e-5, atol=0)


def test_a_half_life_is_at_first_a_share_of_the_images_seen() -> None:
    """Π 0.5^(1/(r j)) is 0.5^((H_n - H_i)/r) with harmonic numbers H; step 0 forgets what was."""
    n, r = 500, 0.05  # 5 % of 32,000 images are a half-life
    i = torch.arange(n, dtype=torch.float64)
    harmonic = (1 / i[1:]).cumsum(0)
    own = 1 - 0.5 ** (1 / (r * i[1:]))
    want = own * 0.5 ** ((harmonic[-1] - harmonic) / r)
    got = influences(HALF_LIFE, n)["ema"]
    torch.testing.assert_close(got[1:], want, rtol=1e-4, atol=1e-12)
    assert decays(HALF_LIFE, 0, 64) == [0.0]
    assert got.sum().item() == pytest.approx(1, abs=1e-6)


@pytest.mark.parametrize("sigma_rel", [0.03, 0.05, 0.10, 0.20, 0.28])
def test_a_power_average_is_as_wide_as_it_says(sigma_rel: float) -> None:
    n = 2000
    profile = influences(EmaConfig(kind="power", sigma_rel=[sigma_rel]), n)["ema"]
    tau = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    mean = (profile * tau).sum()
    width = (profile * (tau - mean).square()).sum().sqrt()
    assert profile.sum().item() == pytest.approx(1, abs=1e-5)
    assert width.item() == pytest.approx(sigma_rel, rel=1e-4)

    exponent = sigma_rel_to_gamma(sigma_rel) + 1
    edges = (torch.arange(n + 1, dtype=torch.float64) / n) ** exponent
    torch.testing.assert_close(profile, edges.diff(), rtol=1e-4, atol=1e-10)


def test_a_relative_width_belongs_to_one_exponent() -> None:
    for gamma in (0.0, 0.5, 1.0, 6.94, 16.97, 500.0):
        sigma_rel = (gamma + 1) ** 0.5 / (gamma + 2) / (gamma + 3) ** 0.5
        assert sigma_rel_to_gamma(sigma_rel) == pytest.approx(gamma, rel=1e-9, abs=1e-9)
    # the paper's own figures
    assert sigma_rel_to_gamma(0.05) == pytest.approx(16.97, abs=0.005)
    assert sigma_rel_to_gamma(0.10) == pytest.approx(6.94, abs=0.005)


RAMPS = {
    # far from the start an average of decay d lags behind by d/(1-d) steps
    "decay": (DECAY, 0.9 / 0.1),
    "half_life": (HALF_LIFE, 1 / (math.exp(math.log(2) * 64 / 1600) - 1)),
    # γ = 1: Σ i (2i-1)/n² = (n+1)(4n-1)/(6n)
    "power": (EmaConfig(kind="power", sigma_rel=[2**0.5 / 6]), 4000 - 4001 * 15999 / 24000),
}


@pytest.mark.parametrize("kind", RAMPS)
def test_weights_that_move_evenly_are_followed_at_the_distance_of_the_closed_form(
    kind: str,
) -> None:
    config, lag = RAMPS[kind]
    ramp = torch.arange(1, 4001, dtype=torch.float32)[:, None]
    assert 4000 - averaged(config, ramp)["ema"].item() == pytest.approx(lag, rel=1e-3)


@KINDS
def test_an_average_is_the_sum_that_its_decays_say(config: EmaConfig) -> None:
    """Against Σ (1-d_i) Π d_j θ_i in float64, on a random walk."""
    n = 500
    walk = torch.randn(n, 8, generator=torch.Generator().manual_seed(0)).cumsum(0)
    each = torch.tensor([decays(config, step, 64) for step in range(n)], dtype=torch.float64)
    kept = each.flip(0).cumprod(0).flip(0)  # Π_{j >= i} d_j
    influence = (1 - each) * torch.cat([kept[1:], torch.ones(1, each.shape[1])])
    for got, want in zip(averaged(config, walk).values(), influence.T @ walk.double(), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


# --- what is averaged ----------------------------------------------------------------------------


def test_an_average_of_bfloat16_weights_is_float32() -> None:
    network = nn.Linear(1, 1, bias=False).bfloat16()
    nn.init.zeros_(network.weight)
    ema = Ema(network, EmaConfig(decay=0.9999), 64)
    want = 0.0
    for step in range(1000):
        nn.init.constant_(network.weight, step % 3)
        ema.update(network, step)
        decay = min(0.9999, (1 + step) / (10 + step))
        want = decay * want + (1 - decay) * (step % 3)
    assert ema.weights["weight"].dtype == torch.float32
    assert ema.weights["weight"].item() == pytest.approx(want, rel=1e-4)
    assert decays(EmaConfig(decay=0.9999), 10**9, 64) == [0.9999]


def shaken(network: nn.Module, step: int) -> None:
    """A step of training of sorts, the same on sharded weights."""
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.mul_(1.01).add_(0.1 * (step % 4) - 0.17)


def counting() -> nn.Module:
    """A network with an integer buffer."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 3))


@KINDS
def test_an_interrupted_average_continues_to_the_bit(config: EmaConfig) -> None:
    network = counting()
    straight, first = Ema(network, config, 64), Ema(network, config, 64)
    for step in range(20):
        shaken(network, step)
        network(torch.full((2, 3), float(step)))
        straight.update(network, step)
        if step < 10:
            first.update(network, step)
        else:
            if step == 10:
                stored = {name: save(weights) for name, weights in first.averages.items()}
                second = Ema(counting(), config, 64)
                for name, data in stored.items():
                    second.load(load(data), name)
            second.update(network, step)
    assert list(second.averages) == list(straight.averages)
    for name, weights in straight.averages.items():
        assert weights["1.num_batches_tracked"].dtype == torch.int64
        assert int(weights["1.num_batches_tracked"]) == 20  # a count has no average
        assert all(torch.equal(second.averages[name][key], weights[key]) for key in weights)


# --- other widths afterwards ---------------------------------------------------------------------

WIDTHS = [0.05, 0.10]
STEPS = 1600


@pytest.fixture(scope="module")
def walk() -> Tensor:
    """Weights that wander and tremble, as those of a network do: (n, d)."""
    generator = torch.Generator().manual_seed(1)
    start = torch.randn(64, generator=generator)
    drift, tremble = torch.randn(2, STEPS, 64, generator=generator)
    return start + 0.01 * drift.cumsum(0) + 0.05 * tremble


@pytest.fixture(scope="module")
def kept(walk: Tensor, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of 16 snapshots of two widths."""
    folder = str(tmp_path_factory.mktemp("train"))
    network = Weights(torch.zeros(64))
    ema = Ema(network, EmaConfig(kind="power", sigma_rel=WIDTHS), 64)
    for step, theta in enumerate(walk):
        network.move(theta)
        ema.update(network, step)
        if snapshot_due(step + 1, STEPS, 16):
            save_snapshots(folder, step + 1, dict(zip(WIDTHS, ema.averages.values(), strict=True)))
    return folder


def tracked(walk: Tensor, sigma_rel: float, step: int = STEPS) -> Tensor:
    return averaged(EmaConfig(kind="power", sigma_rel=[sigma_rel]), walk[:step])["ema"]


@pytest.mark.parametrize(
    ("sigma_rel", "step", "error"),
    [
        (0.07, STEPS, 0.02),
        (0.15, STEPS, 0.02),
        (0.07, STEPS // 2, 0.05),  # eight snapshots are fewer
        (0.03, STEPS, 0.1),  # narrower than what there is
        (0.25, STEPS, 0.1),
    ],
)
def test_an_average_of_another_width_is_reconstructed(
    walk: Tensor, kept: str, sigma_rel: float, step: int, error: float
) -> None:
    """Within `error` of what separates it from the nearest one that was tracked."""
    want = tracked(walk, sigma_rel, step)
    weights, _ = reconstruct(find_snapshots(kept), sigma_rel, step)
    nearest = min(float((tracked(walk, width, step) - want).norm()) for width in WIDTHS)
    assert weights["theta"].dtype == torch.float32
    assert float((weights["theta"].double() - want).norm()) < error * nearest


def test_an_average_that_is_among_the_snapshots_is_itself(kept: str, walk: Tensor) -> None:
    snapshots = find_snapshots(kept)
    for sigma_rel in WIDTHS:
        for step in (STEPS, STEPS // 4):
            x, missed = solve_weights([s.profile for s in snapshots], Profile(sigma_rel, step))
            one = [float(s.profile == (sigma_rel, step)) for s in snapshots]
            np.testing.assert_allclose(x, one, rtol=0, atol=1e-9)
            assert missed < 1e-6
            # half precision: 11 bits
            weights, _ = reconstruct(snapshots, sigma_rel, step)
            want = tracked(walk, sigma_rel, step).float()
            torch.testing.assert_close(weights["theta"], want, rtol=2**-11, atol=1e-6)


@pytest.mark.parametrize("profile", [(0.07, 400), (0.2, 300), (0.03, 400), (0.05, 350)])
def test_the_combination_is_that_of_least_squares(profile: tuple[float, int]) -> None:
    """A second way: profiles on a fine grid, the condition by elimination."""
    profiles = [Profile(width, step) for step in (100, 200, 300, 400) for width in WIDTHS]
    tau = (np.arange(40_000) + 0.5) / 100

    def height(sigma_rel: float, step: int) -> np.ndarray:
        gamma = sigma_rel_to_gamma(sigma_rel)
        return np.where(tau <= step, (gamma + 1) / step * (tau / step) ** gamma, 0.0)

    P, p = np.stack([height(*each) for each in profiles], axis=1), height(*profile)
    free = np.linalg.lstsq(P[:, 1:] - P[:, :1], p - P[:, 0], rcond=None)[0]
    want = np.array([1 - free.sum(), *free])
    x, missed = solve_weights(profiles, Profile(*profile))
    np.testing.assert_allclose(x, want, rtol=0, atol=1e-3)
    assert x.sum() == pytest.approx(1, abs=1e-12)
    assert missed == pytest.approx(np.linalg.norm(P @ want - p) / np.linalg.norm(p), rel=1e-3)


def test_snapshots_are_spread_evenly_and_the_last_step_has_one() -> None:
    assert [step for step in range(1, 11) if snapshot_due(step, 10, 4)] == [3, 5, 8, 10]
    assert [step for step in range(1, 4) if snapshot_due(step, 3, 16)] == [1, 2, 3]


def test_snapshots_outlive_the_checkpoints_beside_them(tmp_path: Path) -> None:
    for step in (100, 200):
        save_snapshots(str(tmp_path), step, {0.05: {"theta": torch.ones(2)}})
        storage.write_json(f"{tmp_path}/{checkpoint.checkpoint_name(step)}/state.json", {})
    checkpoint.prune(str(tmp_path), keep=1)
    assert [s.profile for s in find_snapshots(str(tmp_path))] == [(0.05, 100), (0.05, 200)]
    (tmp_path / "snapshots" / "step-000000100" / "snapshot.json").unlink()  # killed before it
    assert [s.profile for s in find_snapshots(str(tmp_path))] == [(0.05, 200)]
    assert find_snapshots(str(tmp_path / "nowhere")) == []


def test_the_files_of_complete_snapshots_are_listed(tmp_path: Path) -> None:
    assert snapshot_files(str(tmp_path)) == []
    for step in (4, 8):
        save_snapshots(str(tmp_path), step, {0.1: {"w": torch.zeros(1)}})
    (tmp_path / "snapshots/step-000000004/snapshot.json").unlink()
    folder = "snapshots/step-000000008"
    assert snapshot_files(str(tmp_path)) == [
        f"{folder}/power-0.1.safetensors",
        f"{folder}/snapshot.json",
    ]


def test_a_snapshot_is_half_precision_where_it_can_be(tmp_path: Path) -> None:
    weights = {"small": torch.tensor([1 / 3]), "huge": torch.tensor([1e6]), "n": torch.tensor(7)}
    save_snapshots(str(tmp_path), 10, {0.05: weights})
    (snapshot,) = find_snapshots(str(tmp_path))
    assert snapshot.read() == {
        "small": torch.tensor([1 / 3]).half(),
        "huge": torch.tensor([1e6]),
        "n": torch.tensor(7),
    }


def test_a_count_comes_from_the_last_snapshot_up_to_the_step(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save_snapshots(str(tmp_path), step, {0.05: {"n": torch.tensor(step)}})
    weights, _ = reconstruct(find_snapshots(str(tmp_path)), 0.05, 25)
    assert weights == {"n": torch.tensor(20)}


def test_a_damaged_snapshot_is_not_used(tmp_path: Path) -> None:
    uri = save_snapshots(str(tmp_path), 10, {0.05: {"theta": torch.ones(2)}})
    file = Path(uri) / "power-0.05.safetensors"
    file.write_bytes(file.read_bytes()[:-1] + b"\1")
    with pytest.raises(CorruptArtifact, match="power-0.05.safetensors does not match"):
        reconstruct(find_snapshots(str(tmp_path)), 0.05, 10)


@pytest.mark.parametrize(
    ("sigma_rel", "step", "sentence"),
    [
        (0.07, STEPS + 1, f"step={STEPS + 1} must be from 1 to {STEPS}, where the snapshots"),
        (0.07, 0, "step=0 must be from 1 to"),
        (0.3, STEPS, "sigma_rel=0.3 must be above 0 and at most 0.2887"),
    ],
)
def test_an_average_that_cannot_be_had_is_refused(
    kept: str, sigma_rel: float, step: int, sentence: str
) -> None:
    with pytest.raises(ConfigError, match=re.escape(sentence)):
        reconstruct(find_snapshots(kept), sigma_rel, step)
    with pytest.raises(ConfigError, match="there are none: train with training.ema.kind=power"):
        reconstruct([], 0.07, 10)


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"half_life": 1000}, "half_life=1000 has no meaning for kind=decay: drop it, or use"),
        ({"kind": "power", "decay": 0.9}, "decay=0.9 has no meaning for kind=power"),
        ({"kind": "power", "sigma_rel": [0.1, 0.0]}, "sigma_rel=0.0 must be above 0"),
        ({"kind": "power", "sigma_rel": [0.1, 0.1]}, "names a width twice"),
    ],
)
def test_averages_without_a_meaning_are_refused(values: dict[str, object], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        EmaConfig(**values)  # type: ignore[arg-type]
    assert EmaConfig(kind="power", sigma_rel=[0.1, 0.05]).names == ["ema", "ema-power-0.05"]
