"""The continuous processes: their marginals solve the moment equations of their SDEs."""

import pytest
import torch

from pipeline.diffusion.config import DiffusionConfig
from pipeline.diffusion.schedules import from_sde, make_schedule
from pipeline.diffusion.sde import VE, VP, Sde, SubVP

PROCESSES = [VP(), SubVP(), VE(), VP(0.5, 7.0), VE(0.002, 80.0)]


@pytest.mark.parametrize("sde", PROCESSES, ids=repr)
def test_marginals_solve_the_moment_equations(sde: Sde) -> None:
    """dm/dt = f m and d(s²)/dt = 2 f s² + g², by autograd; Song et al. 2021, Eq. 50-51."""
    t = torch.linspace(sde.t_min, 1, 50, dtype=torch.float64, requires_grad=True)
    m, s = sde.marginal(t)
    f, g = sde.drift(t), sde.diffusion(t)
    # VE's mean is a constant, which autograd knows nothing of
    dm = torch.autograd.grad((m + 0 * t).sum(), t, retain_graph=True)[0]
    ds2 = torch.autograd.grad((s**2).sum(), t)[0]
    torch.testing.assert_close(dm, f * m)
    torch.testing.assert_close(ds2, 2 * f * s**2 + g**2, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("sde", PROCESSES, ids=repr)
def test_the_variance_preserving_frame_is_the_process_scaled(sde: Sde) -> None:
    schedule = from_sde(sde, 1000)
    t = torch.tensor([0.0, 0.5, 123.4, 999.0], dtype=torch.float64)
    m, s = sde.marginal(schedule.sde_time(t))
    alpha_bar = schedule.alpha_bar_at(t)
    torch.testing.assert_close((1 - alpha_bar) / alpha_bar, (s / m) ** 2, rtol=1e-7, atol=0)


def test_vp_is_the_limit_of_the_linear_schedule() -> None:
    """Ho et al.'s β of 1,000 steps is β(t)/1000; the tables meet as T grows (first order)."""
    gaps = []
    for T in (1000, 2000, 4000):
        discrete = make_schedule(DiffusionConfig(schedule="linear", timesteps=T)).alpha_bar
        B = VP().integral((torch.arange(T, dtype=torch.float64) + 1) / T)
        gaps.append((discrete.log() + B).abs().max().item())
    assert gaps[0] < 0.15
    assert gaps[0] / gaps[1] == pytest.approx(2, rel=0.05)
    assert gaps[1] / gaps[2] == pytest.approx(2, rel=0.05)


def test_sub_vp_has_less_noise_than_vp_at_every_time() -> None:
    t = torch.linspace(1e-3, 1, 100, dtype=torch.float64)
    (m, s), (m_sub, s_sub) = VP().marginal(t), SubVP().marginal(t)
    assert torch.equal(m, m_sub)
    assert (s_sub < s).all()


def test_the_noise_of_vp_keeps_its_digits_at_small_times() -> None:
    """√(1 - e^{-B}) in float32 would be 2 % off at t = 1e-5; by expm1 it is the series' B."""
    t = torch.tensor([1e-5], dtype=torch.float64)
    B = 0.1 * 1e-5 + 19.9 * 1e-10 / 2
    assert VP().marginal(t)[1].item() == pytest.approx((B - B**2 / 2) ** 0.5, rel=1e-12)
