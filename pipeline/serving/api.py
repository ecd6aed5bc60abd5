"""The HTTP contract of `POST /v1/images/generations`: what a request may say, what comes back.

Compatible with the OpenAI images API, with extensions for what a diffusion model of classes needs.
Anything unknown or unsupported is refused with `param` set, never ignored.
"""

import math
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from pipeline.errors import MOST_SHOWN, RequestError, shown
from pipeline.samplers.config import OFFLINE, SamplingConfig, SolverSettings
from pipeline.samplers.model import ModelSpec
from pipeline.sentences import Mistake, first_mistake
from pipeline.serving.config import Mode, ServingConfig
from pipeline.serving.engine import ImageRequest, check_request
from pipeline.serving.recipe import Format

MOST_PARTIAL_IMAGES = 1000
"""Of a request, of all its images together."""
MOST_PARTIAL_BYTES = 128 * 2**20
"""Of their pixels: they are kept for who comes back, or does not read what is sent."""


Text = Annotated[str, Field(max_length=32_000)]
"""As long as OpenAI takes a prompt; that there is a limit is what refuses half a surrogate pair."""


class GenerationRequest(SolverSettings, frozen=True, extra="forbid", strict=True):
    """The body of a request: what OpenAI's clients send, and the settings of a solver."""

    prompt: Text | None = None
    """Name of a class of the model, or nothing; OpenAI's clients always send one."""
    model: Text | None = None
    """The model, as `GET /v1/models` names it, or any version in the registry; by default the one
    that is served."""
    n: int = Field(default=1, ge=1)
    """Number of images, at most serving.max_images."""
    size: Text = "auto"
    """auto, or the model's own size, as in 28x28."""
    response_format: Literal["b64_json"] = "b64_json"
    """How images come back: in the JSON, as base64."""
    output_format: Format = "png"
    """File format; both are lossless."""
    stream: bool = False
    """Whether images come as server-sent events as they are done, and before them partial
    images."""
    partial_images: int = Field(default=0, ge=0)
    """Partial images of each image, evenly over its evaluations; OpenAI's clients ask for 3 at
    most."""
    user: Text | None = None
    """Taken, since OpenAI's clients send it, and not used."""
    seed: int | None = Field(default=None, ge=0, lt=2**63)
    """Seed of all images; drawn at random and reported when missing."""
    class_label: int | None = Field(default=None, ge=0)
    """Number of a class, in place of its name in `prompt`."""
    num_inference_steps: int | None = Field(default=None, ge=1)
    """Noise levels that an image visits; by default 50, or as many as the model has timesteps."""
    guidance_scale: float = Field(default=0.0, ge=0, le=50, allow_inf_nan=False)
    """w of classifier-free guidance, ε = (1+w) ε(c) - w ε(∅)."""
    mode: Mode | None = None
    """exact or fast; by default serving.mode."""

    def sampling(self, spec: ModelSpec) -> SamplingConfig:
        return SamplingConfig(
            **self.model_dump(include=set(SolverSettings.model_fields)),
            steps=self.num_inference_steps or spec.default_steps,
            guidance=float(self.guidance_scale),
        )


def rows_of(sampling: SamplingConfig) -> int:
    """The rows of network calls that an image takes, about: what a request costs."""
    evaluations = sampling.steps * (2 if sampling.sampler == "heun" else 1)
    if sampling.singlestep:
        evaluations *= sampling.order
    return evaluations * (2 if sampling.guidance else 1)


def usage_of(rows: int) -> dict[str, Any]:
    """What was spent, in OpenAI's form: rows of network calls stand for tokens put out."""
    details = {"text_tokens": 0, "image_tokens": 0}
    return {
        "input_tokens": 0,
        "input_tokens_details": details,
        "output_tokens": rows,
        "total_tokens": rows,
    }


PARAM_OF_ENGINE = {
    "steps": "num_inference_steps",
    "guidance": "guidance_scale",
    "label": "class_label",
}
"""What the engine's names are called in a request."""


def parse_request(body: Any, spec: ModelSpec, config: ServingConfig) -> GenerationRequest:
    """A request body (parsed JSON), checked against the model that is to draw.

    Raises:
        RequestError: with `param` set to the field that is wrong.
    """
    if not isinstance(body, dict):
        raise RequestError("the request body must be a JSON object")
    try:
        request = GenerationRequest.model_validate(body)
        request.sampling(spec)
    except ValidationError as error:
        raise _refusal(first_mistake(error)) from error
    if request.sampler in OFFLINE:
        raise RequestError(
            f"sampler={request.sampler} takes as many steps as each image needs and is not served: "
            "draw with `ddpm sample`, or choose another sampler",
            "sampler",
        )
    if request.n > config.max_images:
        raise RequestError(f"n={shown(request.n)} must be from 1 to {config.max_images}", "n")
    steps = request.sampling(spec).steps
    if config.max_steps is not None and steps > config.max_steps:
        raise RequestError(
            f"num_inference_steps={shown(steps)} must be at most {config.max_steps} here",
            "num_inference_steps",
        )
    if request.n * request.partial_images > MOST_PARTIAL_IMAGES:
        raise RequestError(
            f"n={request.n} times partial_images={shown(request.partial_images)} must be at most "
            f"{MOST_PARTIAL_IMAGES}",
            "partial_images",
        )
    frame = 2 * math.prod(spec.image_shape)  # x_0 and x_t
    if request.n * request.partial_images * frame > MOST_PARTIAL_BYTES:
        raise RequestError(
            f"n={request.n} times partial_images={request.partial_images} must be at most "
            f"{MOST_PARTIAL_BYTES // frame} for images of {spec.image_size}x{spec.image_size}",
            "partial_images",
        )
    if request.partial_images and not request.stream:
        raise RequestError(
            f"partial_images={shown(request.partial_images)} needs stream=true", "partial_images"
        )
    size = f"{spec.image_size}x{spec.image_size}"
    if request.size not in ("auto", size):
        raise RequestError(
            f"size={shown(request.size)} must be auto or {size}, the model's size", "size"
        )
    if request.prompt and request.prompt not in spec.class_names:
        known = ", ".join(spec.class_names[:20]) or "none, the model is unconditional"
        raise RequestError(
            f"prompt={shown(request.prompt)} is not a class name; there are: {known}", "prompt"
        )
    if request.prompt and request.class_label is not None:
        raise RequestError("give prompt (a class name) or class_label, not both", "class_label")
    return request


def image_requests(request: GenerationRequest, spec: ModelSpec, seed: int) -> list[ImageRequest]:
    """The n recipes of a request.

    Raises:
        RequestError: the model cannot draw them.
    """
    label = request.class_label
    if request.prompt:
        label = spec.class_names.index(request.prompt)
    images = [ImageRequest(seed, i, label, request.sampling(spec)) for i in range(request.n)]
    try:
        check_request(spec, images[0])
    except RequestError as error:
        param = PARAM_OF_ENGINE.get(error.param or "", error.param)
        raise RequestError(error.message, param) from error
    return images


def error_body(
    message: str, kind: str, param: str | None = None, code: str | None = None
) -> dict[str, Any]:
    """OpenAI's form of an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _refusal(mistake: Mistake) -> RequestError:
    param = mistake.loc[0] if mistake.loc else None
    if mistake.kind == "extra_forbidden":
        assert param is not None
        if not 0 < len(param) <= MOST_SHOWN or not param.isprintable():
            return RequestError(f"{shown(param)} is not a parameter of this service")
        return RequestError(f"{param} is not a parameter of this service", param)
    return RequestError(str(mistake), param)
