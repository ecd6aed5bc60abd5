"""Every skip of the suite says what is missing and how to get it."""

import re

from tests import needs
from tests.conftest import ROOT


def test_every_skip_comes_from_one_place() -> None:
    skips = re.compile(
        r"pytest\.skip|pytest\.mark\.skip|pytest\.importorskip(?!\(\"\w+\", reason=needs\.)"
    )
    files = [path for path in (ROOT / "tests").rglob("*.py") if skips.search(path.read_text())]
    assert {path.relative_to(ROOT / "tests").as_posix() for path in files} == {"needs.py"}


def test_extras_that_are_named_exist() -> None:
    extras = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1]
    named = {
        extra
        for path in (ROOT / "tests").rglob("*.py")
        for extra in re.findall(
            r"needs\.(?:package|extra)\([\w.\"]+, \"([\w-]+)\"", path.read_text()
        )
    }
    assert {"onnx", "diffusers", "s3-test", "interop"} <= named
    assert all(re.search(rf"(?m)^{extra} = ", extras) for extra in named)


def test_what_ci_must_have_is_installed_by_it() -> None:
    script = (ROOT / ".ci" / "run").read_text()
    packages = [need.remedy.split()[-1] for need in needs.NEEDS if need.in_ci]
    assert sorted(packages) == ["chromium", "dataset-fashion-mnist", "g++", "postgresql"]
    assert all(package in script for package in packages)
