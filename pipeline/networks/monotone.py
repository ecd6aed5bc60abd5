"""A learned noise schedule: γ_η(u) = -log-SNR as a monotone network.

Kingma et al. 2021, "Variational diffusion models":

    γ(u) = γ_0 + (γ_1 - γ_0) ψ(u),   ψ(u) = (y(u) - y(0))/(y(1) - y(0)),   u in [0, 1]
    y(u) = l_1(u) + l_3(sigmoid(l_2(l_1(u))))

The layers l have positive weights, so that y, and with it γ, rises. Both derivatives and values are
float64: they become coefficients.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LearnedSchedule(nn.Module):
    """γ_η, at first nearly the straight line from -13.3 to 5 (Kingma et al. 2021).

    Args:
        hidden: units of l_2, at first evenly spread over u.
    """

    def __init__(self, hidden: int = 1024, gamma_0: float = -13.3, gamma_1: float = 5.0) -> None:
        super().__init__()
        self.gamma_0 = nn.Parameter(torch.tensor(gamma_0))
        self.log_span = nn.Parameter(torch.tensor(math.log(gamma_1 - gamma_0)))
        # weights are softplus of these
        steep = 20.0
        self.raw_1 = nn.Parameter(torch.tensor(_inverse_softplus(1.0)))
        self.raw_2 = nn.Parameter(torch.full((hidden,), _inverse_softplus(steep)))
        self.raw_3 = nn.Parameter(torch.full((hidden,), _inverse_softplus(0.1 / hidden)))
        self.bias_2 = nn.Parameter(-steep * torch.linspace(0, 1, hidden))

    @property
    def gamma_1(self) -> Tensor:
        return self.gamma_0 + self.log_span.exp()

    def progress(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(ψ(u), ψ'(u)) at u (B,) in [0, 1]: (B,) float64 each; ψ(0) = 0, ψ(1) = 1, ψ' > 0."""
        y, slope = self._rise(u.double())
        (low, high), _ = self._rise(torch.arange(2.0, dtype=torch.float64, device=u.device))
        return (y - low) / (high - low), slope / (high - low)

    def gamma(self, psi: Tensor, psi_slope: Tensor) -> tuple[Tensor, Tensor]:
        """(γ, γ') of (ψ, ψ'), between the learned ends."""
        span = self.log_span.double().exp()
        return self.gamma_0.double() + span * psi, span * psi_slope

    def _rise(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """(y(u), y'(u)), (B,) each."""
        w_1, w_2, w_3 = (F.softplus(raw.double()) for raw in (self.raw_1, self.raw_2, self.raw_3))
        s = torch.sigmoid(w_2 * (w_1 * u)[:, None] + self.bias_2.double())  # (B, hidden)
        y = w_1 * u + (w_3 * s).sum(1)
        return y, w_1 * (1 + (w_3 * w_2 * s * (1 - s)).sum(1))


class ScheduledNetwork(nn.Module):
    """A denoiser and its learned schedule, as one set of weights."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.schedule = LearnedSchedule()

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        out: Tensor = self.network(x_t, t, label)
        return out

    @torch.no_grad()
    def log_snr(self, timesteps: int) -> Tensor:
        """λ at even steps of u from 0 to 1: (timesteps,) float64, falling, on the CPU."""
        u = torch.linspace(0, 1, timesteps, dtype=torch.float64, device=self.schedule.raw_1.device)
        gamma, _ = self.schedule.gamma(*self.schedule.progress(u))
        return -gamma.cpu()


def _inverse_softplus(y: float) -> float:
    return y + math.log(-math.expm1(-y))
