"""The pages: every link, file, command, key, path and figure that they name is there."""

import ast
import json
import re
from pathlib import Path
from typing import Any

import click
import pytest
import typer
import yaml

from pipeline.config import RunConfig, known_keys, load_config
from tasks.__main__ import app
from tests import tables
from tests.conftest import ROOT
from tests.pages import (
    PAGES,
    anchors,
    console_lines,
    fences,
    links,
    name_of,
    shell_lines,
    spans,
)

DIGITS = str(ROOT / "configs" / "digits.yaml")
COMMAND: Any = typer.main.get_command(app)
VERBS: dict[str, click.Command] = COMMAND.commands
SECTIONS = "|".join(
    name for name in RunConfig.model_fields if name not in ("name", "seed", "storage")
)
ENDINGS = "py|md|ya?ml|json|cpp|png|html|css|js"
MADE_BY_RUNS = ("runs/", "samples/", "mlruns/")
each_page = pytest.mark.parametrize("page", PAGES, ids=name_of)


@each_page
def test_every_link_leads_somewhere(page: Path) -> None:
    text = page.read_text()
    for place, anchor in links(text):
        there = (page.parent / place).resolve() if place else page
        assert there.exists(), f"{place} is not there"
        if anchor:
            assert anchor in anchors(there.read_text()), f"{place}#{anchor}: no such heading"


@each_page
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    for span in spans(page.read_text()):
        for word in span.partition(": ")[0].split():
            path = word.partition("::")[0].rstrip(",")
            is_file = re.fullmatch(rf"[\w.-]+(/[\w.-]+)+\.({ENDINGS})", path)
            is_placeholder = re.search(r"\b[A-Z]+\b", path) or path.startswith(MADE_BY_RUNS)
            if is_file and not is_placeholder:
                roots = (ROOT, page.parent, page.parent / "kubernetes")
                assert any((root / path).exists() for root in roots), path
            if re.fullmatch(r"test_\w+\.py", path):
                assert list((ROOT / "tests").rglob(path)), path


@each_page
def test_every_command_of_a_page_is_one(page: Path) -> None:
    text = page.read_text()
    for words in [*shell_lines(text), *console_lines(text)]:
        match words:
            case ["ddpm", "--help"]:
                pass
            case ["ddpm", verb, *arguments]:
                while ">" in arguments:  # where the output goes
                    del arguments[arguments.index(">") :]
                VERBS[verb].make_context(verb, arguments)
            case ["make", *targets]:
                assert set(targets) <= make_targets()
    for span in spans(text):
        match span.split():
            case ["ddpm", verb, *words] if re.fullmatch("[a-z]+", verb):
                options = {name for it in VERBS[verb].params for name in it.opts}
                named = {word.partition("=")[0] for word in words if word.startswith("--")}
                assert named <= options, span
            case ["make", *targets]:
                assert {it for it in targets if "=" not in it} <= make_targets(), span
        for module in re.findall(r"python -m (tests(?:\.[a-z_]+)+)(?![.\w])", span):
            assert (ROOT / (module.replace(".", "/") + ".py")).exists(), span


def make_targets() -> set[str]:
    return set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


@each_page
def test_every_key_of_a_config_that_a_page_names_exists(page: Path) -> None:
    known = {*known_keys(), "network.preset"}
    for span in spans(page.read_text()):
        for key in re.findall(rf"(?<![\w./])(?:{SECTIONS})(?:\.[a-z_0-9]+)+(?![\w/(])", span):
            if not re.search(r"\.(py|yaml|md)$", key):
                assert key in known, span
        if re.fullmatch(rf"(?:{SECTIONS})\.[\w.]+=[^A-Z]*", span):
            load_config(DIGITS, [span.replace("…", "0" * 64)])


@each_page
def test_every_block_of_python_and_yaml_is_valid(page: Path) -> None:
    for language, text in fences(page.read_text()):
        if language == "python":
            ast.parse(text)
        elif language == "yaml":
            values = yaml.safe_load(text)
            load_config(DIGITS, [f"{key}={json.dumps(value)}" for key, value in values.items()])


@each_page
def test_every_variable_of_the_environment_is_read_somewhere(page: Path) -> None:
    sources = [
        path.read_text()
        for folder in ("tasks", "tests", "infra")
        for path in (ROOT / folder).rglob("*.*")
        if path.suffix in (".py", ".yaml")
    ]
    for name in set(re.findall(r"\bDDPM_[A-Z_]+\b", page.read_text())):
        assert any(name in source for source in sources), name


@each_page
def test_every_path_of_the_service_exists(page: Path) -> None:
    from tasks.service.ingress import http

    routes = {re.sub(r"\{\w+\}", "ID", path) for path in http.openapi()["paths"]}
    text = page.read_text()
    named = set(re.findall(r"(?<![\w.])/(?:v1/[\w/]+\w|healthz|readyz|openapi\.json)", text))
    assert named <= {*routes, "/openapi.json"}


@pytest.mark.parametrize("page", tables.MADE, ids=name_of)
def test_tables_that_are_made_from_models_are_those_of_the_models(page: Path) -> None:
    assert tables.made_anew(page) == page.read_text(), "make them anew: python -m tests.tables"


def test_every_key_has_a_meaning_of_its_own() -> None:
    for section in tables.sections():
        meanings = list(tables.meanings(section.model).values())
        assert len(set(meanings)) == len(meanings)


@pytest.mark.parametrize("room", ["pipeline", "tasks"])
def test_the_page_of_a_room_names_each_of_its_modules_and_no_others(room: str) -> None:
    items = re.findall(
        r"(?ms)^- (`[\w/]+\.py`.*?)$(?!\n  )", (ROOT / room / "README.md").read_text()
    )
    named = [
        name for item in items for name in re.findall(r"`([\w/]+\.py)`", item.partition(": ")[0])
    ]
    modules = [path.relative_to(ROOT / room) for path in (ROOT / room).rglob("*.py")]
    there = [path.as_posix() for path in modules if not is_understood(path)]
    assert sorted(named) == sorted(there)


def is_understood(module: Path) -> bool:
    """Whether a page says of all modules of this name together what they are."""
    is_section = module.name == "config.py" and module.parent != Path()
    return module.name == "__init__.py" or is_section


def test_the_pages_of_configs_and_tests_name_all_that_is_there() -> None:
    configs = (ROOT / "configs" / "README.md").read_text()
    assert [
        path.name
        for path in (ROOT / "configs").iterdir()
        if f"({path.name})" not in configs and path.suffix == ".yaml"
    ] == []
    named = {
        word
        for page in ("tests/README.md", "pipeline/README.md")
        for span in spans((ROOT / page).read_text())
        for word in (span.split("/")[-1], span.removeprefix("tests/"))
    }
    there = [path.relative_to(ROOT / "tests") for path in (ROOT / "tests").rglob("*.py")]
    missing = [
        path.as_posix()
        for path in there
        if path.name not in ("__init__.py", "conftest.py")
        and path.parts[0] != "benchmarks"
        and path.name not in named
        and path.as_posix() not in named
    ]
    assert missing == []


FRONT = (ROOT / "README.md").read_text()


def test_the_front_page_is_short_and_leads_to_every_room() -> None:
    assert len(FRONT.splitlines()) <= 150
    places = {place for place, _ in links(FRONT)}
    assert {name_of(page) for page in PAGES if page.name == "README.md"} - {"README.md"} <= places


def test_every_figure_of_the_front_page_stands_in_its_source() -> None:
    table = FRONT.split("## How good, how fast")[1].split("\n## ")[0]
    rows = [row.split(" | ") for row in table.splitlines() if row.startswith("| ")][1:]
    assert len(rows) >= 8
    for what, figures, source in rows:
        texts = [(ROOT / place).read_text().replace("+-", "±") for place, _ in links(source)]
        for number in re.findall(r"\d[\d,.]*\d|\d", f"{what} {figures}"):
            found = re.compile(rf"(?<![\d.,]){re.escape(number)}(?!\.?\d)")
            assert texts and all(found.search(text) for text in texts), f"{what}: {number}"


def test_what_the_front_page_shows_of_explain_has_the_stages_of_a_run() -> None:
    from tasks.stages.declarations import STAGES

    names = [stage.name for stage in STAGES]
    shown = re.findall(r"(?m)^  (\w+) +(?:cached|will run) ", FRONT)
    assert shown == names[: len(shown)] and len(shown) >= 4


def test_the_promises_that_code_refers_to_stand_with_their_tests() -> None:
    page = (ROOT / "tests" / "README.md").read_text()
    promises = dict(re.findall(r"(?m)^\| (P\d) \| (.*) \|$", page))
    assert [f"P{i}" for i in range(1, 7)] == list(promises)
    for row in promises.values():
        assert re.search(r"`tests/[\w/]+\.py", row)
    files = [
        path for folder in ("pipeline", "tasks", "tests") for path in (ROOT / folder).rglob("*.py")
    ]
    named = {it for path in files for it in re.findall(r"[Pp]romise (P\d)", path.read_text())}
    assert named and named <= set(promises)


@each_page
def test_every_test_and_name_in_a_file_that_a_page_names_is_there(page: Path) -> None:
    text = page.read_text()
    places = [span.split("::") for span in spans(text) if "::" in span and ".py" in span]
    places += [
        [path, name] for name, path in re.findall(r"`(\w+)`[^`\n]{0,3}\(`([\w/]+\.py)`\)", text)
    ]
    for path, name in places:
        assert re.search(rf"\b{name}\b", (ROOT / path).read_text()), f"{path}: {name}"


# --- the command line's own pages ---------------------------------------------------------------


@pytest.mark.parametrize("verb", VERBS)
def test_the_help_of_a_verb_is_a_sentence_and_says_what_each_word_is(verb: str) -> None:
    first = (VERBS[verb].help or "").partition("\n")[0]
    assert first.endswith(".") and len(first) <= 90
    for parameter in VERBS[verb].params:
        said = getattr(parameter, "help", None)
        assert said and said[0].isupper() | said[0].islower() and said.endswith("."), parameter.name
