"""The page as it is served: one file of HTML, with its style and its script in it."""

import base64
import functools
import hashlib
from importlib import resources

from fastapi.responses import HTMLResponse

STYLE, SCRIPT = '<link rel="stylesheet" href="page.css">', '<script src="page.js"></script>'
"""What page.html says where they come."""


def page() -> HTMLResponse:
    """The page, which may run nothing but its own script and ask nobody but its own service."""
    html, policy = _whole()
    headers = {
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cache-Control": "no-cache",
    }
    return HTMLResponse(html, headers=headers)


@functools.cache
def _whole() -> tuple[str, str]:
    """The page, and what it is allowed to do."""
    folder = resources.files("tasks.service.page")
    html, style, script = (
        folder.joinpath(f"page.{kind}").read_text(encoding="utf-8")
        for kind in ("html", "css", "js")
    )
    style, script = f"\n{style}", f"\n{script}"
    policy = {
        "default-src": "'none'",
        "script-src": _hash(script),
        "style-src": _hash(style),
        "img-src": "data:",
        "connect-src": "'self'",
        "base-uri": "'none'",
        "form-action": "'none'",
        "frame-ancestors": "'none'",
        "require-trusted-types-for": "'script'",
    }
    for link, tag, text in ((STYLE, "style", style), (SCRIPT, "script", script)):
        assert html.count(link) == 1
        html = html.replace(link, f"<{tag}>{text}</{tag}>")
    return html, "; ".join(f"{name} {value}" for name, value in policy.items())


def _hash(text: str) -> str:
    """What allows a style or a script of the page, and no other."""
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
