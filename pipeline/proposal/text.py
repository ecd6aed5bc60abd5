"""Decisions as a YAML file that a person reads: a value a line, its reason beside or above it."""

import textwrap
from typing import Any, NamedTuple

import yaml

COLUMNS = 100


class Decision(NamedTuple):
    """A value of a config, and why it is what it is."""

    key: str
    """Dotted."""
    value: Any
    reason: str = ""


def nested(decisions: list[Decision]) -> dict[str, Any]:
    """The values as a config has them."""
    values: dict[str, Any] = {}
    for key, value, _ in decisions:
        section, _, name = key.rpartition(".")
        (values.setdefault(section, {}) if section else values)[name] = value
    return values


def render(header: list[str], decisions: list[Decision]) -> str:
    """The file: what is in no section first, then each section as a run of its values."""
    lines = [f"# {_printable(line)}".rstrip() for line in header] + [""]
    open_section = ""
    for key, value, reason in decisions:
        section, _, name = key.rpartition(".")
        if section != open_section:
            lines += ["", f"{section}:"]
            open_section = section
        lines += _lines("  " * bool(section), f"{name}: {_scalar(value)}", _printable(reason))
    return "\n".join(lines) + "\n"


def _lines(indent: str, entry: str, reason: str) -> list[str]:
    beside = f"{indent}{entry}  # {reason}"
    if not reason:
        return [indent + entry]
    if len(beside) <= COLUMNS:
        return [beside]
    above = textwrap.wrap(reason, COLUMNS - len(indent) - 2, break_long_words=False)
    return [*(f"{indent}# {line}" for line in above), indent + entry]


def _printable(text: str) -> str:
    """On one line: names of files may hold anything, and what follows a comment is no comment."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _scalar(value: Any) -> str:
    """On one line. Words are quoted unless they are plain in any version of YAML."""
    if isinstance(value, str) and not value.replace("_", "").isalpha():
        dumped = yaml.safe_dump(value, default_style='"', width=float("inf"), allow_unicode=True)
        return dumped.removesuffix("\n")
    text = yaml.safe_dump(value, default_flow_style=True, width=float("inf"), allow_unicode=True)
    return text.removesuffix("\n").removesuffix("\n...")
