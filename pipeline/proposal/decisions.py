"""The table of decisions: from what images are like to a config, a reason beside each value."""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass

from pipeline.config import RunConfig, validate_config
from pipeline.data.survey import Survey
from pipeline.proposal.fit import (
    EVALUATION_SHARE,
    MOST_EPOCHS,
    MOST_FITTED,
    Fit,
    Machine,
    Wishes,
    Work,
    find_fit,
    least_steps,
    power_of_two,
    resolutions,
    share_out,
)
from pipeline.proposal.text import Decision, nested, render

FEWEST_TO_HOLD_OUT, MOST_HELD_OUT = 100, 2000
SAMPLING_STEPS = 20
FEWEST_TO_GUIDE = 20
"""Images of a class, on average, from which guidance means something."""
ROWS_PER_TRAINED, ELBO_ROWS, ODE_ROWS = 3, 1000, 400
"""A training image costs as much as so many rows of sampling; what a bound costs, and an ODE."""
JUDGE_SHARE = 0.5
"""Of the images that training sees, how many the judge sees."""
CHECKPOINT_SECONDS, FEWEST_CHECKPOINTS = 600.0, 4
RATES = {128: 2e-4, 64: 5e-4, 32: 1e-3, 16: 2e-3}
DECAYS = (0.9, 0.95, 0.98, 0.99, 0.995, 0.998, 0.999, 0.9995, 0.9998, 0.9999)
BYTES_PER_SHARD, TASKS_PER_CORE = 2**26, 4
WINDOW = 16384

MeasureConfig = Callable[[RunConfig, int, float], float]
"""(config, number of classes, limit) -> seconds of a training step; infinite beyond the limit."""


@dataclass(frozen=True)
class Facts:
    """What is known before a size is chosen."""

    survey: Survey
    machine: Machine
    wishes: Wishes
    holdout: float
    work: Work

    @property
    def num_usable(self) -> int:
        """About how many images there are to use."""
        survey = self.survey
        if survey.is_whole:
            return len(survey.seen)
        return max(1, round(survey.num_images * (1 - len(survey.bad) / survey.num_sampled)))

    @property
    def num_train(self) -> int:
        return max(1, round((1 - self.holdout) * self.num_usable))

    @property
    def num_classes(self) -> int:
        return len(self.survey.class_names)

    @property
    def channels(self) -> int:
        return 3 if self.survey.num_with_colour > 0.02 * len(self.survey.seen) else 1

    @property
    def guides(self) -> bool:
        labelled = sum(self.survey.class_counts)
        return self.num_classes > 0 and labelled >= FEWEST_TO_GUIDE * self.num_classes


def propose(
    survey: Survey, machine: Machine, wishes: Wishes, measure: MeasureConfig
) -> tuple[RunConfig, str]:
    """A config for the surveyed images; and the same as a file, with reasons.

    Raises:
        RequestError: the size that is wished for cannot be had.
    """
    few = len(survey.seen) < FEWEST_TO_HOLD_OUT
    holdout = 0.0 if few else _one_digit(min(0.1, MOST_HELD_OUT / survey.num_images))
    work = share_out(machine, survey.least_to_train(holdout))
    facts = Facts(survey, machine, wishes, holdout, work)

    def config_of(fit: Fit) -> RunConfig:
        return validate_config(nested(table(facts, fit)), wishes.command)

    def measure_pair(size: int, width: int, limit: float) -> float:
        return measure(config_of(Fit(size, width, 1, 1.0)), facts.num_classes, limit)

    fit = find_fit(survey, machine, wishes, work, facts.num_train, measure_pair)
    return config_of(fit), render(header(facts, fit), table(facts, fit))


def header(facts: Facts, fit: Fit) -> list[str]:
    """What was found, with the commands, in lines."""
    survey, machine, minutes = facts.survey, facts.machine, facts.wishes.minutes
    about = "" if survey.is_counted else "about "
    found = [f"{about}{survey.num_images:,} image{'s' * (survey.num_images > 1)}"]
    if facts.num_classes:
        found.append(f"{facts.num_classes:,} class{'es' * (facts.num_classes > 1)}")
    found.append("{}x{} pixels in the median".format(*survey.median_size))
    found.append("in colour" if facts.channels == 3 else "grey")
    if survey.bad:
        of = "" if survey.is_whole else f" of {survey.num_sampled} sampled"
        found.append(f"{len(survey.bad)}{of} unusable")
    lines = [
        ", ".join(found),
        "",
        f"  {facts.wishes.command} > {name_of(survey.source)}.yaml    # wrote this file",
        f"  ddpm run {name_of(survey.source)}.yaml",
        "",
        f"Machine: {machine.cores} core{'s' * (machine.cores > 1)}, "
        f"{machine.gpus or 'no'} GPU{'s' * (machine.gpus > 1)}. Of {minutes:g} minutes training "
        f"has {fit.training_seconds / 60:.1f}.",
    ]
    if not fit.fits:
        lines.append(
            f"That is little: of the {least_steps(fit.size, fit.width)} steps that such images "
            f"need there is time for {fit.steps}. Give more --minutes."
        )
    return lines


def table(facts: Facts, fit: Fit) -> list[Decision]:
    """All decisions, in the order of the file."""
    return [
        Decision("name", facts.wishes.name or name_of(facts.survey.source)),
        Decision("seed", 0),
        Decision("storage", "runs"),
        *_data(facts, fit),
        *_network(facts, fit),
        Decision("diffusion.schedule", "cosine"),
        Decision("diffusion.prediction", "v"),
        *_training(facts, fit),
        *_evaluation(facts, fit),
        *_sampling(facts),
        *_cluster(facts),
    ]


def name_of(source: str) -> str:
    """A name for a run: the last word of the source's path that is no pattern."""
    parts = [part for part in re.split(r"[/\\:]+", source) if part.strip(".")]
    part = next((part for part in reversed(parts) if not re.search(r"[*?\[]", part)), "")
    part = re.sub(r"(\.(tar|zip|gz|tgz|parquet|npy|npz|bin|png|jpe?g))+$", "", part, flags=re.I)
    name = re.sub(r"[^A-Za-z0-9_.-]+", "-", part).strip("-_.")[:100]
    return name or "images"


# --- the sections ---------------------------------------------------------------------------------


def _data(facts: Facts, fit: Fit) -> list[Decision]:
    survey = facts.survey
    width, height = survey.median_size
    found = [
        Decision("data.source", survey.source),
        Decision("data.image_size", fit.size, _why_size(facts, fit)),
        Decision("data.channels", facts.channels, _why_channels(facts)),
    ]
    if width != height:
        why = f"the centre of {width}x{height}; `exact` would squeeze all of it into a square"
        found.append(Decision("data.resize", "crop", why))
    if survey.bad:
        n, bad = survey.num_sampled, len(survey.bad)
        # of a sample, what it may be of all; of all, what it is
        most = bad if survey.is_whole else bad + 3 * math.sqrt(bad) + 3
        share = min(1.0, math.ceil(100 * most / n) / 100)
        why = f"{bad} of {n} images cannot be used, such as {_named(survey.bad[0])}"
        if share > 0.01:
            found.append(Decision("data.max_bad_fraction", share, why))
    why = "kept from training, to be measured" if facts.holdout else "too few to keep any back"
    found.append(Decision("data.holdout", facts.holdout, why))
    decoded = fit.size**2 * facts.channels
    most = max(1, min(8192, BYTES_PER_SHARD // decoded))
    wanted = survey.num_images / (TASKS_PER_CORE * facts.machine.cores)
    per_shard = min(most, max(256, power_of_two(wanted)))
    tasks = max(1, round(survey.num_images / per_shard))
    why = f"about {tasks:,} task{'s' * (tasks > 1)} of preprocessing"
    return [*found, Decision("data.images_per_shard", per_shard, why)]


def _why_size(facts: Facts, fit: Fit) -> str:
    survey = facts.survey
    sides = survey.shorter_sides
    smaller = round(100 * float((sides < fit.size).mean()))
    if facts.wishes.size is not None:
        why = "as asked for with --size"
    elif fit.larger is not None:
        why = f"{fit.larger} pixels would take longer than there is time: see --minutes"
    elif (sides == fit.size).mean() >= 0.9:
        why = "their own size"
    else:
        why = f"of sides from {sides[0]} to {sides[-1]} pixels (the shorter ones)"
    if smaller:
        why += f"; {smaller} % are smaller and are enlarged, unless data.min_size leaves them out"
    return why


def _why_channels(facts: Facts) -> str:
    survey, n = facts.survey, len(facts.survey.seen)
    if not survey.num_with_colour:
        return f"grey: no colour in {n} images, whatever their files say"
    have = "has" if survey.num_with_colour == 1 else "have"
    return f"{survey.num_with_colour} of {n} images {have} colour"


def _network(facts: Facts, fit: Fit) -> list[Decision]:
    levels = resolutions(fit.size)
    pixels = f"{', '.join(map(str, levels[:-1]))} and {levels[-1]}"
    why = f"for {facts.num_usable:,} images, and steps of {fit.seconds_per_step:.2g} s"
    return [
        Decision("network.kind", "unet"),
        Decision("network.base_channels", fit.width, why),
        Decision("network.channel_multipliers", [1] + [2] * (len(levels) - 1), f"at {pixels} px"),
        Decision("network.blocks_per_level", 1 if fit.width <= 32 else 2),
        Decision("network.attention_at", [levels[-1]], "where each pixel sees all others"),
    ]


def _training(facts: Facts, fit: Fit) -> list[Decision]:
    work, steps = facts.work, fit.steps
    epochs = steps * work.batch_size / facts.num_train
    log_every = next(n for n in (100, 50, 25, 10, 5, 2, 1) if n == 1 or steps >= 50 * n)
    wanted = max(FEWEST_CHECKPOINTS, math.ceil(fit.training_seconds / CHECKPOINT_SECONDS))
    checkpoint_every = log_every * max(1, round(steps / wanted / log_every))
    # a tenth of training, about
    decay = max((d for d in DECAYS if d <= 1 - 10 / steps), default=DECAYS[0])
    why_steps = (
        f"{fit.seconds_per_step:.3g} s a step was measured here ({_hands(facts)}), so they take "
        f"{fit.training_seconds / 60:.1f} minutes with what runs beside them; each image is seen "
        f"{epochs:,.0f} times"
    )
    if epochs > 0.9 * MOST_EPOCHS:
        why_steps += ", and more would only learn them by heart"
    found = [
        Decision("training.steps", steps, why_steps),
        Decision("training.batch_size", work.batch_size, "of all workers together"),
        Decision("training.lr", RATES[fit.width]),
        Decision("training.lr_schedule", "cosine"),
        Decision("training.warmup_steps", min(500, steps // 15)),
        Decision("training.ema", {"decay": decay}, "averages over a tenth of the training"),
    ]
    if facts.num_classes:
        found.append(Decision("training.label_dropout", 0.1, "so that guidance can be had"))
    found += _shuffle(facts, fit)
    mirrored = "0.5 where a mirrored image is as good, as of most photographs; not of letters"
    return [
        *found,
        Decision("training.horizontal_flip", 0.0, mirrored),
        Decision("training.log_every", log_every),
        Decision("training.checkpoint_every", checkpoint_every, "with samples to look at"),
    ]


def _shuffle(facts: Facts, fit: Fit) -> list[Decision]:
    decoded = fit.size**2 * facts.channels
    whole = facts.num_train * decoded
    if whole <= facts.machine.memory / 2:
        why = f"decoded, the images take {_bytes(whole)}, for which there is room"
        return [Decision("training.shuffle", "full", why)]
    why = f"decoded, the images would take {_bytes(whole)}, more than half of what is free"
    found = [Decision("training.shuffle", "windowed", why)]
    # workers hold twice a window
    most = power_of_two(facts.machine.memory / 16 / decoded)
    if most < WINDOW:
        window = max(facts.work.batch_size, most)
        found.append(Decision("training.shuffle_window", window, "images, as memory allows"))
    return found


def _evaluation(facts: Facts, fit: Fit) -> list[Decision]:
    trained = facts.work.batch_size / fit.seconds_per_step
    rows = ROWS_PER_TRAINED * trained * EVALUATION_SHARE * 60 * facts.wishes.minutes
    # of no classes there is no judge, and samples are only looked at
    judged = facts.num_classes >= 2
    of_sample = SAMPLING_STEPS * (2 if facts.guides else 1)
    samples = _down(0.6 * rows / of_sample, (100, 200, 500, 1000)) if judged else 100
    held_out = round(facts.holdout * facts.num_usable)
    of_bound = _down(min(0.25 * rows / ELBO_ROWS, held_out), (0, 8, 16, 32, 64))
    of_ode = _down(min(0.15 * rows / ODE_ROWS, held_out), (0, 8, 16, 32))
    seen = JUDGE_SHARE * fit.steps * facts.work.batch_size
    epochs = max(1, min(30, round(seen / min(facts.num_train, MOST_FITTED))))
    found = [Decision("evaluation.samples", samples, "drawn, and compared with the images")]
    if judged:
        why = "passes over the images, of the classifier that judges the samples"
        found.append(Decision("evaluation.classifier_epochs", epochs, why))
    else:
        found[0] = found[0]._replace(reason="drawn to be looked at: without classes, no judge")
    if of_bound:
        why = "held-out images whose bits per dimension are bounded"
        found.append(Decision("evaluation.elbo_images", of_bound, why))
    if of_ode:
        why = "and whose likelihood is computed by the ODE"
        found.append(Decision("evaluation.ode_images", of_ode, why))
    return found


def _sampling(facts: Facts) -> list[Decision]:
    found = [
        Decision("sampling.sampler", "dpm_solver_pp"),
        Decision("sampling.stochastic", True, "of the samplers of few steps, the best measured"),
        Decision("sampling.steps", SAMPLING_STEPS),
    ]
    if facts.guides:
        found.append(Decision("sampling.guidance", 0.5, "towards the class; 0 is most diverse"))
    return found


def _cluster(facts: Facts) -> list[Decision]:
    return [
        Decision("cluster.workers", facts.work.workers, "of this machine"),
        Decision("cluster.cpus_per_worker", facts.work.cpus_per_worker),
        Decision("cluster.gpus_per_worker", 1 if facts.machine.gpus else 0),
    ]


# --- numbers and words ----------------------------------------------------------------------------


def _hands(facts: Facts) -> str:
    """`2 workers of 1 thread`"""
    workers, threads = facts.work.workers, facts.work.cpus_per_worker
    kind = "a GPU each" if facts.machine.gpus else f"{threads} thread{'s' * (threads > 1)}"
    return f"{workers} worker{'s' * (workers > 1)} of {kind}"


def _one_digit(share: float) -> float:
    """Down to one digit: 0.033 -> 0.03."""
    unit = 10.0 ** math.floor(math.log10(share))
    return round(math.floor(share / unit + 1e-9) * unit, 12)


def _down(value: float, steps: tuple[int, ...]) -> int:
    """The largest of `steps` up to a value, or the least."""
    return max((step for step in steps if step <= value), default=steps[0])


def _bytes(n: float) -> str:
    return f"{n / 2**30:.1f} GiB" if n >= 2**30 else f"{max(1, round(n / 2**20)):,} MiB"


def _named(bad: tuple[str, str]) -> str:
    return f"{bad[0]}: {bad[1]}"[:200]
