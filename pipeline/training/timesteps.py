"""At which timesteps training looks, and how much each draw counts.

The draws are a function of (seed, step, row of the global batch) and, for `loss_second_moment`, of
the losses so far: the same whichever rank asks for them.
"""

import torch
from torch import Tensor

from pipeline.device import Fetched
from pipeline.diffusion.schedules import Schedule
from pipeline.seeding import key, uniform
from pipeline.training.config import TimestepSampler

HISTORY = 10
UNIFORM_SHARE = 0.001


class LossHistory:
    """The last ten losses at each timestep (Nichol & Dhariwal 2021, section 3.3).

    The share of t is p_t ∝ √E[L_t²] (Eq. 18), by which Σ L_t has the smallest variance, with 0.001
    of it spread evenly so that none is forgotten; it is even until all are full.
    """

    def __init__(self, timesteps: int) -> None:
        self._losses = torch.zeros(timesteps, HISTORY, dtype=torch.float64)
        self._count = torch.zeros(timesteps, dtype=torch.int64)
        self._coming: Fetched | None = None

    @property
    def losses(self) -> Tensor:
        """(T, 10), oldest first."""
        self._take_in()
        return self._losses

    @property
    def count(self) -> Tensor:
        """(T,) how many of the ten are there."""
        self._take_in()
        return self._count

    def probabilities(self) -> Tensor:
        """p_t: (T,) float64, of sum 1."""
        T = len(self.count)
        if (self.count < HISTORY).any():
            return torch.full((T,), 1 / T, dtype=torch.float64)
        p = self.losses.square().mean(1).sqrt()
        return (1 - UNIFORM_SHARE) * p / p.sum() + UNIFORM_SHARE / T

    def update(self, t: Tensor, loss: Tensor) -> None:
        """Take in the rows of a global batch, in their order: t, loss (B,)."""
        losses, count = self.losses, self.count
        for i, value in zip(t.long().tolist(), loss.tolist(), strict=True):
            losses[i] = losses[i].roll(-1)
            losses[i, -1] = value
            count[i] = min(int(count[i]) + 1, HISTORY)

    def expect(self, rows: Fetched) -> None:
        """`update` when it matters: t and loss (B, 2) that are still on their way."""
        self._take_in()
        self._coming = rows

    def _take_in(self) -> None:
        if self._coming is not None:
            rows, self._coming = self._coming.get(), None
            self.update(*rows.unbind(1))

    def tensors(self) -> dict[str, Tensor]:
        return {"losses": self.losses, "count": self.count}

    def load(self, tensors: dict[str, Tensor]) -> None:
        self._losses, self._count, self._coming = tensors["losses"], tensors["count"], None


def draw_timesteps(
    sampler: TimestepSampler,
    seed: int,
    step: int,
    rows: range,
    batch_size: int,
    timesteps: int,
    schedule: Schedule | None,
    history: LossHistory | None = None,
    log_normal: tuple[float, float] = (-1.2, 1.2),
) -> tuple[Tensor, Tensor]:
    """The timesteps of rows of global batch `step`, and the weights of their losses.

        uniform             each row for itself
        stratified          the rows of the global batch evenly spread, u_i = u_0 + i/B mod 1
                            (Kingma et al. 2021, the low-discrepancy sampler)
        log_normal          ln σ ~ N(mean, std²), σ² = 1/SNR (Karras et al. 2022, table 1), at the
                            nearest timestep where there is nothing between them
        loss_second_moment  see LossHistory; the weight 1/(T p_t) keeps the mean of the loss

    Args:
        timesteps: T.
        schedule: None if it is learned; t is then real, as it is of a continuous process.
        log_normal: (mean, std) of ln σ.

    Returns:
        t: (b,) float64, integers 0 .. T-1, or reals between them; and weights (b,) float64.
    """
    if sampler == "stratified":
        first = uniform(key(seed, "timestep", step))
        numbers = [(first + row / batch_size) % 1.0 for row in rows]
    else:
        numbers = [uniform(key(seed, "timestep", step, row)) for row in rows]
    u = torch.tensor(numbers, dtype=torch.float64)
    even = torch.ones_like(u)
    continuous = schedule is None or schedule.sde is not None

    if sampler == "loss_second_moment":
        assert history is not None and not continuous
        p = history.probabilities()
        t = torch.searchsorted(p.cumsum(0), u, right=True).clamp(max=timesteps - 1)
        return t.double(), 1 / (timesteps * p[t])
    if sampler == "log_normal":
        assert schedule is not None
        mean, std = log_normal
        t = schedule.t_at(-2 * (mean + std * torch.special.ndtri(u)))
        return t if continuous else t.round(), even
    return u * (timesteps - 1) if continuous else (u * timesteps).floor(), even
