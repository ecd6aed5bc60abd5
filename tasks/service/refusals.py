"""What the service says over HTTP when it cannot do what is asked."""

import logging

from fastapi.responses import JSONResponse, Response
from ray.exceptions import ObjectLostError, RayActorError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from pipeline.errors import ModelNotFound, RequestError, StorageError, shown
from pipeline.serving.api import error_body
from tasks.service.admission import TooMuch
from tasks.service.authentication import UnknownClient
from tasks.service.request_body import BODY_SECONDS, SlowBody


def refusal(error: Exception) -> Response:
    """What a client is told of an error."""
    if isinstance(error, UnknownClient):
        message = "this service needs an API key that it knows, as `Authorization: Bearer KEY`"
        body = error_body(message, "authentication_error", code="invalid_api_key")
        return JSONResponse(body, 401, headers={"WWW-Authenticate": "Bearer"})
    if isinstance(error, TooMuch):
        message = f"the service is full: try again in {error.seconds} s"
        body = error_body(message, "rate_limit_error")
        return JSONResponse(body, 429, headers={"Retry-After": str(error.seconds)})
    if isinstance(error, SlowBody):
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
