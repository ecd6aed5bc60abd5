"""The service's own OpenAPI: every path with the statuses, headers and replies that it can give."""

import logging
from http import HTTPStatus
from typing import Any

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import BaseModel
from starlette.exceptions import HTTPException

from pipeline.serving.api import GenerationRequest, error_body
from pipeline.serving.contract import ErrorReply
from tasks.service.generations import MOST_KEY

Json = dict[str, Any]


class Api(FastAPI):
    """FastAPI, with OpenAI's form of errors for what is no path, no method or a defect."""

    def __init__(self, title: str) -> None:
        # /v1/models/ is no path, rather than a redirect that would lose a body
        super().__init__(title=title, docs_url=None, redoc_url=None, redirect_slashes=False)
        self.add_exception_handler(HTTPException, _refuse)
        self.add_exception_handler(Exception, _fail)

    def openapi(self) -> Json:
        if self.openapi_schema is None:
            schema = super().openapi()
            for operations in schema["paths"].values():
                for operation in operations.values():
                    # FastAPI adds the 422 of its own validation, which no path here uses
                    if "HTTPValidationError" in str(operation["responses"].get("422")):
                        del operation["responses"]["422"]
            for name in ("HTTPValidationError", "ValidationError"):
                schema["components"]["schemas"].pop(name, None)
        return self.openapi_schema or {}


async def _refuse(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:100]}: {error.detail}"
    body = error_body(message, "invalid_request_error")
    return JSONResponse(body, error.status_code, headers=error.headers)


async def _fail(request: Request, error: Exception) -> Response:
    logging.getLogger("ray.serve").error("a request failed", exc_info=error)
    message = "the service failed over this request; its log says why"
    return JSONResponse(error_body(message, "server_error"), 500)


def _header(name: str, description: str, **schema: Any) -> Json:
    return {"name": name, "in": "header", "description": description, "schema": schema}


EVENTS: Json = {
    "text/event-stream": {
        "schema": {
            "description": "An event: an image on its way (its estimate, and x_t), an image, or "
            "what went wrong. Of images the id is the number, and the data has the image_index.",
            "type": "object",
            "required": ["event", "data"],
            "properties": {
                "id": {"type": "string", "pattern": "^[0-9]+$"},
                "event": {
                    "enum": [
                        "image_generation.partial_image",
                        "image_generation.completed",
                        "error",
                    ]
                },
                "data": {"type": "string", "contentMediaType": "application/json"},
            },
        }
    }
}
GENERATION_ID: Json = {
    "X-Generation-Id": {
        "description": "The id under which the request can be listened to again, and given up.",
        "schema": {"type": "string"},
        "required": True,
    }
}
RETRY_AFTER: Json = {
    "Retry-After": {"description": "Seconds.", "schema": {"type": "integer"}, "required": True}
}
GENERATION: Json = {
    "requestBody": {
        "required": True,
        "content": {"application/json": {"schema": GenerationRequest.model_json_schema()}},
    },
    "parameters": [
        _header(
            "Idempotency-Key",
            "The same request with the same key is drawn once.",
            type="string",
            minLength=1,
            maxLength=MOST_KEY,
        )
    ],
}
LISTENING: Json = {
    "parameters": [
        _header(
            "Last-Event-ID",
            "The id of the last event that came: the events after it follow.",
            type="string",
            pattern="^[0-9]{0,9}$",
        )
    ]
}


def answers(reply: type[BaseModel], *refusals: int, images: bool = False) -> dict[int | str, Json]:
    """What a path can say: its reply, and the statuses with which it refuses.

    Args:
        images: the reply is of a request in hand, and may be a stream of events.
    """
    ok: Json = {"model": reply}
    if images:
        ok |= {"content": EVENTS, "headers": GENERATION_ID}
    replies: dict[int | str, Json] = {200: ok}
    for status in refusals:
        replies[status] = {"model": ErrorReply, "description": HTTPStatus(status).phrase}
    if 429 in replies:
        replies[429]["headers"] = RETRY_AFTER
    return replies
