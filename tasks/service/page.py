"""The page of a service, and the look at its engines that the page shows."""

import asyncio
import base64
import hashlib
import re
import time
from pathlib import Path
from typing import Any

from fastapi.responses import HTMLResponse
from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

LOOK_AGAIN = 0.25
"""Seconds for which a look at the replicas serves all who want one."""
LONGEST_LOOK = 3.0
"""Seconds that replicas are waited for."""

HTML = Path(__file__).with_suffix(".html")


def page() -> HTMLResponse:
    """The page, which may run nothing but its own script and ask nobody but its own service."""
    html = HTML.read_text(encoding="utf-8")
    script, style = (_hash(html, tag) for tag in ("script", "style"))
    policy = {
        "default-src": "'none'",
        "script-src": script,
        "style-src": style,
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
    }
    headers = {
        "Content-Security-Policy": "; ".join(f"{name} {value}" for name, value in policy.items()),
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return HTMLResponse(html, headers=headers)


def _hash(html: str, tag: str) -> str:
    """What allows the only <tag> of the page."""
    (text,) = re.findall(rf"<{tag}>(.*?)</{tag}>", html, re.DOTALL)
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


class Look:
    """What the replicas are at. However many pages are open, they are asked a few times a second.

    Args:
        sampler: the handle of the replicas.
    """

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler
        self._replicas: list[dict[str, Any]] = []
        self._taken = -LOOK_AGAIN
        self._one_at_a_time = asyncio.Lock()

    async def replicas(self) -> list[dict[str, Any]]:
        """The state of each replica that answers; if one hangs, what all said the last time."""
        async with self._one_at_a_time:
            if time.monotonic() - self._taken > LOOK_AGAIN:
                await self._take()
                self._taken = time.monotonic()
        return self._replicas

    async def _take(self) -> None:
        try:
            answers = await self._sampler.broadcast("state").results_async(
                timeout_s=LONGEST_LOOK, return_exceptions=True
            )
        except TimeoutError:
            return
        except (RayError, RayServeException):
            answers = []
        there = [answer for answer in answers if isinstance(answer, dict)]
        self._replicas = sorted(there, key=lambda replica: str(replica["replica"]))
