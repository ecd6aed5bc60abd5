"""How long a run takes in all: reckoned before it begins, and anew as it goes on."""

import io
from typing import Any

import pytest
from rich.console import Console

from pipeline.config import RunConfig, load_config
from tasks.console import roughly
from tasks.stages import estimate, progress
from tasks.stages.estimate import START_SECONDS, Estimate, Reckoned
from tasks.stages.progress import Board
from tests.conftest import ROOT


class Clock:
    """Goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def stages() -> list[Reckoned]:
    """first → long and short, beside each other → last."""
    return [
        Reckoned("first"),
        Reckoned("long", ("first",), rows=1000, paced=True),
        Reckoned("short", ("first",), rows=200),
        Reckoned("last", ("long", "short"), rows=500),
    ]


def test_a_run_lasts_as_its_longest_way_through_the_stages() -> None:
    whole = Estimate(stages(), 10.0).left()
    assert whole == pytest.approx(3 * START_SECONDS + 1500 / 10)  # first, long, last


def test_a_cached_stage_takes_no_time() -> None:
    assert Estimate(stages()[3:], 10.0).left() == pytest.approx(START_SECONDS + 50)
    assert Estimate([], None).left() == 0


def test_what_has_begun_and_what_has_ended_count_no_more() -> None:
    clock = Clock()
    run = Estimate(stages(), 10.0, clock)
    whole = run.left()
    assert whole is not None
    run.begin("first")
    clock.now += 3
    assert run.left() == pytest.approx(whole - 3)
    run.end("first")
    assert run.left() == pytest.approx(whole - START_SECONDS)
    for name in ("long", "short", "last"):
        run.end(name)
    assert run.left() == 0


def test_the_pace_of_a_stage_is_that_of_those_to_come() -> None:
    """It tells the speed of a machine that could not be measured, too."""
    clock = Clock()
    run = Estimate(stages(), None, clock)
    assert run.left() is None
    run.end("first")
    run.begin("long")
    run.phase("long", 40, 0)
    clock.now += 20
    run.progress("long", 40, 10)  # a quarter of 1000 rows in 20 s
    assert run.left() == pytest.approx(60 + START_SECONDS + 500 / 12.5)


def test_of_a_stage_that_goes_on_only_the_rest_counts() -> None:
    clock = Clock()
    run = Estimate(stages()[1:2], 10.0, clock)
    run.begin("long")
    run.phase("long", 40, 30)
    assert run.left() == pytest.approx(START_SECONDS + 250 / 10)
    clock.now += 50
    run.progress("long", 40, 35)
    assert run.left() == pytest.approx(50)


def digits(*sets: str) -> RunConfig:
    return load_config(str(ROOT / "configs" / "digits.yaml"), list(sets))


def test_the_rows_are_those_that_the_config_asks_for() -> None:
    previews = estimate.of_training(digits("training.steps=1", "training.batch_size=2")) - 6
    one = estimate.of_training(digits("training.steps=250", "training.batch_size=2"))
    assert one == 3 * 250 * 2 + previews  # one checkpoint each
    none = ["evaluation.elbo_images=0", "evaluation.ode_images=0"]
    few = [*none, "evaluation.samples=7", "sampling.steps=5"]
    assert estimate.of_evaluation(digits(*few, "sampling.guidance=0")) == 7 * 5
    assert estimate.of_evaluation(digits(*few, "sampling.guidance=1")) == 2 * 7 * 5
    bound = ["evaluation.elbo_images=3", "evaluation.ode_images=0"]
    assert estimate.of_evaluation(digits(*few, "sampling.guidance=0", *bound)) == 35 + 3 * 1000


def test_the_speed_is_measured_where_the_workers_compute() -> None:
    rows = estimate.measured_rows_per_second(digits())
    assert rows is not None and rows > 0
    assert estimate.measured_rows_per_second(digits("cluster.gpus_per_worker=1")) is None
    assert estimate.measured_rows_per_second(digits("cluster.address=10.0.0.1:6379")) is None


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.2, "10 s"),
        (40, "40 s"),
        (55, "1 min"),
        (141, "2 min 30 s"),
        (3599, "60 min"),
        (3601, "1 h 10 min"),
        (7200, "2 h"),
        (90_000, "25 h"),
    ],
)
def test_it_is_said_with_no_more_digits_than_it_has(seconds: float, said: str) -> None:
    assert roughly(seconds) == said


@pytest.mark.parametrize("term", ["xterm", "dumb", None])
def test_what_is_left_in_all_is_seen_while_a_stage_runs(
    term: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In bars, or in lines where the terminal cannot move its cursor or there is none."""
    monkeypatch.setenv("TERM", term or "xterm")
    out = io.StringIO()
    written: dict[str, Any] = {"force_terminal": bool(term), "width": 150, "file": out}
    monkeypatch.setattr(progress, "console", Console(highlight=False, **written))
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", -1.0)
    with Board(Estimate(stages(), 10.0, Clock())) as board:
        bar = board.add("first")
        bar.start(4, "files")
        bar.update(2)
        assert board.bars.disable is (term != "xterm")
        board.bars.refresh()
        for name in ("long", "short", "last"):
            board.add(name).close("done")
        bar.close("done")
    whole = roughly(3 * START_SECONDS + 150)
    assert f"about {whole} left in all" in out.getvalue()
    assert board.left_in_all() == ""
