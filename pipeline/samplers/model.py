"""The model a sampler runs on: a network with what is needed to draw images from it."""

import functools
from dataclasses import dataclass

import torch
from pydantic import BaseModel
from torch import Tensor

from pipeline.diffusion.schedules import DiffusionConfig, Schedule, make_schedule
from pipeline.networks.unet import UNet, UNetConfig
from pipeline.samplers.ancestral import ancestral
from pipeline.samplers.ddim import ddim
from pipeline.samplers.plan import DEFAULT_STEPS, Plan, SamplingConfig


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

    def make_network(self) -> UNet:
        return UNet(self.network, self.channels, self.image_size, self.num_classes)


@dataclass(frozen=True)
class Model:
    """ε_θ in evaluation mode with its spec, its schedule and the digest of its weights."""

    spec: ModelSpec
    network: UNet
    schedule: Schedule
    digest: str

    def predict_eps(self, x_t: Tensor, t: Tensor, label: Tensor) -> Tensor:
        """ε_θ for a batch of rows. x_t: (B, C, H, W); t, label: (B,), label num_classes for ∅."""
        with torch.inference_mode():
            out: Tensor = self.network(x_t, t, label if self.spec.num_classes else None)
            return out


def build_model(spec: ModelSpec, weights: dict[str, Tensor], digest: str) -> Model:
    """The model of a spec and its weights, in float32 and evaluation mode."""
    network = spec.make_network()
    network.load_state_dict(weights)
    return Model(spec, network.eval().requires_grad_(False), make_schedule(spec.diffusion), digest)


@functools.lru_cache(maxsize=256)
def _plan(diffusion: DiffusionConfig, sampling: SamplingConfig) -> Plan:
    schedule = make_schedule(diffusion)
    if sampling.sampler == "ancestral":
        return ancestral(schedule, sampling.steps, diffusion.variance, sampling.clip_x_0)
    return ddim(schedule, sampling.steps, sampling.eta, sampling.clip_x_0)


def make_plan(spec: ModelSpec, sampling: SamplingConfig) -> Plan:
    """The plan of a sampling config for a model's schedule.

    Raises:
        ValueError: more steps than the schedule has timesteps.
    """
    return _plan(spec.diffusion, sampling)
