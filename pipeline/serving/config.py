"""The sampling service: the section `serving` of a config."""

from typing import Annotated, Literal

from pydantic import BaseModel, Field

from pipeline.bounds import bounds, number_or_bounds

Mode = Literal["exact", "fast"]
EXACT_ROWS = 16
"""Rows of a network call: where the throughput of small U-Nets on CPU cores has its knee."""


class ServingConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """The sampling service."""

    replicas: Annotated[int | list[int], number_or_bounds(1000)] = 1
    """Copies of the model; or [least, most], as many as there is work for."""
    mode: Mode = "exact"
    """Default of a request: `exact` (pixels depend on the recipe alone) or `fast`."""
    rows: int = Field(default=EXACT_ROWS, ge=2, le=1024)
    """Most rows of a network call, which in exact mode is padded to as many; part of a recipe."""
    compile: bool = False
    """In fast mode: torch.compile, on a GPU with CUDA graphs. Calls are padded to powers of two,
    and a replica compiles each size before it counts as ready."""
    cpus_per_replica: int = Field(default=1, ge=1)
    gpus_per_replica: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    max_images: int = Field(default=64, ge=1)
    """Largest n of a request."""
    max_steps: int | None = Field(default=None, ge=1)
    """Of an image; by default as many as the model has timesteps."""
    max_rows: int = Field(default=200_000, ge=1)
    """Rows of network calls that are accepted and not done, of all requests together; a client
    that would go beyond them is told to retry (429)."""
    max_rows_per_client: int | None = Field(default=None, ge=1)
    """The same of one client: an API key, or an address where there are no keys. By default half
    of max_rows."""
    max_seconds: float = Field(default=600.0, gt=0, allow_inf_nan=False)
    """From a request to its last image. A request is not taken (429) as long as it would take more
    by the work that is before it; what is not done in time is given up (504)."""
    max_models: int = Field(default=2, ge=1)
    """Models that a replica holds in memory; the one used longest ago makes room for another."""

    @property
    def min_replicas(self) -> int:
        return bounds(self.replicas)[0]

    @property
    def rows_per_client(self) -> int:
        return self.max_rows_per_client or -(-self.max_rows // 2)
