"""What comes back over HTTP: the service's OpenAPI says so, and tests hold it to that."""

from typing import Literal

from pydantic import BaseModel

from pipeline.serving.config import Mode
from pipeline.serving.engine import ImageInHand
from pipeline.serving.recipe import Recipe


class Reply(BaseModel, frozen=True, extra="forbid"):
    """What all of them are: nothing more than they say."""


class Problem(Reply, frozen=True):
    message: str
    type: Literal[
        "invalid_request_error", "authentication_error", "rate_limit_error", "server_error"
    ]
    param: str | None
    """The field of the request that is wrong."""
    code: str | None


class ErrorReply(Reply, frozen=True):
    """Of every status from 400 on, in OpenAI's form."""

    error: Problem


class DrawnImage(Reply, frozen=True):
    b64_json: str
    """The file, base64; it carries the recipe, too."""
    seed: int
    index: int
    recipe: Recipe
    replica: str


class TokenDetails(Reply, frozen=True):
    text_tokens: int
    image_tokens: int


class Usage(Reply, frozen=True):
    """In OpenAI's form; rows of network calls stand for tokens put out."""

    input_tokens: int
    input_tokens_details: TokenDetails
    output_tokens: int
    total_tokens: int


class GenerationReply(Reply, frozen=True):
    id: str
    created: int
    model: str
    output_format: str
    size: str
    data: list[DrawnImage]
    usage: Usage


class CancelReply(Reply, frozen=True):
    id: str
    state: Literal["running", "completed", "failed", "cancelled"]


class ModelReply(Reply, frozen=True):
    id: str
    object: Literal["model"]
    created: int
    """When this service began to serve."""
    owned_by: str
    digest: str
    image_size: int
    channels: int
    class_names: list[str]
    timesteps: int
    samplers: list[str]
    default_steps: int
    guidance: bool
    """A guidance scale can be used."""
    needs_label: bool
    max_images: int
    max_steps: int
    mode: Mode
    """Of a request that names none."""


class ModelsReply(Reply, frozen=True):
    object: Literal["list"]
    data: list[ModelReply]


class Running(Reply, frozen=True):
    id: str
    n: int
    done: int
    """Images that were asked for, and that are drawn."""
    rows: int
    """Of network calls that are not done."""
    created: int


class EngineState(Reply, frozen=True):
    model: str
    mode: Mode
    rows_of_call: int
    calls: int
    useful_rows: int
    num_images: int
    images: list[ImageInHand]
    """The first of them."""


class ReplicaState(Reply, frozen=True):
    replica: str
    at: float
    """Seconds since 1970, when it said so."""
    engines: list[EngineState]


class EngineReply(Reply, frozen=True):
    requests: list[Running]
    rows: int
    max_rows: int
    replicas: list[ReplicaState]


class AliveReply(Reply, frozen=True):
    status: Literal["alive"]


class ReadyReply(Reply, frozen=True):
    status: Literal["ready"]
    model: str
