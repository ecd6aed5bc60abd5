"""The pages of the repository, as their tests read them: links, commands and what they name."""

import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from tests.conftest import ROOT

FOLDERS = ("configs", "infra", "pipeline", "tasks", "tests")
PAGES = sorted(
    [*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))]
)
"""Every page, RESULTS.md of the benchmarks too."""


class Fence(NamedTuple):
    """A block between two lines of three backticks."""

    language: str
    text: str


def name_of(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


def fences(text: str) -> list[Fence]:
    return [Fence(*found) for found in re.findall(r"(?ms)^```(\w*)\n(.*?)^```$", text)]


def without_fences(text: str) -> str:
    return re.sub(r"(?ms)^```.*?^```$", "", text)


def spans(text: str) -> list[str]:
    """What stands between single backticks, over line ends too."""
    return [
        " ".join(found.split())
        for found in re.findall(r"(?<!`)`([^`]+)`(?!`)", without_fences(text))
    ]


def links(text: str) -> list[tuple[str, str]]:
    """(place, anchor) of every link and picture to something in this repository."""
    targets = re.findall(r"\]\(([^)\s]+)\)", without_fences(text))
    return [
        (place, anchor)
        for place, _, anchor in (target.partition("#") for target in targets)
        if not re.match(r"[a-z]+:", place)
    ]


def anchors(text: str) -> set[str]:
    """The names that GitHub gives to headings; of equal ones the second has `-1` behind it."""
    names: list[str] = []
    for heading in re.findall(r"(?m)^#+ (.*)$", without_fences(text)):
        name = re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
        names.append(f"{name}-{names.count(name)}" if name in names else name)
    return set(names)


def shell_lines(text: str) -> Iterator[list[str]]:
    """The words of each command in blocks of shell, without its comment."""
    for fence in fences(text):
        if fence.language == "sh":
            for line in fence.text.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if words:
                    yield words


def console_lines(text: str) -> Iterator[list[str]]:
    """The words of each command that stands with its output, after a `$`."""
    for fence in fences(text):
        for line in re.findall(r"(?m)^\$ (.*)$", fence.text):
            yield shlex.split(line, comments=True)
