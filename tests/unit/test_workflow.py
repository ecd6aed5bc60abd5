"""The DAG: toy stages that write real files, then what the pipeline's own stages declare."""

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
from pipeline.data.config import NOT_IN_PARTS, SCANNED, DataConfig
from pipeline.data.input_shards import cut
from pipeline.data.preprocess import shard_digest
from pipeline.data.sources import scan
from pipeline.errors import ConfigError
from pipeline.registry.runs import TrackedRun
from tasks import train
from tasks.console import Board
from tasks.plan import Plan, make_plan
from tasks.stage import External, Look, Outcome, Stage, StageContext
from tasks.stages import LAST, STAGES
from tasks.workflow import run

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


# --- the pipeline's own stages ------------------------------------------------------------------

FLOAT32 = {"precision": "float32", "log_every": 25, "checkpoint_every": 250}
DIGITS: dict[str, Any] = {
    "name": "digits",
    "data": {"source": "builtin:digits", "image_size": 8, "channels": 1, "holdout": 0.15},
    "network": {"base_channels": 32, "channel_multipliers": [1, 2], "attention_at": [4]},
    "diffusion": {"schedule": "cosine"},
    "training": {"steps": 1500, "batch_size": 64, "lr": 1e-3, "ema": {"decay": 0.995}, **FLOAT32},
    "evaluation": {"samples": 500, "during_training": 200},
    "sampling": {"steps": 50, "guidance": 0.5},
}
CLOTHES: dict[str, Any] = {
    "name": "clothes",
    "seed": 3,
    "data": {
        "source": "train-*",
        "class_names": ["coat", "bag"],
        "image_size": 28,
        "channels": 1,
        "images_per_shard": 4096,
    },
    "network": {"base_channels": 32, "channel_multipliers": [1, 2, 2], "attention_at": [7]},
    "diffusion": {"prediction": "v"},
    "training": {"steps": 3000, "batch_size": 64, "lr": 1e-3, **FLOAT32},
    "evaluation": {"extractor": {"kind": "inception", "file": "f.safetensors", "sha256": "0" * 64}},
    "registry": {"alias": "best"},
}
IMAGES: dict[str, Any] = {
    "name": "images",
    "data": {
        "source": "s3://bucket/images",
        "labels": "s3://bucket/labels.csv",
        "image_size": 256,
        "channels": 3,
        "encoding": "png",
        "min_size": 200,
        "max_aspect": 2.0,
    },
    "network": {"preset": "ddpm_256"},
    "diffusion": {"schedule": "edm", "prediction": "edm"},
    "training": {"steps": 9, "batch_size": 64, "lr": 1e-4, "shuffle": "windowed", **FLOAT32},
    "sampling": {"sampler": "heun", "steps": 18},
    "serving": {"replicas": 1},
}


@pytest.mark.parametrize(
    ("values", "ids"),
    [
        (
            DIGITS,
            "3cf170b96e0463e4 f98d31d3887af5f6 aaa870f92de08e72 "
            "9002d75e7401953a 2233b953b29fe54d 9db77492d4b17b3e",
        ),
        (
            CLOTHES,
            "6acd0ddfcf917ed4 0d7c379db4021158 d34be9b6cffeedcd "
            "3c52389229953138 95f8dddcfdb84503 8686de02bd7f7c7f",
        ),
        (
            IMAGES,
            "93585c5f72755e39 07c463789da79829 5963249cb690e225 "
            "999c91c3a3f21543 a4f7fe0670c3ac73 3a041e2927568e7b",
        ),
    ],
    ids=["digits", "clothes", "images"],
)
def test_outputs_that_exist_keep_their_ids(
    values: dict[str, Any], ids: str, tmp_path: Path
) -> None:
    """They are those that the first edition of the workflow gave, at commit efa2e0a."""
    stages = list(STAGES)
    if values is not DIGITS:  # their images are not here
        fixed = External({"source": "0" * 64})
        stages[0] = replace(stages[0], inputs_of=lambda config, look: fixed)
    plan = make_plan(stages, config_with(values, storage=str(tmp_path)), "", LAST)
    assert " ".join(stage.id for stage in plan.stages) == ids


def test_each_stage_comes_after_its_inputs_and_its_code_is_there() -> None:
    names = [stage.name for stage in STAGES]
    for i, stage in enumerate(STAGES):
        assert set(stage.inputs) <= set(names[:i])
        assert set(stage.beside) <= set(names[:i])
        with pytest.raises(TypeError, match="run.. missing 1 required positional argument: 'ctx'"):
            cast(Any, stage.run)()


@pytest.mark.parametrize(
    ("change", "first"),
    [
        ({"data__holdout": 0.2}, "preprocess"),
        ({"data__max_bad_fraction": 0.5}, "preprocess"),
        ({"evaluation__classifier_epochs": 2}, "reference"),
        ({"training__lr": 2e-3}, "train"),
        ({"evaluation__samples": 30}, "evaluate"),
        ({"registry__alias": "best"}, "register"),
        ({"serving__replicas": 3}, "register"),
        ({"sampling__steps": 9}, "evaluate"),
        ({"evaluation__during_training": 5}, None),
        ({"cluster__workers": 1}, None),
        ({"tracking__uri": "http://x"}, None),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_key_changes_what_depends_on_it_and_where_it_runs_nothing(
    change: dict[str, Any], first: str | None, tmp_path: Path
) -> None:
    plans = [
        make_plan(STAGES, config_with(DIGITS, storage=str(tmp_path), **changes), "", LAST)
        for changes in ({}, change)
    ]
    pairs = zip(plans[0].stages, plans[1].stages, strict=True)
    changed = [one.name for one, other in pairs if one.id != other.id]
    downstream = [stage.name for stage in STAGES if first is not None and needs(stage, first)]
    assert changed == downstream


def needs(stage: Stage, name: str) -> bool:
    by_name = {each.name: each for each in STAGES}
    return stage.name == name or any(needs(by_name[each], name) for each in stage.inputs)


OTHER_DATA: dict[str, Any] = {
    "source": "elsewhere",
    "labels": "labels.csv",
    "class_names": tuple("ABCDEFGHIJ"),
    "image_size": 16,
    "channels": 3,
    "resize": "exact",
    "min_size": 5,
    "max_aspect": 2.0,
    "drop_duplicates": False,
    "encoding": "png",
    "holdout": 0.2,
    "max_bad_fraction": 0.5,
    "images_per_shard": 100,
}
"""Of each key of `data` another value than in VALUES."""


def test_no_key_of_the_data_can_be_forgotten(tmp_path: Path) -> None:
    """A key is read unless it is said, once, that it is not; a new one is read as it comes."""
    assert set(OTHER_DATA) == set(DataConfig.model_fields), "give a new key a value here"
    config = DataConfig.model_validate(VALUES["data"])
    source = scan(config)
    fixed = replace(STAGES[0], inputs_of=lambda config, look: External({"source": "same"}))
    shard = cut(source, config.images_per_shard)[0]

    def ids(config: DataConfig) -> tuple[str, str]:
        whole = config_with(VALUES, storage=str(tmp_path)).model_copy(update={"data": config})
        stage_id = make_plan([fixed], whole, "", "preprocess")["preprocess"].id
        return stage_id, shard_digest(shard, config, source.class_names)

    before = ids(config)
    for key, value in OTHER_DATA.items():
        of_set, of_shard = ids(config.model_copy(update={key: value}))
        assert (of_set == before[0]) == (key in SCANNED), key
        assert (of_shard == before[1]) == (key in NOT_IN_PARTS), key


def test_a_batch_larger_than_the_data_is_refused_before_anything_starts(tmp_path: Path) -> None:
    shards = {"stage": "preprocess", "id": "s", "inputs": {}, "config": {}, "files": []}
    stats = {"num_images": {"train": 1527, "holdout": 270}}
    storage.commit(str(tmp_path / "s"), storage.Manifest(format=1, stats=stats, **shards))
    config = config_with(VALUES, training__batch_size=4096)
    context = StageContext(
        config,
        "id",
        str(tmp_path),
        {"preprocess": str(tmp_path / "s")},
        "",
        Board().add("train"),
        lambda: pytest.fail("MLflow"),
    )
    with pytest.raises(
        ConfigError, match=r"training.batch_size=4096 is more than the 1527 training"
    ):
        train.run(context)
