"""The page of concepts names only code and tests that are there."""

import re

import pytest

from tests.conftest import ROOT

PAGE = (ROOT / "pipeline" / "README.md").read_text()
ROWS = [
    line for line in PAGE.splitlines() if re.fullmatch(r"\|( .* \|| \|){5}", line) and "`" in line
]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.split("|")[1].strip())
def test_what_a_row_names_exists(row: str) -> None:
    code = re.findall(
        r"`((?:diffusion|networks|samplers|training|evaluation)/\w+\.py): ([^`]+)`", row
    )
    tests = re.findall(r"`(test_\w+\.py)`", row)
    assert code, "a concept has its code"
    assert tests, "a concept has its test"
    for path, names in code:
        text = (ROOT / "pipeline" / path).read_text()
        for name in names.split(", "):
            assert re.search(rf"^ *(def|class) {name}\b", text, re.MULTILINE), f"{path}: {name}"
    for name in tests:
        assert (ROOT / "tests" / "unit" / name).exists(), name


def test_every_module_of_the_mathematics_has_a_row() -> None:
    modules = [
        f"{folder}/{path.name}"
        for folder in ("diffusion", "samplers")
        for path in (ROOT / "pipeline" / folder).glob("*.py")
        if path.name not in ("__init__.py", "config.py", "model.py", "multistep.py")
    ]
    assert [module for module in sorted(modules) if f"`{module}: " not in PAGE] == []
