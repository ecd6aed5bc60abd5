"""The body of a request: read within bounds, and parsed as JSON."""

import asyncio
import json
from collections import Counter
from typing import Any

from fastapi import Request
from starlette.requests import ClientDisconnect

from pipeline.errors import PipelineError, RequestError, shown

MAX_BODY_BYTES = 64 * 1024
BODY_SECONDS = 10.0
"""In which the whole of a request body has to come."""


class SlowBody(PipelineError):
    """A request body that does not come."""


async def read_body(request: Request) -> bytes:
    """All of it.

    Raises:
        RequestError: it is too large, or stops before its end.
        SlowBody: it does not come in time.
    """
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
        raise SlowBody from error
    except ClientDisconnect as error:
        raise RequestError("the request body stops before its end", "body") from error
    return bytes(body)


def parse_json(body: bytes) -> Any:
    """What a body says; each name of an object once.

    Raises:
        RequestError: it is no such JSON.
    """
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
