"""The events of a request as a client hears them, while they happen."""

import json
from collections.abc import AsyncIterator

from tasks.service.generations import Generation
from tasks.service.refusals import cause, refusal


async def server_sent(generation: Generation, after: int) -> AsyncIterator[str]:
    """The events of a request in the form of server-sent events, from number `after` on."""
    async for number, event in generation.listen(after):
        data = json.dumps({"type": event.name, **event.data})
        yield f"id: {number}\nevent: {event.name}\ndata: {data}\n\n"
    if generation.error is not None:
        reply = refusal(cause(generation.error))
        yield f"event: error\ndata: {bytes(reply.body).decode()}\n\n"
