"""Run pytest, then each test that failed once more, alone: is it flaky, or broken?

`python -m tests.again ARGUMENTS` is `python -m pytest ARGUMENTS`, but for its end: what failed and
passes alone is listed under FLAKY and does not fail the run. What fails twice fails.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
FAILED = ROOT / ".pytest_cache" / "v" / "cache" / "lastfailed"
"""Where pytest keeps the names of the tests that failed."""
MOST = 20
"""With more failures than these the change is at fault, not luck: none is run again."""


def main(arguments: list[str]) -> int:
    FAILED.unlink(missing_ok=True)
    code = run(*arguments)
    if code != pytest.ExitCode.TESTS_FAILED:  # passed, or ended before all tests were run
        return code
    failed = list(json.loads(FAILED.read_text()))
    if len(failed) > MOST:
        print(f"{len(failed)} tests failed, more than {MOST}: none is run again")
        return code
    results: dict[str, list[str]] = {"FLAKY": [], "FAILED TWICE": []}
    for test in failed:
        print(f"\nonce more, alone: {test}", flush=True)
        passes = run("-p", "no:cacheprovider", test) == 0
        results["FLAKY" if passes else "FAILED TWICE"].append(test)
    for heading, tests in results.items():
        if tests:
            print(f"\n{heading}", *tests, sep="\n  ")
    return code if results["FAILED TWICE"] else 0


def run(*arguments: str) -> int:
    return subprocess.run([sys.executable, "-m", "pytest", *arguments], cwd=ROOT).returncode


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
