"""Run a benchmark and keep what it printed in RESULTS.md, with the machine and the versions.

    python -m tests.benchmarks.record NAME [OPTIONS of the benchmark ...]
    python -m tests.benchmarks.record --output FILE NAME [OPTIONS ...]

FILE is what an earlier run of NAME with these OPTIONS printed, on this machine. A section of
RESULTS.md is a command; running it again replaces it.
"""

import os
import platform
import re
import shlex
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

RESULTS = Path(__file__).with_name("RESULTS.md")
TITLE = """# Results of the benchmarks

Each section is what a command printed, on the machine that stands above it. `make bench` makes the
environments that peers need and runs those that need no trained model. Machines differ: trust the
ratios, which come from one run with both sides in turn.
"""
PACKAGES = ("torch", "ray", "pyarrow", "numpy", "pillow")


def main() -> None:
    arguments = sys.argv[1:]
    output = None
    if arguments[:1] == ["--output"]:
        output = Path(arguments[1]).read_text()
        arguments = arguments[2:]
    if not arguments:
        sys.exit(__doc__)
    if output is None:
        output = run(arguments)
    write_section(shlex.join(arguments), output)


def run(arguments: list[str]) -> str:
    """Run the benchmark, show and return what it prints; its failure is ours."""
    name, *options = arguments
    command = [sys.executable, "-m", f"tests.benchmarks.{name}", *options]
    lines = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    if process.returncode:
        sys.exit(process.returncode)
    return "".join(lines)


def write_section(arguments: str, output: str) -> None:
    text = RESULTS.read_text() if RESULTS.exists() else TITLE
    heading = f"## {arguments.split()[0]}\n\n`python -m tests.benchmarks.{arguments}`\n"
    section = f"{heading}\n{machine()}\n\n```\n{output.strip()}\n```\n"
    sections = [part for part in re.split(r"(?m)^(?=## )", text) if part]
    kept = [part.strip() + "\n" for part in sections if not part.startswith(heading)]
    RESULTS.write_text("\n".join([*kept, section]))


def machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return (
        f"{time.strftime('%Y-%m-%d')}, {cpu()}, {os.cpu_count()} cores, {memory:.0f} GiB, "
        f"{platform.system()}; Python {platform.python_version()}, {versions}"
    )


def cpu() -> str:
    try:
        found = re.search(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
    except OSError:
        found = None
    return found.group(1) if found else platform.processor() or platform.machine()


if __name__ == "__main__":
    main()
