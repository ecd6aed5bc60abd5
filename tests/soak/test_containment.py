"""A test that fails, in the middle of whatever it has started, fails alone and leaves nothing."""

import contextlib
import subprocess
import sys

import psutil

from tests.conftest import ENVIRONMENT, ROOT


def test_a_failure_stays_where_it_is() -> None:
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-rA"]
    environment = {name: value for name, value in ENVIRONMENT.items() if name != "DDPM_TEST"}
    process = subprocess.Popen(
        [*command, "tests/soak/failing_cases.py"],
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        text=True,
    )
    output, _ = process.communicate()
    assert "6 failed, 1 passed" in output, output
    assert output.count("E       AssertionError: on purpose") == 6, output
    assert "PASSED tests/soak/failing_cases.py::test_of_an_innocent" in output
    left = []
    for other in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if other.environ().get("DDPM_TEST", "").startswith(f"{process.pid} "):
                left.append(other.cmdline())
    assert left == []
