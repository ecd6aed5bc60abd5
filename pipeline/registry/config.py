"""Where runs are recorded and models registered: the sections `tracking` and `registry`."""

import re
from typing import Self

from pydantic import BaseModel, Field, field_validator, model_validator


class TrackingConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """Where runs and models are recorded."""

    uri: str | None = None
    """MLflow tracking URI; by default MLFLOW_TRACKING_URI, or sqlite:///mlflow.db in the working
    folder."""


class Rule(BaseModel, frozen=True, extra="forbid", strict=True):
    """What a figure must be, for the alias to move."""

    at_least: float | None = Field(default=None, allow_inf_nan=False)
    """Least value of the figure."""
    at_most: float | None = Field(default=None, allow_inf_nan=False)
    """Largest value of the figure."""
    better_than_champion: bool = False
    """Whether it must beat the version that the alias points at, by more than the 95 % interval of
    the difference; holds if there is no such version yet."""

    @model_validator(mode="after")
    def _states_something(self) -> Self:
        if self.at_least is None and self.at_most is None and not self.better_than_champion:
            raise ValueError(
                "this rule states nothing: give at_least, at_most or better_than_champion: true"
            )
        if self.at_least is not None and self.at_most is not None and self.at_least > self.at_most:
            raise ValueError(
                f"no figure is at_least {self.at_least} and at_most {self.at_most}: exchange them"
            )
        return self


class RegistryConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """How a trained model is registered."""

    alias: str = Field(default="champion", pattern=r"^[A-Za-z0-9_-]+$")
    """The alias that moves to the new version, if the rules hold."""
    promote_if: dict[str, Rule] = {}
    """Rules, each under the name of its figure; without rules the alias always moves."""

    @field_validator("alias")
    @classmethod
    def _mlflow_keeps_some_names(cls, alias: str) -> str:
        if re.fullmatch(r"latest|v?\d+", alias, re.IGNORECASE):
            raise ValueError(f"{alias!r} reads as a version: choose a word such as champion")
        return alias
