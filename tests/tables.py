"""The tables of pages that are made from models: the keys of a config, the fields of a request.

    python -m tests.tables     # writes them into the pages

Values and defaults come from the models' JSON schema; meanings are the docstrings under the fields.
"""

import ast
import inspect
import json
import textwrap
from collections.abc import Callable, Container, Iterator
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin

from pydantic import BaseModel

from pipeline.config import RunConfig
from pipeline.samplers.config import SolverSettings
from pipeline.serving.api import GenerationRequest
from tests.conftest import ROOT

BEGIN, END = "<!-- made by python -m tests.tables -->\n", "<!-- end of what was made -->\n"
HEAD = "| key | values | default | meaning |\n|---|---|---|---|\n"


class Section(NamedTuple):
    """A part of a config with keys of its own."""

    path: str
    """Dotted; empty for the top."""
    model: type[BaseModel]
    kind: str
    """Where the keys depend on `kind`: which of them."""


def sections(path: str = "", annotation: Any = RunConfig) -> Iterator[Section]:
    """A section and those within it, each before its own."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        kind = annotation.model_fields.get("kind")
        is_one_of_several = kind is not None and len(get_args(kind.annotation)) == 1
        yield Section(path, annotation, get_args(kind.annotation)[0] if is_one_of_several else "")
        for name, field in annotation.model_fields.items():
            yield from sections(f"{path}.{name}".lstrip("."), field.annotation)
    elif get_origin(annotation) is dict:
        yield from sections(f"{path}.NAME", get_args(annotation)[1])
    else:
        for part in get_args(annotation):
            yield from sections(path, part)


def rows(section: Section, apart_from: Container[str] = ()) -> str:
    """A line of the table for each key of a section that is no section itself."""
    meaning_of, lines = meanings(section.model), []
    for name, schema in section.model.model_json_schema()["properties"].items():
        if name in apart_from:
            continue
        field = section.model.model_fields[name]
        inner = list(sections(name, field.annotation))
        if (inner and inner[0].model is field.annotation) or field.discriminator:
            continue  # a part that is always there has a table and no value of its own
        values = "keys of its own, below" if inner else values_of(schema)
        is_asked_for = field.is_required() and "const" not in schema
        default = "required" if is_asked_for else _shown(schema.get("default"))
        key = f"{section.path}.{name}".lstrip(".")
        cells = (f"`{key}`", values, default, meaning_of[name])
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n")
    return "".join(lines)


def meanings(model: type[BaseModel]) -> dict[str, str]:
    """The docstring under each field, on one line."""
    found: dict[str, str] = {}
    for owner in reversed(model.__mro__):
        if not issubclass(owner, BaseModel) or owner is BaseModel:
            continue
        (definition,) = ast.parse(textwrap.dedent(inspect.getsource(owner))).body
        assert isinstance(definition, ast.ClassDef)
        for field, below in zip(definition.body, definition.body[1:], strict=False):
            match field, below:
                case (
                    ast.AnnAssign(target=ast.Name(name)),
                    ast.Expr(value=ast.Constant(str(text))),
                ):
                    found[name] = " ".join(text.split())
    return found


def values_of(schema: dict[str, Any]) -> str:
    """What a JSON schema allows."""
    choices = schema.get("anyOf", schema.get("oneOf"))
    if choices is not None:
        return " or ".join(filter(None, map(values_of, choices)))
    if "const" in schema or "enum" in schema:
        return ", ".join(map(_shown, schema.get("enum", [schema.get("const")])))
    match schema["type"]:
        case "null":  # which the default shows
            return ""
        case "boolean":
            return "`true`, `false`"
        case "array" if "prefixItems" in schema:
            return f"[{', '.join(map(values_of, schema['prefixItems']))}]"
        case "array":
            of = schema["items"]
            return f"list of {values_of(of)}{'' if 'enum' in of else 's'}"
        case kind:
            return kind + _bounds(schema)


def _bounds(schema: dict[str, Any]) -> str:
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {_short(schema[name])}" for name, sign in signs.items() if name in schema]
    if "multipleOf" in schema:
        bounds.append(f"a multiple of {schema['multipleOf']}")
    return " " + ", ".join(bounds) if bounds else ""


def _short(bound: float) -> str:
    return "2⁶³" if bound == 2**63 else f"{bound:g}"


def _shown(value: Any) -> str:
    """As YAML takes it."""
    return "" if value is None else f"`{value if isinstance(value, str) else json.dumps(value)}`"


def config_keys() -> str:
    """A heading for each section of a config, a table for each part of it."""
    text, heading = "", None
    for section in sections():
        top = section.path.partition(".")[0]
        if top != heading:
            heading = top
            text += f"\n### {f'`{top}`' if top else 'The run itself'}\n"
        about = " ".join((section.model.__doc__ or "").split())
        if top != section.path or section.kind:
            kind = f" with `kind: {section.kind}`" if section.kind else ""
            text += f"\n`{section.path}`{kind}: {about}\n"
        else:
            text += f"\n{about}\n"
        text += f"\n{HEAD}{rows(section)}"
    return text


def request_fields() -> str:
    """What a request may say beside the settings of a solver."""
    section = Section("", GenerationRequest, "")
    return f"\n{HEAD}{rows(section, apart_from=set(SolverSettings.model_fields))}"


MADE: dict[Path, Callable[[], str]] = {
    ROOT / "configs" / "README.md": config_keys,
    ROOT / "tasks" / "README.md": request_fields,
}


def made_anew(page: Path) -> str:
    """The text of a page with its tables made from the models as they are."""
    before, rest = page.read_text().split(BEGIN)
    return before + BEGIN + MADE[page]() + "\n" + END + rest.split(END)[1]


if __name__ == "__main__":
    for page in MADE:
        page.write_text(made_anew(page))
