"""What the service says over HTTP when it cannot do what is asked, and how it reads a body."""

import asyncio
import json
import logging
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

from fastapi import Request
from fastapi.responses import JSONResponse, Response
from ray.exceptions import ObjectLostError, RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from starlette.requests import ClientDisconnect

from pipeline.errors import ModelNotFound, PipelineError, RequestError, StorageError, shown
from pipeline.serving.api import error_body
from tasks.service.generations import Generation

MAX_BODY_BYTES = 64 * 1024
BODY_SECONDS = 10.0
"""In which the whole of a request body has to come."""


class TooMuch(PipelineError):
    """More than the service takes at a time; `seconds` is when to try again."""

    def __init__(self, seconds: int) -> None:
        super().__init__(seconds)
        self.seconds = seconds


class Unknown(PipelineError):
    """A client without a key that the service knows."""


class Slow(PipelineError):
    """A request body that does not come."""


async def read_body(request: Request) -> bytes:
    body = bytearray()
    try:
        async with asyncio.timeout(BODY_SECONDS):
            async for chunk in request.stream():
                body += chunk
                if len(body) > MAX_BODY_BYTES:
                    raise RequestError(
                        f"the request body is larger than {MAX_BODY_BYTES} bytes", "body"
                    )
    except TimeoutError as error:
        raise Slow from error
    except ClientDisconnect as error:
        raise RequestError("the request body stops before its end", "body") from error
    return bytes(body)


def parse_json(body: bytes) -> Any:
    try:
        return json.loads(body.decode(), object_pairs_hook=_no_name_twice)
    except (ValueError, RecursionError) as error:
        raise RequestError("the request body is not JSON in UTF-8", "body") from error


def _no_name_twice(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise RequestError(f"the request body says {shown(twice)} more than once", "body")
    return values


def refusal(error: Exception) -> Response:
    """What a client is told of an error."""
    if isinstance(error, Unknown):
        message = "this service needs an API key that it knows, as `Authorization: Bearer KEY`"
        body = error_body(message, "authentication_error", code="invalid_api_key")
        return JSONResponse(body, 401, headers={"WWW-Authenticate": "Bearer"})
    if isinstance(error, TooMuch):
        message = f"the service is full: try again in {error.seconds} s"
        body = error_body(message, "rate_limit_error")
        return JSONResponse(body, 429, headers={"Retry-After": str(error.seconds)})
    if isinstance(error, Slow):
        message = f"the request body did not come within {BODY_SECONDS:.0f} s"
        body = error_body(message, "invalid_request_error", "body")
        return JSONResponse(body, 408, headers={"Connection": "close"})
    if isinstance(error, RequestError):
        status = 400 if error.param == "body" else 422
        return JSONResponse(error_body(error.message, "invalid_request_error", error.param), status)
    if isinstance(error, ModelNotFound):
        # its own message says where the registry is, which is nothing to a client
        message = (
            "there is no such model, version or alias: GET /v1/models says what is served; another "
            "is named as NAME@ALIAS or NAME@VERSION"
        )
        return JSONResponse(error_body(message, "invalid_request_error", "model"), 404)
    if isinstance(error, TimeoutError):
        message = "the images were not done in the time that this service gives a request"
        return JSONResponse(error_body(message, "server_error"), 504)
    if isinstance(error, BackPressureError):
        return refusal(TooMuch(1))
    if isinstance(error, DeploymentUnavailableError | RayActorError | ObjectLostError):
        return JSONResponse(error_body("no replica of the model is up", "server_error"), 503)
    if isinstance(error, StorageError):
        logging.getLogger("ray.serve").error("a request failed: %s", error)
        message = "the model registry cannot be read now; the service's log says why"
        return JSONResponse(error_body(message, "server_error"), 503)
    logging.getLogger("ray.serve").error("a request failed", exc_info=error)
    message = "the service failed to draw the images; its log says why"
    return JSONResponse(error_body(message, "server_error"), 500)


def no_such(id: str) -> Response:
    message = f"there is no request {shown(id)}, or it was done a while ago"
    return JSONResponse(error_body(message, "invalid_request_error", "id"), 404)


def cause(error: BaseException) -> Exception:
    """The first error of a group of tasks."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    assert isinstance(error, Exception)
    return error


async def server_sent(generation: Generation, after: int) -> AsyncIterator[str]:
    """The events of a request in the form of server-sent events, from number `after` on."""
    async for number, event in generation.listen(after):
        data = json.dumps({"type": event.name, **event.data})
        yield f"id: {number}\nevent: {event.name}\ndata: {data}\n\n"
    if generation.error is not None:
        reply = refusal(cause(generation.error))
        yield f"event: error\ndata: {bytes(reply.body).decode()}\n\n"
