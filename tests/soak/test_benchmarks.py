"""Every benchmark does its least work, ends, and says what it found."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.benchmarks.program import Figure
from tests.conftest import ROOT, end
from tests.unit.test_benchmark_programs import PROGRAMS

HANGS = 900
"""Seconds that none can take, however slow the machine; two minutes are the aim on two cores."""


@pytest.mark.parametrize("name", PROGRAMS)
def test_a_benchmark_ends_and_says_what_it_found(name: str, tmp_path: Path) -> None:
    begin = time.monotonic()
    process = subprocess.Popen(
        [sys.executable, "-m", f"tests.benchmarks.{name}", "--quick"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=HANGS)
    finally:
        end(process)
    print(f"{name} --quick: {time.monotonic() - begin:.0f} s")
    assert process.returncode == 0, output
    figures = json.loads(output.splitlines()[-1])
    assert figures
    for figure in figures:
        assert figure.keys() == Figure.__annotations__.keys()
        assert (figure["peer"] is None) == (figure["ratio"] is None)
