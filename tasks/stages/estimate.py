"""How long a run takes in all: reckoned before it begins, and anew as it goes on.

The work of a stage is counted in rows of network calls; a row that is trained on counts as its
forward and backward pass. How many rows a second there are is measured here before the run, and
then by the stages whose progress tells it. To that comes what the start of processes takes.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.config import RunConfig
    from tasks.stages.plan import Plan

START_SECONDS = 8.0
"""What a stage takes beside its rows: processes start, files are written."""
TRAINED = 3
"""Rows of a forward and a backward pass."""
ODE_EVALUATIONS = 500
"""Of an image by evaluation.ode_images, about; each with a backward pass."""
PREVIEW_ROWS = 40 * 25
"""Of the samples that a preview shows, unguided."""
MEASURED_SECONDS = 0.3
TOGETHER = 0.7
"""Of the speed of one worker alone, what is left where as many run as there are cores."""


# --- the rows of each stage ---------------------------------------------------------------------


def of_training(config: "RunConfig") -> float:
    """With the previews of the checkpoints."""
    training = config.training
    previews = -(-training.steps // training.checkpoint_every)
    measured = config.evaluation.during_training * 25
    of_previews = previews * _guided(config) * (PREVIEW_ROWS + measured)
    return TRAINED * training.steps * training.batch_size + of_previews


def of_evaluation(config: "RunConfig") -> float:
    """Samples, the variational bound, and the ODE."""
    evaluation, guided = config.evaluation, _guided(config)
    samples = evaluation.samples * config.sampling.steps
    if (over := evaluation.over_steps) is not None:
        samples += over.samples * len(over.samplers) * sum(over.steps)
    bound = evaluation.elbo_images * config.diffusion.timesteps
    ode = evaluation.ode_images * evaluation.ode_draws * ODE_EVALUATIONS * TRAINED
    return guided * samples + bound + ode


def of_samples(config: "RunConfig") -> float:
    """The grid that ends a run, of ten classes."""
    return 80 * config.sampling.steps * _guided(config)


def _guided(config: "RunConfig") -> int:
    return 2 if config.sampling.guidance else 1


# --- the machine ----------------------------------------------------------------------------------


def measured_rows_per_second(config: "RunConfig") -> float | None:
    """Of all workers together; None where it is not this process's CPU that they compute on."""
    from tasks import cluster

    of = config.cluster
    if of.gpus_per_worker or cluster.default_address(of) is not None:
        return None
    import torch

    from pipeline.training.precision import HALF, prefers_bfloat16, resolve
    from tasks.stages.train_worker import flops_of, model_spec

    cluster.keep_memory()
    spec, threads = model_spec(config, []), torch.get_num_threads()
    prefers = prefers_bfloat16(torch.device("cpu"), flops_of(spec))
    half = HALF.get(resolve(config.training.precision, None, prefers))
    network = spec.make_network()
    workers = max(1, min(of.min_workers, cluster.num_cores() // of.cpus_per_worker))
    rows, most = 1, max(1, config.training.batch_size // of.min_workers)
    fastest = 0.0  # what disturbs a call makes it slower, never faster
    torch.set_num_threads(of.cpus_per_worker)
    try:
        begin = time.monotonic()
        while True:
            images, label = torch.zeros(rows, *spec.image_shape), None
            began = time.monotonic()
            with torch.autocast("cpu", half, half is not None):
                out = network(images, torch.zeros(rows), label)
            out.float().square().mean().backward()
            seconds = time.monotonic() - began
            fastest = max(fastest, rows / seconds)
            if rows == most and time.monotonic() - begin > MEASURED_SECONDS:
                break
            if seconds > MEASURED_SECONDS and rows > 1:  # more of them would take too long
                break
            rows = min(2 * rows, most)
        return TRAINED * fastest * workers * (TOGETHER if workers > 1 else 1.0)
    finally:
        torch.set_num_threads(threads)


# --- the run --------------------------------------------------------------------------------------


@dataclass
class Reckoned:
    """A stage that is to run."""

    name: str
    inputs: tuple[str, ...] = ()
    rows: float = 0.0
    paced: bool = False
    """Its progress goes evenly with its rows."""
    began: float | None = None
    ended: bool = False
    _phase: tuple[float, float] = field(default=(0.0, 1.0), init=False)
    """When it said how much there is, and the share of it that was not done then."""
    _left_of_phase: float | None = field(default=None, init=False)


class Estimate:
    """The seconds that are left of a run.

    Args:
        stages: those that must run.
        rows_per_second: None if it is not known yet.
    """

    def __init__(
        self,
        stages: Iterable[Reckoned],
        rows_per_second: float | None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._stages = {stage.name: stage for stage in stages}
        self._rows_per_second, self._clock = rows_per_second, clock

    def begin(self, name: str) -> None:
        if (stage := self._stages.get(name)) is not None:
            stage.began = self._clock()

    def phase(self, name: str, total: int, done: int) -> None:
        """Of `total` units of work `done` were done by an earlier run."""
        if (stage := self._stages.get(name)) is not None:
            stage._phase = self._clock(), 1 - done / total if total else 1.0

    def progress(self, name: str, total: int | None, done: int) -> None:
        stage = self._stages.get(name)
        if stage is None or not total:
            return
        began, share = stage._phase
        seconds, now_done = self._clock() - began, share - (1 - done / total)
        if seconds <= 0 or now_done <= 0:
            return
        stage._left_of_phase = seconds * (share - now_done) / now_done
        if stage.paced and stage.rows:
            self._rows_per_second = stage.rows * now_done / seconds

    def end(self, name: str) -> None:
        if (stage := self._stages.get(name)) is not None:
            stage.ended = True

    def left(self) -> float | None:
        """Seconds to the end of the last stage; None if that cannot be said yet."""
        until: dict[str, float] = {}
        for stage in self._stages.values():  # each comes after its inputs
            own = self._left_of(stage)
            if own is None:
                return None
            before = max((until.get(name, 0.0) for name in stage.inputs), default=0.0)
            until[stage.name] = before + own
        return max(until.values(), default=0.0)

    def _left_of(self, stage: Reckoned) -> float | None:
        if stage.ended:
            return 0.0
        if stage.paced and stage._left_of_phase is not None:
            return stage._left_of_phase
        expected = START_SECONDS
        if stage.rows:
            if self._rows_per_second is None:
                return None
            expected += stage.rows * stage._phase[1] / self._rows_per_second
        if stage.began is None:
            return expected
        # a stage that is not paced may have more before it than what it now tells of
        return max(stage._left_of_phase or 0.0, expected - (self._clock() - stage.began))


def reckon(plan: "Plan") -> Estimate:
    """The estimate of a plan, by a speed measured now if there is anything to reckon."""
    stages = [
        Reckoned(each.name, each.stage.inputs, each.stage.rows(plan.config), each.stage.paced)
        for each in plan.stages
        if not each.done
    ]
    has_rows = any(stage.rows for stage in stages)
    return Estimate(stages, measured_rows_per_second(plan.config) if has_rows else None)
