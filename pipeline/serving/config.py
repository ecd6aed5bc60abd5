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
    """Replicas, 1 to 1000; or [least, most], as many as there is work for."""
    mode: Mode = "exact"
    """The mode of requests that name none. exact: pixels depend on the recipe alone. fast: calls
    are not padded, and a pixel may differ by a grey level."""
    rows: int = Field(default=EXACT_ROWS, ge=2, le=1024)
    """Most rows of a network call, to which calls are padded in exact mode; part of a recipe."""
    compile: bool = False
    """Whether fast mode uses torch.compile, on a GPU with CUDA graphs. Calls are padded to powers
    of two, and a replica compiles each size before it is ready."""
    cpus_per_replica: int = Field(default=1, ge=1)
    """CPU cores of a replica."""
    gpus_per_replica: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """GPUs of a replica; several may share one."""
    max_images: int = Field(default=64, ge=1)
    """Most images of a request."""
    max_steps: int | None = Field(default=None, ge=1)
    """Most steps of an image; by default as many as the model has timesteps."""
    max_rows: int = Field(default=200_000, ge=1)
    """Most rows in hand of all requests together; beyond them requests are refused with 429."""
    max_rows_per_client: int | None = Field(default=None, ge=1)
    """Most rows in hand of one client: an API key, or an address where there are no keys; by
    default half of max_rows."""
    max_seconds: float = Field(default=600.0, gt=0, allow_inf_nan=False)
    """Longest time from a request to its last image. A request that would take longer, by the work
    before it, is refused with 429; what is not done in time expires with 504."""
    max_models: int = Field(default=2, ge=1)
    """Models that a replica holds in memory; the one used longest ago makes room for another."""

    @property
    def min_replicas(self) -> int:
        return bounds(self.replicas)[0]

    @property
    def rows_per_client(self) -> int:
        return self.max_rows_per_client or -(-self.max_rows // 2)
