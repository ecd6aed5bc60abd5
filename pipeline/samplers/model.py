"""The model a sampler runs on: a network with what is needed to draw images from it."""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from pydantic import BaseModel
from torch import Tensor

from pipeline.diffusion.parameterisation import network_input, x_0_from
from pipeline.diffusion.schedules import DiffusionConfig, Schedule, Variance, make_schedule
from pipeline.networks.unet import UNet, UNetConfig
from pipeline.samplers.ancestral import ancestral
from pipeline.samplers.ddim import ddim
from pipeline.samplers.plan import DEFAULT_STEPS, Plan, SamplingConfig, with_settings
from pipeline.samplers.spacing import make_times


class ModelSpec(BaseModel, frozen=True, extra="forbid"):
    """All that is needed, beside the weights, to rebuild a model; stored as JSON with them."""

    format: int = 1
    network: UNetConfig
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
        return sampling if self.has_null_label else sampling.model_copy(update={"guidance": 0.0})

    @property
    def learns_variance(self) -> bool:
        """The network has as many output channels again, for the variance of a reverse step."""
        return self.diffusion.variance == "learned_range"

    def make_network(self) -> UNet:
        out_channels = self.channels * (2 if self.learns_variance else 1)
        return UNet(self.network, self.channels, self.image_size, self.num_classes, out_channels)


@dataclass(frozen=True)
class Model:
    """A network in evaluation mode with its spec, its schedule and the digest of its weights."""

    spec: ModelSpec
    network: UNet
    schedule: Schedule
    digest: str

    def output(
        self, x_t: Tensor, t: Tensor, alpha_bar: Tensor, label: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """What the network says of a batch of rows, in its own parameterisation.

        x_t: (B, C, H, W); t, alpha_bar: (B,) float64 on the CPU; label: (B,), num_classes for ∅.

        Returns:
            the output and, where the variance is learned, its fraction between log β̃ (0) and
            log β (1); (B, C, H, W) each.
        """
        with torch.inference_mode():
            image, time = network_input(self.spec.diffusion, x_t, t, alpha_bar)
            label_or_none = label.to(x_t.device) if self.spec.num_classes else None
            out: Tensor = self.network(image, time.to(x_t.device), label_or_none)
        if not self.spec.learns_variance:
            return out, None
        mean, fraction = out.chunk(2, dim=1)
        return mean, (fraction + 1) / 2

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
    return Model(spec, network.eval().requires_grad_(False), make_schedule(spec.diffusion), digest)


def make_plan(model: Model, sampling: SamplingConfig) -> Plan:
    """The plan of a sampling config for a model's schedule.

    Raises:
        ValueError: the schedule has no such steps; see `check_sampling`.
    """
    return _plan(model.schedule, model.spec.diffusion.variance, sampling)


@functools.lru_cache(maxsize=256)
def _plan(schedule: Schedule, variance: Variance, sampling: SamplingConfig) -> Plan:
    times = make_times(schedule, sampling.steps, sampling.spacing)
    return with_settings(SOLVERS[sampling.sampler](schedule, times, variance, sampling), sampling)


SOLVERS: dict[str, Callable[[Schedule, Tensor, Variance, SamplingConfig], Plan]] = {
    "ancestral": lambda schedule, times, variance, _: ancestral(schedule, times, variance),
    "ddim": lambda schedule, times, _, config: ddim(schedule, times, config.eta),
}
"""How a sampler's plan is made from the times it visits."""
