"""How images are drawn: the section `sampling` of a config, and what a request may say of it."""

from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field, FiniteFloat, model_validator

from pipeline.diffusion.config import DiffusionConfig
from pipeline.errors import RequestError, shown

DEFAULT_STEPS = 50

SamplerName = Literal[
    "ancestral",
    "ddim",
    "euler",
    "heun",
    "dpm_solver",
    "dpm_solver_pp",
    "pndm",
    "unipc",
    "deis",
    "euler_maruyama",
    "langevin",
    "ode",
]
Spacing = Literal["trailing", "leading", "linspace", "karras", "log_snr"]

OFFLINE = ("langevin", "ode")
"""Their steps depend on the data: they are no plans, and run one request at a time."""

OWNERS = {
    "eta": ("ddim",),
    "order": ("dpm_solver", "dpm_solver_pp", "unipc", "deis"),
    "singlestep": ("dpm_solver", "dpm_solver_pp"),
    "stochastic": ("dpm_solver_pp",),
    "churn": ("euler", "heun"),
    "churn_min": ("euler", "heun"),
    "churn_max": ("euler", "heun"),
    "churn_noise": ("euler", "heun"),
    "corrector_steps": ("langevin",),
    "corrector_snr": ("langevin",),
    "predictor": ("langevin",),
    "rtol": ("ode",),
    "atol": ("ode",),
}
"""Settings that only some samplers have."""


class SolverSettings(BaseModel, frozen=True, extra="forbid", strict=True):
    """How images are drawn, but for the steps and the guidance, which have other names in HTTP."""

    sampler: SamplerName = "ddim"
    """The solver. langevin and ode have steps that depend on the image: they work offline, and are
    not served."""
    spacing: Spacing = "trailing"
    """Where the noise levels lie; formulas in pipeline/samplers/spacing.py."""
    guidance_rescale: float = Field(default=0.0, ge=0.0, le=1.0)
    """φ: how far the guided output gets back the standard deviation of the conditional one."""
    guidance_interval: Annotated[tuple[FiniteFloat, FiniteFloat], Field(strict=False)] | None = None
    """[σ_low, σ_high]: guide only at noise levels σ = √((1-ᾱ)/ᾱ) within it."""
    clip_x_0: bool = True
    """Whether x̂_0 is clipped to the data range [-1, 1] at every step."""
    threshold_quantile: float | None = Field(default=None, gt=0.0, le=1.0)
    """Dynamic thresholding: where this quantile of |x̂_0| is above 1, x̂_0 is clipped to it and
    divided by it."""
    eta: float = Field(default=0.0, ge=0.0, le=1.0)
    """For ddim: η, 0 is deterministic and 1 is ancestral with σ² = β̃."""
    order: int = Field(default=2, ge=1, le=3)
    """Order of dpm_solver, dpm_solver_pp, unipc and deis."""
    singlestep: bool = False
    """For dpm_solver and dpm_solver_pp: reach the order by evaluations between two noise levels, in
    place of earlier ones."""
    stochastic: bool = False
    """For dpm_solver_pp: solve the SDE, with fresh noise at every step."""
    churn: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    """For euler and heun: S_churn of Karras et al. 2022, Algorithm 2; noise added before a step."""
    churn_min: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)
    """For euler and heun: S_tmin, the least σ at which noise is added."""
    churn_max: float | None = Field(default=None, ge=0.0, allow_inf_nan=False)
    """For euler and heun: S_tmax, the largest σ at which noise is added; by default any."""
    churn_noise: float = Field(default=1.0, gt=0.0, le=10.0)
    """For euler and heun: S_noise, the standard deviation of that noise."""
    corrector_steps: int = Field(default=1, ge=0, le=100)
    """For langevin: Langevin steps at each noise level."""
    corrector_snr: float = Field(default=0.16, gt=0.0, le=1.0)
    """For langevin: the signal-to-noise ratio r of these steps."""
    predictor: Literal["ancestral", "none"] = "ancestral"
    """For langevin: what moves an image to the next noise level. none: annealed Langevin dynamics,
    correctors alone."""
    rtol: float = Field(default=1e-5, ge=1e-10, le=1e-1)
    """For ode: relative tolerance of the adaptive solver."""
    atol: float = Field(default=1e-5, ge=1e-10, le=1e-1)
    """For ode: absolute tolerance of the adaptive solver."""

    @model_validator(mode="after")
    def _settings_belong_to_the_sampler(self) -> Self:
        for name, owners in OWNERS.items():
            value = getattr(self, name)
            if value != SolverSettings.model_fields[name].default and self.sampler not in owners:
                raise ValueError(
                    f"{name}={value} has no meaning for sampler={self.sampler}: drop it, or use "
                    f"{' or '.join(owners)}"
                )
        return self

    @model_validator(mode="after")
    def _settings_fit_each_other(self) -> Self:
        if self.guidance_interval is not None:
            low, high = self.guidance_interval
            if not 0 <= low < high:
                raise ValueError(
                    f"guidance_interval=[{low}, {high}] must be [low, high] with 0 <= low < high"
                )
        if self.threshold_quantile is not None and not self.clip_x_0:
            raise ValueError(
                f"threshold_quantile={self.threshold_quantile} thresholds x̂_0, clip_x_0=false "
                "says not to: drop one of them"
            )
        if self.churn_max is not None and self.churn_min > self.churn_max:
            raise ValueError(
                f"churn_min={self.churn_min} must be at most churn_max={self.churn_max}"
            )
        if self.stochastic and (self.order == 3 or self.singlestep):
            raise ValueError("stochastic is for multistep orders 1 and 2: drop it, or use order=2")
        if self.sampler == "langevin" and self.predictor == "none" and not self.corrector_steps:
            raise ValueError("corrector_steps=0 with predictor=none moves nothing: use 1 or more")
        return self


class SamplingConfig(SolverSettings, frozen=True, extra="forbid", strict=True):
    """How images are drawn."""

    steps: int = Field(default=DEFAULT_STEPS, ge=1)
    """Noise levels that an image visits, at most the schedule's timesteps. Most samplers evaluate
    the network once at each; heun and singlestep more often, pndm once more in all."""
    guidance: float = Field(default=0.0, ge=0.0, le=50.0, allow_inf_nan=False)
    """w of classifier-free guidance, ε = (1+w) ε(c) - w ε(∅); 0 is the plain conditional model."""

    @model_validator(mode="after")
    def _guidance_is_there_to_be_shaped(self) -> Self:
        if not self.guidance:
            for name in ("guidance_rescale", "guidance_interval"):
                if value := getattr(self, name):
                    raise ValueError(f"{name}={value} needs guidance above 0: drop it")
        return self


def check_sampling(diffusion: DiffusionConfig, sampling: SamplingConfig) -> None:
    """Raise RequestError, with `param` set, where a sampler cannot follow a schedule."""
    if sampling.steps > diffusion.timesteps:
        raise RequestError(
            f"steps={shown(sampling.steps)} must be from 1 to the model's {diffusion.timesteps} "
            "timesteps",
            "steps",
        )
    if not diffusion.zero_terminal_snr:
        return
    if sampling.spacing in ("karras", "log_snr"):
        raise RequestError(
            f"spacing={sampling.spacing} cannot start at the signal-to-noise ratio of 0 that the "
            "model's zero_terminal_snr means: use trailing or linspace",
            "spacing",
        )
    if sampling.sampler in ("pndm", "euler_maruyama", "ode"):
        raise RequestError(
            f"sampler={sampling.sampler} cannot start at the signal-to-noise ratio of 0 that the "
            "model's zero_terminal_snr means: use another, such as ddim or dpm_solver_pp",
            "sampler",
        )
