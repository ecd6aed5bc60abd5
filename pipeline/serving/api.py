"""The HTTP contract of `POST /v1/images/generations`: what a request may say, what comes back.

Compatible with the OpenAI images API, with extensions for what a diffusion model of classes needs.
Anything unknown or unsupported is refused with `param` set, never ignored.
"""

from collections.abc import Collection
from typing import Any, Literal

from pydantic import BaseModel, Field, ValidationError

from pipeline.errors import RequestError
from pipeline.samplers.model import ModelSpec
from pipeline.samplers.plan import OFFLINE, SamplingConfig, SolverSettings
from pipeline.serving.engine import ImageRequest, Mode


class ServingConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """The sampling service."""

    replicas: int = Field(default=1, ge=1)
    mode: Mode = "exact"
    """Default of a request: `exact` (pixels depend on the recipe alone) or `fast`."""
    cpus_per_replica: int = Field(default=1, ge=1)
    gpus_per_replica: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    max_images: int = Field(default=64, ge=1)
    """Largest n of a request."""
    max_queued_requests: int = Field(default=64, ge=1)
    """Requests that wait or run at a time; beyond them a client is told to retry (429)."""


class GenerationRequest(SolverSettings, frozen=True, extra="forbid", strict=True):
    """The body of a request: what OpenAI's clients send, and the settings of a solver."""

    prompt: str | None = None
    """A class name of the model; OpenAI clients always send one. Empty for none."""
    model: str | None = None
    n: int = Field(default=1, ge=1)
    size: str = "auto"
    response_format: Literal["b64_json"] = "b64_json"
    output_format: Literal["png"] = "png"
    user: str | None = None
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    """Drawn at random and reported when missing."""
    class_label: int | None = Field(default=None, ge=0)
    num_inference_steps: int | None = Field(default=None, ge=1)
    """By default 50, or as many as the model has timesteps."""
    guidance_scale: float = Field(default=0.0, ge=0, le=50, allow_inf_nan=False)
    mode: Mode | None = None

    def sampling(self, spec: ModelSpec) -> SamplingConfig:
        return SamplingConfig(
            **self.model_dump(include=set(SolverSettings.model_fields)),
            steps=self.num_inference_steps or spec.default_steps,
            guidance=float(self.guidance_scale),
        )


PARAM_OF_ENGINE = {
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "label": "class_label",
}
"""What the engine's names are called in a request."""


def parse_request(
    body: Any, spec: ModelSpec, names: Collection[str], max_images: int
) -> GenerationRequest:
    """A request body (parsed JSON), checked against the model that is served.

    Args:
        names: what the model may be called.

    Raises:
        RequestError: with `param` set to the field that is wrong.
    """
    if not isinstance(body, dict):
        raise RequestError("the request body must be a JSON object")
    try:
        request = GenerationRequest.model_validate(body)
        request.sampling(spec)
    except ValidationError as error:
        raise _first_problem(error) from error
    if request.sampler in OFFLINE:
        raise RequestError(
            f"sampler={request.sampler} takes as many steps as each image needs and is not served: "
            "draw with `ddpm sample`, or choose another sampler",
            "sampler",
        )
    if request.n > max_images:
        raise RequestError(f"n={request.n} must be from 1 to {max_images}", "n")
    if request.model is not None and request.model not in names:
        known = " or ".join(sorted(names))
        raise RequestError(f"model={request.model!r} is not served here; {known} is", "model")
    size = f"{spec.image_size}x{spec.image_size}"
    if request.size not in ("auto", size):
        raise RequestError(
            f"size={request.size!r} must be auto or {size}, the model's size", "size"
        )
    if request.prompt and request.prompt not in spec.class_names:
        known = ", ".join(spec.class_names[:20]) or "none, the model is unconditional"
        raise RequestError(
            f"prompt={request.prompt!r} is not a class name; there are: {known}", "prompt"
        )
    if request.prompt and request.class_label is not None:
        raise RequestError("give prompt (a class name) or class_label, not both", "class_label")
    return request


def image_requests(request: GenerationRequest, spec: ModelSpec, seed: int) -> list[ImageRequest]:
    """The n recipes of a request."""
    label = request.class_label
    if request.prompt:
        label = spec.class_names.index(request.prompt)
    return [ImageRequest(seed, i, label, request.sampling(spec)) for i in range(request.n)]


def error_body(
    message: str, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """OpenAI's form of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _first_problem(error: ValidationError) -> RequestError:
    problem = error.errors()[0]
    param = str(problem["loc"][0]) if problem["loc"] else None
    if problem["type"] == "extra_forbidden":
        return RequestError(f"{param} is not a parameter of this service", param)
    value = repr(problem["input"])
    shown = value if len(value) <= 60 else value[:57] + "..."
    message = problem["msg"].removeprefix("Value error, ")
    return RequestError(f"{param}={shown}: {message}" if param else message, param)
