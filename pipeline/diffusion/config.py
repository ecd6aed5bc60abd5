"""The forward process and how the reverse one is parameterised: the section `diffusion`."""

import math
from typing import Annotated, Literal

from pydantic import BaseModel, Field, model_validator

ScheduleName = Literal[
    "linear",
    "scaled_linear",
    "quadratic",
    "cosine",
    "sigmoid",
    "laplace",
    "betas",
    "learned",
    "vp",
    "subvp",
    "ve",
    "edm",
]
Prediction = Literal["eps", "x_0", "v", "score", "edm"]
"""See pipeline/diffusion/parameterisation.py."""
LossWeight = Literal["uniform", "snr", "min_snr", "p2", "edm", "sigmoid", "likelihood"]
"""See pipeline/diffusion/losses.py."""
Variance = Literal["fixed_small", "fixed_large", "learned_range"]

BETA_ENDS = {
    "linear": (1e-4, 0.02),  # Ho et al. 2020, section 4
    "quadratic": (1e-4, 0.02),
    "scaled_linear": (8.5e-4, 0.012),  # Rombach et al. 2022, Stable Diffusion
    "vp": (1e-4, 0.02),
    "subvp": (1e-4, 0.02),
}
"""First and last β of 1,000 timesteps; in continuous time β(t) runs between 1,000 times as much."""
SIGMA_ENDS = {"ve": (0.01, 50.0), "edm": (0.002, 80.0)}
CONTINUOUS = ("vp", "subvp", "ve", "edm")
BETAS = "betas must be a list of numbers strictly between 0 and 1"


class DiffusionConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """The forward process and how the reverse one is parameterised."""

    schedule: ScheduleName = "linear"
    """How the noise grows with t. betas: a list of your own. learned: trained with the network
    (Kingma et al. 2021). vp, subvp, ve and edm are continuous: training draws t as a real
    number."""
    timesteps: int = Field(default=1000, ge=2, le=100_000)
    """Number of noise levels T; a continuous schedule is cut into as many for sampling."""
    prediction: Prediction = "eps"
    """What the network's output stands for: the noise ε, the image x_0, v, the score, or EDM's F
    with its preconditioning."""
    variance: Variance = "fixed_small"
    """σ_t² of an ancestral step: the posterior variance β̃_t, or β_t, or learned between them."""
    betas: Annotated[tuple[float, ...], Field(strict=False)] | None = None
    """For schedule=betas: one β for each timestep."""
    beta_start: float | None = Field(default=None, gt=0, lt=1)
    """First β, for 1,000 timesteps, of linear, quadratic, vp and subvp (by default 0.0001) and
    scaled_linear (0.00085)."""
    beta_end: float | None = Field(default=None, gt=0, lt=1)
    """Last β, for 1,000 timesteps, of linear, quadratic, vp and subvp (by default 0.02) and
    scaled_linear (0.012)."""
    sigma_min: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Least noise of ve (by default 0.01) and edm (0.002)."""
    sigma_max: float | None = Field(default=None, gt=0, allow_inf_nan=False)
    """Most noise of ve (by default 50) and edm (80)."""
    sigma_data: float = Field(default=0.5, gt=0, allow_inf_nan=False)
    """Standard deviation of the data that EDM's preconditioning and loss weight assume."""
    zero_terminal_snr: bool = False
    """Rescale the schedule so that x_T is noise alone (Lin et al. 2023); needs prediction x_0, v or
    edm."""

    @property
    def is_continuous(self) -> bool:
        return self.schedule in CONTINUOUS

    def ends(self, of: dict[str, tuple[float, float]]) -> tuple[float, float]:
        """The configured ends, or those of the literature."""
        low, high = of[self.schedule]
        given = (
            (self.beta_start, self.beta_end)
            if of is BETA_ENDS
            else (self.sigma_min, self.sigma_max)
        )
        return (
            low if given[0] is None else given[0],
            high if given[1] is None else given[1],
        )

    @model_validator(mode="after")
    def _the_keys_fit_the_schedule(self) -> "DiffusionConfig":
        for names, of in (
            (("beta_start", "beta_end"), BETA_ENDS),
            (("sigma_min", "sigma_max"), SIGMA_ENDS),
        ):
            for name in names:
                if getattr(self, name) is not None and self.schedule not in of:
                    raise ValueError(
                        f"{name}={getattr(self, name)} has no meaning for schedule="
                        f"{self.schedule}: it belongs to {', '.join(of)}"
                    )
            if self.schedule in of:
                low, high = self.ends(of)
                if low >= high:
                    raise ValueError(f"{names[0]}={low} must be below {names[1]}={high}")
        if (self.betas is not None) != (self.schedule == "betas"):
            raise ValueError(
                "schedule=betas needs betas, a list of one number a timestep"
                if self.betas is None
                else f"betas has no meaning for schedule={self.schedule}: use schedule=betas"
            )
        if self.betas is not None and len(self.betas) != self.timesteps:
            raise ValueError(
                f"betas has {len(self.betas)} numbers, timesteps={self.timesteps} must be as many"
            )
        return self

    @model_validator(mode="after")
    def _betas_are_probabilities(self) -> "DiffusionConfig":
        if not all(0 < beta < 1 for beta in self.betas or ()):
            raise ValueError(BETAS)
        if self.schedule in ("linear", "quadratic", "scaled_linear"):
            beta_end = self.ends(BETA_ENDS)[1]
            fewest = math.floor(1000 * beta_end) + 1
            if self.timesteps < fewest:
                raise ValueError(
                    f"timesteps={self.timesteps} is too few for the {self.schedule} schedule, "
                    f"whose last β is {1000 * beta_end:g}/timesteps and must stay below 1: use at "
                    f"least {fewest}, or schedule=cosine"
                )
        return self

    @model_validator(mode="after")
    def _terminal_snr_of_zero_can_be_predicted_from(self) -> "DiffusionConfig":
        if not self.zero_terminal_snr:
            return self
        if self.prediction in ("eps", "score"):
            raise ValueError(
                f"zero_terminal_snr with prediction={self.prediction} cannot work: at the last "
                "timestep x_T is noise alone, and x_0 = (x_T - ε)/0; use prediction=v or x_0"
            )
        if self.is_continuous or self.schedule == "learned":
            raise ValueError(
                f"zero_terminal_snr has no meaning for schedule={self.schedule}, whose ends are "
                "its own: use one of the discrete schedules"
            )
        return self
