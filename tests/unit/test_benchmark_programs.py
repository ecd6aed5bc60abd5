"""What benchmarks have in common, and how their results are kept."""

import json
import re
from pathlib import Path

import pytest

from tests.benchmarks import program, record
from tests.benchmarks.program import Figure, constant, figure

FOLDER = Path(program.__file__).parent
NO_BENCHMARKS = {"record", "load_batches_peers"}
"""Programs beside the benchmarks: one keeps results, one is a peer, without this project."""
PROGRAMS = sorted(
    path.stem
    for path in FOLDER.glob("*.py")
    if "__main__" in path.read_text() and path.stem not in NO_BENCHMARKS
)


def test_every_program_of_the_folder_is_a_benchmark_with_a_quick_run() -> None:
    assert len(PROGRAMS) >= 10
    for name in PROGRAMS:
        text = (FOLDER / f"{name}.py").read_text()
        assert "program.run(" in text, f"{name} does not begin and end as the others do"
        assert ".quick" in text, f"{name} ignores --quick"
        assert "Barrier" not in text.replace("import Barrier", "").replace("ready: Barrier", ""), (
            f"{name} makes a barrier: processes.at_once has one at which nobody waits for the dead"
        )


def test_a_ratio_is_above_one_where_ours_is_better() -> None:
    assert figure("rate", 30, 20, "a peer", 1.2)["ratio"] == 1.5
    assert figure("time", 20, 30, "a peer", unit="s", less_is_better=True)["ratio"] == 1.5
    assert constant("rate", 1 / 3, "MB/s")["ours"] == 0.3333
    assert set(figure("x", 1, 2, "y")) == set(constant("x", 1, "y")) == set(Figure.__annotations__)


def test_every_arm_has_one_turn_in_a_round() -> None:
    turns: list[str] = []
    seconds = program.in_turn({"a": lambda: turns.append("a"), "b": lambda: turns.append("b")}, 3)
    assert turns == ["a", "b"] * 3
    assert {name: len(of) for name, of in seconds.items()} == {"a": 3, "b": 3}


def printed(kind: str, *figures: Figure) -> str:
    return f"{kind}; a CPU, load 0.1\nsome rows\n{json.dumps(figures)}\n"


def test_a_command_has_a_section_for_each_kind_of_machine() -> None:
    text = record.TITLE
    slow, fast = figure("step", 10, 20, "diffusers", 1.5), figure("step", 30, 20, "JAX", 1.5)
    for kind, of in [("AVX2", slow), ("AVX-512 with bf16", slow), ("AVX-512 with bf16", fast)]:
        text = record.with_section(text, "train_step --threads 1", printed(kind, of), "of today")
    assert re.findall(r"(?m)^## train_step.*", text) == [
        "## train_step, AVX2",
        "## train_step, AVX-512 with bf16",
    ]
    assert [it.figures for it in record.sections_of(text)] == [[slow], [fast]]
    assert "| step | JAX | 1.5 | 1.5 | 0.5 (diffusers) |  |" in text, "the newest, its own peer"
    assert text.startswith(record.TITLE) and text.count(record.RATIOS) == 1


def test_what_two_commands_found_of_one_thing_stands_in_two_rows() -> None:
    text = record.TITLE
    for options, ratio in [("a", 1), ("b", 2)]:
        output = printed(
            "AVX2", figure("distance", ratio, 1, "ancestral"), constant("n", 5, "rows")
        )
        text = record.with_section(text, f"sampler_quality {options}", output, "of today")
    rows = re.findall(r"(?m)^\| distance.*", text)
    assert rows == [
        "| distance | ancestral |  |  | 1 |  |",
        "| distance (`b`) | ancestral |  |  | 2 |  |",
    ]
    assert "| n |" not in text, "what has no ratio is no row"


def test_what_names_no_kind_of_machine_is_not_kept() -> None:
    with pytest.raises(SystemExit, match="no kind of machine"):
        record.with_section(record.TITLE, "engine", "torch 2.13.0, 1 thread\n[]\n", "of today")


def test_the_table_of_ratios_is_that_of_the_sections() -> None:
    text = record.RESULTS.read_text()
    sections = record.sections_of(text)
    assert {it.name for it in sections} <= {*PROGRAMS}
    assert record.table(sections).strip() in text, "make it anew: tests/benchmarks/record.py"
