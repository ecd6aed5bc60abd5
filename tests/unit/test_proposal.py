"""From what images are like to a config: it loads, fits the machine and the time, and says why."""

import itertools
import math
import random
from pathlib import Path

import pytest

from pipeline.config import RunConfig, load_config
from pipeline.data.shards import split_of
from pipeline.data.survey import Seen, Survey
from pipeline.errors import RequestError
from pipeline.proposal.decisions import name_of, propose
from pipeline.proposal.fit import BESIDE_TRAINING, TRAINING_SHARE, Machine, Wishes
from pipeline.proposal.text import Decision, render

LAPTOP = Machine(cores=2, gpus=0, memory=8 * 2**30)
GPUS = Machine(cores=32, gpus=4, memory=200 * 2**30)
MACHINES = [LAPTOP, GPUS, Machine(1, 0, 2**28), Machine(32, 0, 2**36)]
SIDES = {
    "tiny": [(8, 8)],
    "grey 28": [(28, 28)],
    "photos": [(640, 480)],
    "mixed": [(20, 30), (900, 700), (64, 64), (333, 100)],
    "odd": [(50, 51)],
    "dots": [(3, 3)],
}


def survey_of(
    n: int,
    sides: list[tuple[int, int]] = SIDES["photos"],
    classes: int = 0,
    colour: bool = True,
    bad: int = 0,
    source: str = "photos",
) -> Survey:
    sampled = min(n, 256)
    bad = min(bad, sampled - 1)
    seen = [
        Seen(f"{i:05d}.png", f"{i}", *sides[i % len(sides)], colour, 0.001)
        for i in range(sampled - bad)
    ]
    return Survey(
        source,
        num_images=n,
        is_counted=True,
        class_names=[f"class {i}" for i in range(classes)],
        class_counts=[n // classes] * classes if classes else [],
        seen=seen,
        num_doubles=0,
        bad=[(f"bad{i}.png", "it is empty") for i in range(bad)],
    )


def reckoned(machine: Machine) -> "Measured":
    return Measured(2e13 * machine.gpus if machine.gpus else 2e10 * machine.cores)


class Measured:
    """In place of a measurement: operations over operations a second; remembers what was asked."""

    def __init__(self, per_second: float) -> None:
        self.per_second = per_second
        self.seconds: dict[tuple[int, int], float] = {}

    def __call__(self, config: RunConfig, num_classes: int, limit: float) -> float:
        size, width = config.data.image_size, config.network.model_dump()["base_channels"]
        operations = 2000.0 * config.training.batch_size * size**2 * width**2
        seconds = 0.005 + operations / self.per_second
        self.seconds[size, width] = seconds
        return seconds if seconds <= limit else math.inf


def proposed(tmp_path: Path, survey: Survey, machine: Machine, wishes: Wishes) -> RunConfig:
    """The config as `ddpm run` reads it from the file."""
    config, text = propose(survey, machine, wishes, reckoned(machine))
    path = tmp_path / "my.yaml"
    path.write_text(text)
    assert load_config(str(path)) == config
    assert max(map(len, text.splitlines())) <= 120
    return config


def looks() -> list[tuple[Survey, Machine, Wishes]]:
    """A few hundred of all combinations, always the same."""
    numbers = [1, 2, 30, 99, 200, 1797, 60_000, 1_000_000]
    every = itertools.product(
        numbers, SIDES.values(), [0, 1, 3, 500], [False, True], [0, 3], MACHINES, [1, 5, 30, 3000]
    )
    chosen = random.Random(0).sample(list(every), 300)
    return [
        (survey_of(n, sides, classes, colour, bad), machine, Wishes(minutes))
        for n, sides, classes, colour, bad, machine, minutes in chosen
    ]


@pytest.mark.parametrize(("survey", "machine", "wishes"), looks())
def test_the_config_fits_images_machine_and_time(
    tmp_path: Path, survey: Survey, machine: Machine, wishes: Wishes
) -> None:
    config = proposed(tmp_path, survey, machine, wishes)
    data, training, cluster = config.data, config.training, config.cluster
    network, evaluation = config.network.model_dump(), config.evaluation

    # images
    to_train = [s for s in survey.seen if split_of(s.key, data.holdout) == "train"]
    assert training.batch_size <= len(to_train), "an epoch fills a batch"
    sides = sorted(min(image.width, image.height) for image in survey.seen)
    assert 4 <= data.image_size <= max(8, sides[len(sides) // 2])
    levels = [data.image_size >> i for i in range(len(network["channel_multipliers"]))]
    assert network["attention_at"] == [levels[-1]] and levels[-1] <= 16
    assert data.channels == (3 if survey.seen[0].has_colour else 1)
    assert len(survey.bad) <= data.max_bad_fraction * survey.num_sampled
    assert bool(config.sampling.guidance) <= bool(survey.class_names)
    assert max(evaluation.elbo_images, evaluation.ode_images) <= data.holdout * survey.num_images

    # machine
    assert cluster.min_workers * cluster.cpus_per_worker <= machine.cores
    assert cluster.gpus_per_worker == bool(machine.gpus)
    assert cluster.min_workers <= (machine.gpus or machine.cores)
    decoded = survey.num_images * data.image_size**2 * data.channels
    assert (training.shuffle == "windowed") == (decoded * (1 - data.holdout) > machine.memory / 2)

    # time
    measured = reckoned(machine)
    measured(config, len(survey.class_names), math.inf)
    (step,) = measured.seconds.values()
    budget = 60 * wishes.minutes
    assert training.steps * step <= budget * BESIDE_TRAINING or training.steps == 1
    images = len(survey.seen) if survey.is_whole else survey.num_images
    epochs = training.steps * training.batch_size / ((1 - data.holdout) * images)
    assert training.steps * step > 0.3 * TRAINING_SHARE * budget or epochs > 1500 or step > 1
    assert training.warmup_steps < training.steps
    assert training.checkpoint_every <= training.steps


def test_more_time_makes_larger_images_until_they_have_their_own_size(tmp_path: Path) -> None:
    sizes, steps = [], []
    for minutes in (1, 10, 100, 1000, 10_000, 100_000, 10_000_000):
        config = proposed(tmp_path, survey_of(60_000), LAPTOP, Wishes(minutes))
        sizes.append(config.data.image_size)
        steps.append(config.training.steps)
    assert sizes == sorted(sizes) and len(set(sizes)) >= 4
    assert (sizes[0], sizes[-1]) == (32, 256), "of 480 pixels"
    own = proposed(tmp_path, survey_of(60_000, [(28, 28)]), LAPTOP, Wishes(30))
    assert own.data.image_size == 28


def test_the_size_asked_for_is_taken_whatever_it_costs(tmp_path: Path) -> None:
    config = proposed(tmp_path, survey_of(200), LAPTOP, Wishes(1, size=128))
    assert config.data.image_size == 128
    _, text = propose(survey_of(200), LAPTOP, Wishes(1, size=128), reckoned(LAPTOP))
    assert "That is little" in text
    for size in (0, 3, 31, 50, 1026):
        with pytest.raises(RequestError, match=f"--size {size}: "):
            propose(survey_of(200), LAPTOP, Wishes(30, size=size), reckoned(LAPTOP))


def test_what_no_memory_holds_is_said() -> None:
    with pytest.raises(RequestError, match="--size 64: .* memory"):
        propose(survey_of(200), LAPTOP, Wishes(30, size=64), lambda *_: math.inf)


def test_a_pair_that_cannot_fit_is_measured_no_further() -> None:
    """The limit is what the steps that a size needs leave for each of them."""
    limits = []

    def measure(config: RunConfig, num_classes: int, limit: float) -> float:
        limits.append(limit)
        return math.inf if len(limits) < 3 else limit

    config, _ = propose(survey_of(60_000), LAPTOP, Wishes(30), measure)
    assert len(limits) == 3
    assert config.data.image_size == 192, "at 256 two widths were tried"
    needed = 192**2 * 4
    assert needed * limits[-1] <= 30 * 60 * BESIDE_TRAINING
    assert needed <= config.training.steps * 1.1


def test_what_is_unusual_is_written_with_its_reason() -> None:
    def text_of(survey: Survey, **wishes: int) -> str:
        return propose(survey, LAPTOP, Wishes(30, **wishes), reckoned(LAPTOP))[1]

    text = text_of(survey_of(1247, SIDES["photos"], classes=3, bad=2))
    assert text.startswith("# 1,247 images, 3 classes, 640x480 pixels in the median, in colour, ")
    assert "2 of 256 sampled unusable" in text.splitlines()[0]
    assert "bad0.png: it is empty" in text and "max_bad_fraction: 0.04" in text
    assert "resize: crop  # the centre of 640x480" in text
    assert "measured here (2 workers of 1 thread)" in text
    assert "horizontal_flip: 0.0" in text
    plain = text_of(survey_of(1000, [(32, 32)], colour=False))
    assert "max_bad_fraction" not in plain and "resize" not in plain
    assert "guidance" not in plain and "classifier" not in plain
    assert "grey: no colour in 256 images" in plain
    few = text_of(survey_of(30, [(32, 32)]))
    assert "holdout: 0.0  # too few to keep any back" in few
    assert "elbo_images" not in few
    large = survey_of(10**9, [(64, 64)])
    assert "shuffle: windowed  # decoded, the images would take " in text_of(large)


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("photos", "photos"),
        ("photos/", "photos"),
        ("s3://bucket/my digits", "my-digits"),
        ("/usr/share/datasets/fashion-mnist/train-*", "fashion-mnist"),
        ("a/cats.tar.gz", "cats"),
        ("b/data_[12].zip", "b"),
        ("builtin:digits", "digits"),
        (".", "images"),
        ("*.png", "images"),
        ("été/夏", "images"),
        ("x" * 300, "x" * 100),
    ],
)
def test_a_run_is_named_after_its_source(source: str, name: str) -> None:
    assert name_of(source) == name


@pytest.mark.parametrize(
    "value",
    [
        *("a: b # c", "no", "True", "null", "1e5", "012", "~", "", " x ", "ä\t'\"\\", "a\nb"),
        *("{x}", "😀", "- x", 1, 0.0, 1e-5, 2e-4, True, [1, 2], {"decay": 0.9999}, 1.0),
    ],
)
def test_any_value_is_read_as_it_was_written(tmp_path: Path, value: object) -> None:
    from pipeline.yaml12 import parse

    decisions = [Decision("z", 1), Decision("x.y", value, "why\n not: so")]
    text = render(["a header", "with\nbreaks: \x85"], decisions)
    assert parse(text, "here") == {"z": 1, "x": {"y": value}}
