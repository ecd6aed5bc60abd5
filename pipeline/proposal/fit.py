"""The size of image and network that a machine can train in the time that it is given."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pipeline.data.survey import Survey
from pipeline.errors import RequestError

SIZES = (256, 192, 128, 96, 64, 48, 32, 24, 16, 8)
SMALLEST = 32
"""Of which larger images are made at least, however little the time: nobody would know smaller."""
LARGEST_OWN, OWN_SHARE = 256, 0.9
"""Pixels up to which images keep their own size, where so many have the same."""
WIDTHS = (128, 64, 32, 16)
"""Channels of the network's first level."""
WIDTH_FOR = ((20_000, 128), (2_000, 64), (0, 32))
"""From so many images on, so many channels at most: a wider network learns fewer by heart."""
START_SECONDS = 45.0
"""Of a run, beside what is reckoned: Ray and its workers start, the model is registered."""
FITTED_SECONDS, FEATURE_SECONDS, MOST_FITTED = 1e-6, 3e-7, 60_000
"""Of a core, a pixel: for an image that the judge is fitted to, once, and for the features of one;
measured on the machine that the README names. And how many images it is fitted to at most."""
TRAINING_SHARE, EVALUATION_SHARE = 0.5, 0.15
"""Of the time: training has this at least, the evaluation about that."""
BESIDE_TRAINING = 0.8
"""Of the speed measured, what is left where workers wait for each other, and previews and the judge
of the samples are made beside them."""
MOST_EPOCHS = 2000
"""How often an image is seen at most."""


@dataclass(frozen=True)
class Machine:
    """Where the training will run."""

    cores: int
    gpus: int
    memory: int
    """Bytes that are free, of memory and of the disk for temporary files, whichever is less."""


@dataclass(frozen=True)
class Wishes:
    """What the user asks for."""

    minutes: float
    """For the whole run."""
    size: int | None = None
    """Height and width of the images; by default as large as there is time for."""
    name: str | None = None
    command: str = "ddpm new"
    """How it was asked."""


@dataclass(frozen=True)
class Work:
    """How a training is shared out."""

    batch_size: int
    workers: int
    cpus_per_worker: int


@dataclass(frozen=True)
class Fit:
    """Image and network, and what they take."""

    size: int
    width: int
    steps: int
    seconds_per_step: float
    """As measured."""
    fits: bool = True
    """Whether there is time for as many steps as images of that size need."""
    larger: int | None = None
    """A size that the images have, and that there was no time for."""

    @property
    def training_seconds(self) -> float:
        return self.steps * self.seconds_per_step / BESIDE_TRAINING


Measure = Callable[[int, int, float], float]
"""(size, width, limit) -> seconds of a training step; infinite if it is beyond the limit."""


def share_out(machine: Machine, least_images: int) -> Work:
    """The batch, which no more than `least_images` fill, and who computes it."""
    most = 128 if machine.gpus else 64
    batch = power_of_two(min(most, least_images))
    workers = max(1, min(machine.gpus or machine.cores, batch // 16))
    return Work(batch, workers, max(1, machine.cores // workers))


def power_of_two(n: float) -> int:
    """The largest up to n, 1 at least."""
    return 1 << max(1, int(n)).bit_length() - 1


def resolutions(size: int) -> list[int]:
    """Pixels of the network's levels: halved down to 8 or fewer, once at least."""
    found = [size, size // 2]
    while found[-1] > 8 and found[-1] % 2 == 0:
        found.append(found[-1] // 2)
    return found


def least_steps(size: int, width: int) -> int:
    """Steps after which samples can be recognised, by what digits and Fashion-MNIST took here."""
    return round(max(size, 24) ** 2 * max(width, 32) / 32)


def time_to_train(survey: Survey, machine: Machine, minutes: float, size: int) -> float:
    """Seconds of a run of so many minutes that are left for training."""
    seconds, n = 60 * minutes, survey.num_images
    of_a_core = n * survey.seconds_per_image
    if len(survey.class_names) >= 2:  # else there is no judge
        of_a_core += size**2 * (FITTED_SECONDS * min(n, MOST_FITTED) + FEATURE_SECONDS * n)
    before = START_SECONDS + of_a_core / machine.cores
    return max(TRAINING_SHARE * seconds, (1 - EVALUATION_SHARE) * seconds - before)


def find_fit(
    survey: Survey, machine: Machine, wishes: Wishes, work: Work, num_train: int, measure: Measure
) -> Fit:
    """The largest image, with the widest network, that there is time for; else the smallest.

    Raises:
        RequestError: the network has no levels for the size that is asked for.
    """
    sizes = [checked_size(wishes.size)] if wishes.size is not None else own_sizes(survey)
    pairs = list(_pairs(sizes, survey.num_images))
    for size, width in pairs:
        needed = least_steps(size, width)
        seconds = time_to_train(survey, machine, wishes.minutes, size) * BESIDE_TRAINING
        is_last = (size, width) == pairs[-1]
        limit = math.inf if is_last else seconds / needed
        of_step = measure(size, width, limit)
        if of_step <= limit and math.isfinite(of_step):
            most = min(seconds / of_step, MOST_EPOCHS * num_train / work.batch_size)
            larger = sizes[0] if size < sizes[0] else None
            return Fit(size, width, _rounded(most), of_step, seconds / of_step >= needed, larger)
    raise RequestError(
        f"--size {pairs[-1][0]}: a training step of such images does not fit into the memory here: "
        "ask for smaller ones"
    )


def own_sizes(survey: Survey) -> list[int]:
    """The sizes to train at, the largest first, for which few images must be enlarged."""
    sides = survey.shorter_sides
    common = int(sides[len(sides) // 2])
    has_size = common <= LARGEST_OWN and (sides == common).mean() >= OWN_SHARE
    if has_size and is_size(common):
        sizes = [common, *(size for size in SIZES if size < common)]
    else:
        lowest = sides[int((1 - OWN_SHARE) * len(sides))]
        sizes = [size for size in SIZES if size <= lowest] or [SIZES[-1]]
    return [size for size in sizes if size >= SMALLEST] or sizes[:1]


def is_size(size: int) -> bool:
    """Whether the levels of a network end at a size that attention has no trouble with."""
    return 4 <= size <= 1024 and size % 2 == 0 and resolutions(size)[-1] <= 16


def checked_size(size: int) -> int:
    if not is_size(size):
        raise RequestError(
            f"--size {size}: the network halves images to 16 pixels or fewer, so ask for a size "
            f"such as {', '.join(map(str, reversed(SIZES)))}",
            "size",
        )
    return size


def _pairs(sizes: list[int], num_images: int) -> Iterator[tuple[int, int]]:
    """(size, width), the larger size first, and of each the wider network."""
    widest = next(width for least, width in WIDTH_FOR if num_images >= least)
    for size in sizes:
        narrowest = 16 if size <= 32 else 32 if size < 128 else 64
        widths = [width for width in WIDTHS if narrowest <= width <= widest] or [narrowest]
        yield from ((size, width) for width in widths)


def _rounded(steps: float) -> int:
    """Down to two digits; one step at least."""
    steps = max(1, int(steps))
    unit = int(10 ** max(0, len(str(steps)) - 2))
    return steps // unit * unit
