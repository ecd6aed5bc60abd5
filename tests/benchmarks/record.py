"""Run a benchmark and keep what it printed in RESULTS.md, under the kind of machine it found.

    python -m tests.benchmarks.record NAME [OPTIONS of the benchmark ...]
    python -m tests.benchmarks.record --output FILE NAME [OPTIONS ...]

FILE is what an earlier run of NAME with these OPTIONS printed, on this machine. A section of
RESULTS.md is a command on a kind of machine; running it there again replaces it. The table of
ratios, which has a column for each kind, is made anew of all sections.
"""

import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import NamedTuple

from tests.benchmarks.program import KINDS, Figure, cpu

RESULTS = Path(__file__).with_name("RESULTS.md")
TITLE = """# Results of the benchmarks

Each section is what a command printed, on the machine that stands above it. `make bench` makes the
environments that peers need and runs those that need no trained model. Machines differ: trust the
ratios, which come from one run with both sides in turn.
"""
PACKAGES = ("torch", "ray", "pyarrow", "numpy", "pillow")
RATIOS = "## Ratios by the kind of machine\n"


class Section(NamedTuple):
    """What a benchmark printed."""

    name: str
    kind: str
    arguments: str
    """The name first."""
    text: str

    @property
    def figures(self) -> list[Figure]:
        lines = re.findall(r"(?m)^\[\{.*\}\]$", self.text)
        return json.loads(lines[-1]) if lines else []


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
    before = RESULTS.read_text() if RESULTS.exists() else TITLE
    RESULTS.write_text(with_section(before, shlex.join(arguments), output, machine()))


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


def with_section(text: str, arguments: str, output: str, machine: str) -> str:
    """RESULTS.md with what a command printed, in the place of what it printed before.

    The kind of machine is what the benchmark itself says first.
    """
    kind = output.partition(";")[0]
    if not re.fullmatch(r"[\w .()-]+", kind):
        sys.exit(f"error: the first line names no kind of machine: {output.splitlines()[:1]}")
    head = f"## {arguments.split()[0]}, {kind}\n\n`python -m tests.benchmarks.{arguments}`\n"
    section = f"{head}\n{machine}\n\n```\n{output.strip()}\n```\n"
    parts = [part for part in re.split(r"(?m)^(?=## )", text) if part]
    kept = [part for part in parts if not part.startswith((head, RATIOS))]
    kept.insert(1, RATIOS + "\n" + table(sections_of("".join([*kept, section]))))
    return "\n".join(part.strip() + "\n" for part in [*kept, section])


def sections_of(text: str) -> list[Section]:
    """Those of commands; prose is left out."""
    found = []
    for part in re.split(r"(?m)^(?=## )", text):
        head = re.match(r"## (\w+), (.+)\n\n`python -m tests\.benchmarks\.(.+)`\n", part)
        if head:
            found.append(Section(*head.groups(), part))
    return found


def table(sections: list[Section]) -> str:
    """A row a ratio, a column a kind of machine; a cell names its peer where that is another."""
    kinds = [*KINDS, *sorted({it.kind for it in sections} - {*KINDS})]
    lines = [
        "Above 1 where ours is better; the goal is the least that was aimed at. A column without a",
        "figure was not measured there.",
        "",
        f"| | beside | goal | {' | '.join(kinds)} |",
        "|---|---|---|" + "---|" * len(kinds),
    ]
    for name in sorted({it.name for it in sections}):
        rows = _rows([it for it in sections if it.name == name])
        if rows:
            lines.append(f"| **{name}** | | |{' |' * len(kinds)}")
        for (what, _), of in rows.items():
            first = next(of[kind] for kind in kinds if kind in of)
            cells = [_cell(of.get(kind), first["peer_name"]) for kind in kinds]
            goal = "" if first["goal"] is None else f"{first['goal']:.3g}"
            lines.append(f"| {what} | {first['peer_name']} | {goal} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def _rows(sections: list[Section]) -> dict[tuple[str, int], dict[str, Figure]]:
    """Figures by kind of machine, by what they are and how often that stood before in a list.

    What two commands found on one kind of machine stands in two rows, the second with its options.
    """
    rows: dict[tuple[str, int], dict[str, Figure]] = {}
    for section in sections:
        names: list[str] = []
        for figure in section.figures:
            if figure["ratio"] is not None:
                what = figure["what"]
                key = (what, names.count(what))
                names.append(what)
                if section.kind in rows.get(key, {}):
                    options = section.arguments.removeprefix(section.name).strip()
                    key = (f"{what} (`{options}`)", key[1])
                rows.setdefault(key, {})[section.kind] = figure
    return rows


def _cell(figure: Figure | None, peer_name: str | None) -> str:
    if figure is None or figure["ratio"] is None:
        return ""
    another = figure["peer_name"] != peer_name
    return f"{figure['ratio']:.3g}" + (f" ({figure['peer_name']})" if another else "")


def machine() -> str:
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    return (
        f"{time.strftime('%Y-%m-%d')}, {cpu()}, {os.cpu_count()} cores, {memory:.0f} GiB, "
        f"{platform.system()}; Python {platform.python_version()}, {versions}"
    )


if __name__ == "__main__":
    main()
