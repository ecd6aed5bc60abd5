"""What is not tested for lack of something is said at the end; what CI must have fails there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import needs
from tests.conftest import ROOT

HOOKS = """
from tests.needs import *
from tests.needs import pytest_make_collect_report, pytest_runtest_makereport
from tests.needs import pytest_terminal_summary
"""
TESTS = """
import pytest
from tests import needs

@needs.CHROMIUM.met_if(False)
@pytest.mark.parametrize("i", range(3))
def test_of_the_page(i): ...

def test_of_kubectl():
    needs.KUBECTL.skip()

@pytest.mark.xfail
def test_that_is_expected_to_fail():
    raise AssertionError

def test_that_needs_nothing(): ...
"""
A_WHOLE_FILE = "from tests import needs\nneeds.package('no_such_package', 'onnx')\n"


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    (tmp_path / "conftest.py").write_text(HOOKS)
    (tmp_path / "test_some.py").write_text(TESTS)
    (tmp_path / "test_whole_file.py").write_text(A_WHOLE_FILE)
    return tmp_path


def run(suite: Path, *options: str, ci: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CI": ci}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *options]
    return subprocess.run(command, cwd=suite, env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("options", [(), ("-n", "2")])
def test_what_was_not_tested_is_listed_with_how_to_get_it(
    suite: Path, options: tuple[str, ...]
) -> None:
    done = run(suite, *options, ci="")
    assert done.returncode == 0, done.stdout
    listed = done.stdout.split("not tested here")[1].splitlines()
    assert [line.strip() for line in listed if " skipped: " in line] == [
        "3 skipped: Chromium, which shows the page is missing: sudo apt-get install chromium",
        f"1 skipped: {needs.KUBECTL.reason}",
        "1 skipped: no_such_package is missing: pip install -e '.[onnx]' in this repository",
    ]


def test_in_ci_a_test_fails_for_lack_of_what_ci_must_have(suite: Path) -> None:
    done = run(suite, ci="true")
    assert done.returncode == 1
    assert "1 passed, 2 skipped, 1 xfailed, 3 errors" in done.stdout
    assert "sudo apt-get install chromium (CI must have it)" in done.stdout
