"""The model a sampler runs on: a network with what is needed to draw images from it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pydantic import BaseModel
from torch import Tensor, nn

from pipeline.device import send
from pipeline.diffusion.config import DiffusionConfig, Variance
from pipeline.diffusion.elbo import mean_and_fraction
from pipeline.diffusion.parameterisation import network_input, x_0_from
from pipeline.diffusion.schedules import Schedule, make_schedule
from pipeline.networks.choice import make_backbone
from pipeline.networks.config import NetworkConfig
from pipeline.networks.monotone import ScheduledNetwork
from pipeline.samplers.ancestral import ancestral
from pipeline.samplers.config import DEFAULT_STEPS, SamplingConfig
from pipeline.samplers.ddim import ddim
from pipeline.samplers.deis import deis
from pipeline.samplers.dpm_solver import dpm_solver
from pipeline.samplers.euler import euler
from pipeline.samplers.euler_maruyama import euler_maruyama
from pipeline.samplers.heun import heun
from pipeline.samplers.plan import Plan, with_settings
from pipeline.samplers.pndm import pndm
from pipeline.samplers.spacing import make_times, start_above
from pipeline.samplers.unipc import unipc


class ModelSpec(BaseModel, frozen=True, extra="forbid"):
    """All that is needed, beside the weights, to rebuild a model; stored as JSON with them."""

    format: int = 1
    network: NetworkConfig
    diffusion: DiffusionConfig
    channels: int
    image_size: int
    data_range: tuple[float, float] = (-1.0, 1.0)
    class_names: list[str] = []
    """Empty for an unconditional model; label i is class_names[i]."""
    has_null_label: bool = False
    """Trained with label dropout, so that ε(∅), and with it guidance, means something."""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        return self.channels, self.image_size, self.image_size

    @property
    def default_steps(self) -> int:
        """Network evaluations an image when nobody says how many."""
        return min(DEFAULT_STEPS, self.diffusion.timesteps)

    def admissible(self, sampling: SamplingConfig) -> SamplingConfig:
        """`sampling` without guidance where the model has no ε(∅) to guide with."""
        if self.has_null_label:
            return sampling
        none = {"guidance": 0.0, "guidance_rescale": 0.0, "guidance_interval": None}
        return sampling.model_copy(update=none)

    @property
    def learns_variance(self) -> bool:
        """The network has as many output channels again, for the variance of a reverse step."""
        return self.diffusion.variance == "learned_range"

    def make_network(self) -> nn.Module:
        """The network with weights of its own, beside its schedule if that is learned."""
        out_channels = self.channels * (2 if self.learns_variance else 1)
        network = make_backbone(
            self.network, self.channels, self.image_size, self.num_classes, out_channels
        )
        return ScheduledNetwork(network) if self.diffusion.schedule == "learned" else network


@dataclass(frozen=True)
class Model:
    """A network in evaluation mode with its spec, its schedule and the digest of its weights."""

    spec: ModelSpec
    network: nn.Module
    schedule: Schedule
    digest: str

    def output(
        self, x_t: Tensor, t: Tensor, alpha_bar: Tensor, label: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """What the network says of a batch of rows, in its own parameterisation.

        x_t: (B, C, H, W); t, alpha_bar: (B,) float64; label: (B,), num_classes for ∅. These three
        on the CPU or beside x_t. Differentiable in x_t where that requires a gradient.

        Returns:
            the output and, where the variance is learned, its fraction between log β̃ (0) and
            log β (1); (B, C, H, W) each.
        """
        with torch.inference_mode(not x_t.requires_grad):
            image, time = network_input(self.spec.diffusion, x_t, t, alpha_bar)
            label_or_none = send(label, x_t.device) if self.spec.num_classes else None
            out: Tensor = self.network(image, send(time, x_t.device), label_or_none)
        if not self.spec.learns_variance:
            return out, None
        return mean_and_fraction(out)

    def x_0(self, output: Tensor, x_t: Tensor, alpha_bar: Tensor) -> Tensor:
        """x̂_0 of an output at x_t, (B, C, H, W) each; alpha_bar: (B,) float64."""
        config = self.spec.diffusion
        return x_0_from(config.prediction, output, x_t, alpha_bar, config.sigma_data)

    def predict_x_0(self, x_t: Tensor, t: Tensor, alpha_bar: Tensor, label: Tensor) -> Tensor:
        """x̂_0 of a batch of rows; see `output`."""
        return self.x_0(self.output(x_t, t, alpha_bar, label)[0], x_t, alpha_bar)


def build_model(spec: ModelSpec, weights: dict[str, Tensor], digest: str) -> Model:
    """The model of a spec and its weights, in float32 and evaluation mode."""
    network = spec.make_network()
    network.load_state_dict(weights)
    log_snr = None
    if isinstance(network, ScheduledNetwork):
        log_snr = network.log_snr(spec.diffusion.timesteps)
    schedule = make_schedule(spec.diffusion, log_snr)
    return Model(spec, network.eval().requires_grad_(False), schedule, digest)


def make_plan(model: Model, sampling: SamplingConfig) -> Plan:
    """The plan of a sampling config for a model's schedule.

    Raises:
        ValueError: the schedule has no such steps; see `check_sampling`.
    """
    return compile_plan(model.schedule, model.spec.diffusion.variance, sampling)


@functools.lru_cache(maxsize=256)
def compile_plan(schedule: Schedule, variance: Variance, sampling: SamplingConfig) -> Plan:
    """The plan of a sampling config; of langevin, that of its predictor. ode has none."""
    start = start_above(schedule) if sampling.sampler in EXTRAPOLATE_EPS else None
    times = make_times(schedule, sampling.steps, sampling.spacing, start)
    return with_settings(SOLVERS[sampling.sampler](schedule, times, variance, sampling), sampling)


EXTRAPOLATE_EPS = ("heun", "dpm_solver", "pndm", "deis")
"""They start where an error of x̂_0 can still be corrected; see spacing.start_above."""


def _churn(config: SamplingConfig) -> tuple[float, float, float | None, float]:
    return config.churn, config.churn_min, config.churn_max, config.churn_noise


SOLVERS: dict[str, Callable[[Schedule, Tensor, Variance, SamplingConfig], Plan]] = {
    "ancestral": lambda schedule, times, variance, _: ancestral(schedule, times, variance),
    "ddim": lambda schedule, times, _, config: ddim(schedule, times, config.eta),
    "euler": lambda schedule, times, _, config: euler(schedule, times, *_churn(config)),
    "heun": lambda schedule, times, _, config: heun(schedule, times, *_churn(config)),
    "dpm_solver": lambda schedule, times, _, config: dpm_solver(
        schedule, times, config.order, "eps", config.singlestep
    ),
    "dpm_solver_pp": lambda schedule, times, _, config: dpm_solver(
        schedule, times, config.order, "x_0", config.singlestep, config.stochastic
    ),
    "pndm": lambda schedule, times, *_: pndm(schedule, times),
    "unipc": lambda schedule, times, _, config: unipc(schedule, times, config.order),
    "deis": lambda schedule, times, _, config: deis(schedule, times, config.order),
    "euler_maruyama": lambda schedule, times, *_: euler_maruyama(schedule, times),
    "langevin": lambda schedule, times, variance, _: ancestral(schedule, times, variance),
}
"""How a sampler's plan is made from the times it visits."""
