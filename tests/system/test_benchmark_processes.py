"""A benchmark ends with a sentence when one of its processes fails or dies."""

import os
import subprocess
import sys
from multiprocessing import resource_tracker
from pathlib import Path

import pytest

from tests.barrier import meet
from tests.benchmarks import processes
from tests.benchmarks.load_batches import Contender
from tests.benchmarks.preprocess import WORKERS, pictures, same_work_at_once, write_folder
from tests.benchmarks.processes import Failed
from tests.conftest import ROOT

AS_AVX2 = {
    "ONEDNN_MAX_CPU_ISA": "AVX2",
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
}


@pytest.fixture(autouse=True, scope="module")
def tracker() -> None:
    """Python's own, of which there is one as long as this process lives."""
    resource_tracker.ensure_running()


def test_processes_that_begin_at_once_return_what_they_found() -> None:
    assert processes.at_once(meet, [(0, "works"), (1, "works")]) == [0, 1]


@pytest.mark.parametrize(
    "how, sentence",
    [("raises", "IndexError: there is nothing for it"), ("dies", "died with code -9")],
)
def test_nobody_waits_for_a_process_that_is_lost(how: str, sentence: str) -> None:
    with pytest.raises(Failed, match=sentence):
        processes.at_once(meet, [(0, how), (1, how)])


@pytest.mark.parametrize("how, sentence", [("raises", "there is nothing for it"), ("dies", "died")])
def test_a_partner_that_is_lost_is_not_waited_for(how: str, sentence: str) -> None:
    with processes.partner() as one, pytest.raises(Failed, match=sentence):
        processes.answer(one.submit(meet, 1, how, None))


def test_a_process_ends_when_the_benchmark_is_killed() -> None:
    """Though it waits at a barrier for another."""
    code = (
        "from tests.barrier import meet_alone; from tests.benchmarks.processes import at_once;"
        "at_once(meet_alone, [(0,), (1,)])"
    )
    with subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True
    ) as benchmark:
        assert benchmark.stdout is not None
        assert int(benchmark.stdout.readline()) > 0
        benchmark.kill()
        assert benchmark.stdout.read() == "", "its end is that of the last that could write"


def test_a_process_alone_has_the_environment_that_it_is_given() -> None:
    os.environ["BENCHMARK_TEST"] = "here"
    try:
        found = processes.alone(os.getenv, "BENCHMARK_TEST", environment={"BENCHMARK_TEST": None})
        assert found is None
        assert os.environ["BENCHMARK_TEST"] == "here"
        assert processes.alone(os.getenv, "BENCHMARK_TEST") == "here"
    finally:
        del os.environ["BENCHMARK_TEST"]


@pytest.mark.parametrize(
    "program, sentence",
    [
        ("raise RuntimeError('no such peer')", "the peer ended with code 1: .*no such peer"),
        ("print('ready', flush=True); input(); import os; os.kill(os.getpid(), 9)", "code -9"),
        # more than a pipe holds, which nobody reads
        ("import sys; sys.stderr.write('x' * 10**6); print('ready', flush=True)", "code 0"),
    ],
)
def test_a_contender_that_ends_says_why(program: str, sentence: str) -> None:
    cores = sorted(os.sched_getaffinity(0))
    with pytest.raises(Failed, match=sentence):
        Contender("the peer", [sys.executable, "-c", program], cores).go()


def test_a_worker_for_whom_there_is_no_piece_holds_up_nobody(tmp_path: Path) -> None:
    """As when few files are one piece for two processes."""
    source = write_folder(tmp_path / "source", pictures("JPEG", 64, 2), "jpeg", 20)
    assert WORKERS == 2
    assert same_work_at_once(source, tmp_path / "out") > 0


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, *arguments],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
    )


@pytest.mark.parametrize(
    "command, remedy",
    [("calibration", "ddpm run CONFIG"), ("sampler_quality", "ddpm run configs/digits.yaml")],
)
def test_a_benchmark_that_needs_a_model_says_how_to_get_one(command: str, remedy: str) -> None:
    done = run("-m", f"tests.benchmarks.{command}")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and remedy in done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_the_kind_of_a_machine_is_what_is_computed_with() -> None:
    kind = "from tests.benchmarks.program import kind; print(kind())"
    here, limited = run("-c", kind).stdout.strip(), run("-c", kind, **AS_AVX2).stdout.strip()
    assert limited == ("AVX2" if here.startswith("AVX") else here)
    by_onednn_alone = run("-c", kind, ONEDNN_MAX_CPU_ISA="AVX2").stdout.strip()
    assert by_onednn_alone == limited
