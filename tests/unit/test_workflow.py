"""The DAG, shown with toy stages that write real files."""

import _thread
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import pytest

from pipeline import storage
from pipeline.config import RunConfig, validate_config
from pipeline.errors import ConfigError
from pipeline.registry.runs import TrackedRun
from tasks.stages.plan import Plan, make_plan
from tasks.stages.progress import Board
from tasks.stages.stage import External, Look, Outcome, Stage, StageContext
from tasks.stages.workflow import run

VALUES: dict[str, Any] = {
    "name": "toy",
    "data": {"source": "builtin:digits", "image_size": 8, "channels": 1},
    "network": {"base_channels": 8, "channel_multipliers": [1, 2], "attention_at": [4]},
    "training": {"steps": 60, "batch_size": 32, "lr": 1e-3, "precision": "float32"},
}


def config_with(values: dict[str, Any], **changes: Any) -> RunConfig:
    """`values` with other ones, as training__steps=61."""
    sections = {name: dict(of) if isinstance(of, dict) else of for name, of in values.items()}
    for path, value in changes.items():
        *outer, last = path.split("__")
        section: Any = sections
        for name in outer:
            section = section.setdefault(name, {})
        section[last] = value
    return validate_config(sections, "test")


class Recorded:
    """In the place of an MLflow run, whose store takes seconds to make: how it ended."""

    def __init__(self) -> None:
        self.opened = 0
        self.status = ""

    def open(self, plan: Plan) -> TrackedRun:
        self.opened += 1
        return cast(TrackedRun, self)

    def finish(self, status: str) -> None:
        self.status = status


class Toy:
    """source.txt → cut → left, right → join: each adds its name to what it reads."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.made: list[str] = []
        self.recorded = Recorded()
        (folder / "source.txt").write_text("a")
        self.stages: tuple[Stage, ...] = (
            Stage("cut", self.write, reads=("seed",), inputs_of=self.look),
            Stage(
                "left",
                self.write,
                reads=("training",),
                apart_from=("training.log_every",),
                inputs=("cut",),
            ),
            Stage("right", self.write, reads=("name",), inputs=("cut",), beside=("left",)),
            Stage("join", self.write, inputs=("left", "right")),
        )

    def look(self, config: RunConfig, look: Look) -> External:
        text = (self.folder / "source.txt").read_text()
        return External({"source": storage.digest(text)}, text)

    def write(self, ctx: StageContext) -> Outcome:
        name = ctx.folder.split("/")[-2]
        self.made.append(name)
        read = [storage.read_bytes(f"{folder}/out").decode() for folder in ctx.inputs.values()]
        text = " ".join([*read, ctx.external or "", name]).strip()
        return Outcome([storage.write_bytes(f"{ctx.folder}/out", text.encode())])

    def replace(self, name: str, **fields: Any) -> None:
        """Declare a stage otherwise."""
        self.stages = tuple(
            replace(stage, **fields) if stage.name == name else stage for stage in self.stages
        )

    def plan(self, target: str = "join", **changes: Any) -> Plan:
        config = config_with(VALUES, storage=str(self.folder), **changes)
        return make_plan(self.stages, config, "", target)

    def run(self, target: str = "join", **changes: Any) -> dict[str, str]:
        """How each stage ended; `made` are those that ran."""
        self.made.clear()
        results = run(self.plan(target, **changes), Board(), self.recorded.open)
        return {result.name: result.outcome for result in results}

    def why(self, **changes: Any) -> dict[str, str]:
        """The reasons of the stages that would run."""
        stages = self.plan(**changes).stages
        return {planned.name: planned.reason for planned in stages if not planned.done}


@pytest.fixture
def toy(tmp_path: Path) -> Toy:
    return Toy(tmp_path)


def anew(*names: str) -> str:
    return f"its input will be made anew: {', '.join(names)}"


# --- what must run, and why ---------------------------------------------------------------------


def test_a_first_run_makes_each_output_and_a_second_finds_them(toy: Toy) -> None:
    assert toy.why() == {
        "cut": "has no output yet",
        "left": anew("cut"),
        "right": anew("cut"),
        "join": anew("left", "right"),
    }
    assert set(toy.run().values()) == {"done"}
    (made,) = toy.folder.glob("join/*/out")
    assert made.read_text() == "a cut  left a cut  right  join"
    manifests = {path: path.read_bytes() for path in toy.folder.glob("*/*/manifest.json")}
    assert len(manifests) == 4
    assert toy.why() == {}
    assert set(toy.run().values()) == {"cached"}
    assert toy.made == []
    assert {path: path.read_bytes() for path in toy.folder.glob("*/*/manifest.json")} == manifests


def test_a_manifest_tells_what_the_output_was_made_of(toy: Toy) -> None:
    toy.run()
    plan = toy.plan()
    manifest = storage.read_manifest(plan["join"].folder)
    assert manifest is not None
    assert manifest.id == storage.digest(
        ["join", 1, {}, {name: plan[name].id for name in ("left", "right")}]
    )
    assert manifest.inputs == {name: plan[name].id for name in ("left", "right")}
    cut = storage.read_manifest(plan["cut"].folder)
    assert cut is not None and cut.config == {"seed": 0}
    assert cut.inputs == {"source": storage.digest("a")}
    (entry,) = cut.files
    assert entry == storage.entry_of(plan["cut"].folder, "out")
    assert {"torch", "ray"} <= set(cut.versions)


def test_what_a_target_does_not_need_is_left_out(toy: Toy) -> None:
    assert list(toy.run("left")) == ["cut", "left"]
    assert set(toy.why()) == {"right", "join"}


def test_a_changed_value_reaches_what_is_downstream_of_it(toy: Toy) -> None:
    toy.run()
    changed = {"training__steps": 61}
    assert toy.why(**changed) == {"left": "training.steps: 60 → 61", "join": anew("left")}
    assert toy.run(**changed) == {
        "cut": "cached",
        "left": "done",
        "right": "cached",
        "join": "done",
    }
    assert toy.why() == {}, "the outputs of the first values still stand"
    assert toy.why(training__log_every=25) == {}, "it is apart from what is read"
    assert toy.why(cluster={"workers": 1}) == {}, "nobody reads it"


def test_a_changed_source_reaches_all(toy: Toy) -> None:
    toy.run()
    (toy.folder / "source.txt").write_text("b")
    assert toy.why()["cut"] == "its input source changed"
    toy.run()
    assert sorted(toy.made) == ["cut", "join", "left", "right"]
    assert "b cut" in storage.read_bytes(f"{toy.plan()['join'].folder}/out").decode()


def test_another_format_makes_older_outputs_strangers(toy: Toy) -> None:
    toy.run()
    toy.replace("right", format=2)
    assert toy.why() == {"right": "its format is now 2", "join": anew("right")}


def test_an_added_stage_runs_alone(toy: Toy) -> None:
    toy.run()
    toy.stages += (Stage("count", toy.write, reads=("name",), inputs=("join",)),)
    assert toy.plan("count").stages[:4] == toy.plan("join").stages
    assert toy.run("count")["count"] == "done"
    assert toy.made == ["count"]


def test_an_output_that_no_longer_stands_is_made_anew_with_what_follows(toy: Toy) -> None:
    toy.run()
    lost = ["its version is gone"]
    toy.replace("left", why_invalid=lambda folder, uri: lost[0])
    assert toy.why() == {"left": "its version is gone", "join": anew("left")}
    ended = toy.run()
    assert ended == {"cut": "cached", "left": "done", "right": "cached", "join": "done"}
    lost[0] = ""
    assert toy.why() == {}


# --- running ------------------------------------------------------------------------------------


def test_an_interrupted_stage_goes_on_from_what_it_had(toy: Toy) -> None:
    def dies(ctx: StageContext) -> Outcome:
        storage.write_bytes(f"{ctx.folder}/step-000020/half", b"half")
        raise OSError("the power is gone")

    def goes_on(ctx: StageContext) -> Outcome:
        half = storage.read_bytes(f"{ctx.folder}/step-000020/half")
        return Outcome([storage.write_bytes(f"{ctx.folder}/out", half + b" and the rest")])

    toy.replace("left", run=dies)
    with pytest.raises(OSError, match="the power is gone"):
        toy.run("left")
    assert toy.why()["left"] == "was interrupted, goes on from step-000020"
    toy.replace("left", run=goes_on)
    assert toy.run("left") == {"cut": "cached", "left": "done"}
    assert storage.read_bytes(f"{toy.plan()['left'].folder}/out") == b"half and the rest"


def test_independent_stages_run_at_the_same_time(toy: Toy) -> None:
    meeting = threading.Barrier(2, timeout=60)

    def meet(ctx: StageContext) -> Outcome:
        meeting.wait()  # each for the other
        return toy.write(ctx)

    toy.replace("left", run=meet)
    toy.replace("right", run=meet)
    assert set(toy.run().values()) == {"done"}


def test_a_stage_beside_another_is_told_where_its_output_will_be(toy: Toy) -> None:
    beside: dict[str, str] = {}

    def note(ctx: StageContext) -> Outcome:
        beside.update(ctx.beside)
        return toy.write(ctx)

    toy.replace("right", run=note)
    toy.run()
    assert beside == {"left": toy.plan()["left"].folder}


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """What a stage may wait for; it is opened at the end, so that no thread is left waiting."""
    event = threading.Event()
    yield event
    event.set()


def test_the_error_of_a_stage_is_raised_and_what_others_finished_stays(toy: Toy) -> None:
    right_is_done = threading.Event()

    def fails(ctx: StageContext) -> Outcome:
        ctx.tracked_run()
        assert right_is_done.wait(60)
        raise ConfigError("training.steps=60 is wrong")

    def writes(ctx: StageContext) -> Outcome:
        outcome = toy.write(ctx)
        # once its manifest is there
        threading.Thread(target=lambda: (watch(ctx.folder), right_is_done.set())).start()
        return outcome

    def watch(folder: str) -> None:
        while not storage.exists(f"{folder}/manifest.json"):
            time.sleep(0.005)

    toy.replace("left", run=fails)
    toy.replace("right", run=writes)
    with pytest.raises(ConfigError, match="training.steps=60 is wrong"):
        toy.run()
    assert toy.recorded.status == "FAILED"
    assert toy.made == ["cut", "right"], "join has not begun"
    assert set(toy.why()) == {"left", "join"}


def test_the_tracked_run_is_opened_once_by_who_asks_first(toy: Toy) -> None:
    toy.run("cut")
    assert (toy.recorded.opened, toy.recorded.status) == (0, ""), "nobody asked"
    meeting = threading.Barrier(2, timeout=60)

    def asks(ctx: StageContext) -> Outcome:
        meeting.wait()
        ctx.tracked_run()
        return toy.write(ctx)

    toy.replace("left", run=asks)
    toy.replace("right", run=asks)
    toy.run()
    assert (toy.recorded.opened, toy.recorded.status) == (1, "FINISHED")


def test_ctrl_c_ends_a_run_whose_stages_still_work(toy: Toy, gate: threading.Event) -> None:
    def works(ctx: StageContext) -> Outcome:
        ctx.tracked_run()
        _thread.interrupt_main()  # as SIGINT does
        gate.wait()
        raise AssertionError("it was interrupted")

    toy.replace("left", run=works)
    with pytest.raises(KeyboardInterrupt):
        toy.run()
    assert toy.recorded.status == "KILLED"
    assert "left" in toy.why()


class Notes(Board):
    """Calls `heard` with every note of a stage."""

    def __init__(self, heard: Callable[[str], None]) -> None:
        super().__init__()
        update = self.bars.update

        def listen(*arguments: Any, **fields: Any) -> None:
            update(*arguments, **fields)
            heard(fields.get("note", ""))

        self.bars.update = listen  # type: ignore[method-assign]


def test_a_second_run_waits_for_the_first_and_finds_its_output(
    toy: Toy, gate: threading.Event
) -> None:
    begun = threading.Event()

    def slowly(ctx: StageContext) -> Outcome:
        begun.set()
        gate.wait()
        return toy.write(ctx)

    toy.replace("cut", run=slowly)
    second = toy.plan("cut")
    first = threading.Thread(target=toy.run, args=("cut",))
    first.start()
    assert begun.wait(60)
    heard: list[str] = []

    def hear(note: str) -> None:
        heard.append(note)
        gate.set()  # the first goes on once the second is known to wait

    (result,) = run(second, Notes(hear), toy.recorded.open)
    first.join()
    assert result.outcome == "made by another run"
    assert toy.made == ["cut"]
    assert [note.split(" process ")[0] for note in heard] == ["waits for"]
