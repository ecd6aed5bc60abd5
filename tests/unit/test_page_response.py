"""The page as it is served, put together of three files."""

import base64
import hashlib
from html.parser import HTMLParser

from tasks.service.page.response import page
from tests.conftest import ROOT


class Parts(HTMLParser):
    """The text of each element that has some, by its tag; what a page links to."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tag, self.texts, self.links = "", dict[str, list[str]](), list[str]()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tag = tag
        self.links += [value or "" for name, value in attrs if name in ("src", "href")]

    def handle_data(self, data: str) -> None:
        self.texts.setdefault(self.tag, []).append(data)


def test_the_page_holds_its_style_and_its_script_and_its_policy_allows_no_others() -> None:
    response = page()
    parts, policy = (
        Parts(bytes(response.body).decode()),
        response.headers["Content-Security-Policy"],
    )
    allowed = dict(rule.split(" ", 1) for rule in policy.split("; "))
    for tag, kind in (("style", "css"), ("script", "js")):
        text = parts.texts[tag][0]
        assert text.strip() == (ROOT / f"tasks/service/page/page.{kind}").read_text().strip()
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert allowed[f"{tag}-src"] == f"'sha256-{digest}'"
    assert [link for link in parts.links if not link.startswith(("data:", "#"))] == []
