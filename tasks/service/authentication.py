"""Who asks: the client of a request, by its API key."""

from collections.abc import Mapping

from fastapi import Request

from pipeline.errors import PipelineError
from pipeline.storage import sha256


class UnknownClient(PipelineError):
    """A client without a key that the service knows."""


def client_of(request: Request, keys: Mapping[str, str]) -> str:
    """The name of the client that sends a request; its address where there are no keys.

    Args:
        keys: the name of each client by the sha256 of its API key; none: everybody is served.

    Raises:
        UnknownClient: there are keys, and this is none of them.
    """
    if not keys:
        return request.client.host if request.client else ""
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    name = keys.get(sha256(key.strip().encode())) if scheme.lower() == "bearer" else None
    if name is None:
        raise UnknownClient
    return name
