"""`ddpm run`, and a verb for each stage: what it needs is run first."""

import contextlib
import functools
import logging
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import typer
from rich.table import Table

from pipeline import storage
from tasks.commands.base import (
    ConfigArg,
    SetOption,
    load,
    own_places,
    plan_stages,
    print_plan,
    treat_sigterm_as_ctrl_c,
)
from tasks.console import command, console, duration, log_to_file, roughly, shown, shown_uri
from tasks.stages.estimate import Estimate, reckon
from tasks.stages.progress import Board

MANY = 20_000
"""Images whose preprocessing takes a time worth a word, which nothing tells before it begins."""

if TYPE_CHECKING:
    from pipeline.config import RunConfig
    from pipeline.data.items import FileGroup, LookInto
    from pipeline.registry.origin import Origin
    from pipeline.registry.runs import TrackedRun
    from tasks.stages.plan import Plan


def run(context: typer.Context, config: ConfigArg, set_: SetOption = None) -> None:
    """Run every stage that is not done: preprocess, train, evaluate, register, sample."""
    _run_stages(context, config, set_, "sample")


def preprocess(context: typer.Context, config: ConfigArg, set_: SetOption = None) -> None:
    """Turn the source of images into Parquet shards."""
    _run_stages(context, config, set_, "preprocess")


def train(context: typer.Context, config: ConfigArg, set_: SetOption = None) -> None:
    """Train the network, after the stages that it needs."""
    _run_stages(context, config, set_, "train")


def evaluate(context: typer.Context, config: ConfigArg, set_: SetOption = None) -> None:
    """Measure the trained network, after the stages that it needs."""
    _run_stages(context, config, set_, "evaluate")


def register(context: typer.Context, config: ConfigArg, set_: SetOption = None) -> None:
    """Register the trained network in MLflow, after the stages that it needs."""
    _run_stages(context, config, set_, "register")


def _run_stages(
    context: typer.Context, config_path: str, overrides: list[str] | None, target: str
) -> None:
    config, tracking_uri = load(context, config_path, overrides)
    storage.check_writable(config.storage)
    log = log_to_file(config.storage)

    from tasks import cluster
    from tasks.stages import workflow
    from tasks.stages.preprocess import look_on_cluster
    from tasks.stages.tracking import tracked_run

    def open_run(plan: "Plan") -> "TrackedRun":
        typed = _command_line(target, config_path, overrides or [])
        return tracked_run(plan, _origin(config_path), typed)

    with contextlib.ExitStack() as stack:

        @functools.cache
        def start_ray() -> None:
            """Once, and only if there is something for it to do."""
            ray_logs = stack.enter_context(cluster.connect(config.cluster))
            treat_sigterm_as_ctrl_c()
            # the tasks of `sample`, the last stage, are the only ones that use MLflow
            own = own_places(tracking_uri if target == "sample" else "", config.storage)
            cluster.check_shared(own)
            logging.info("the logs of Ray are in %s", ray_logs)

        def look_into(groups: list["FileGroup"], keep_in: str | None) -> Iterator[tuple[int, Any]]:
            start_ray()
            return look_on_cluster(groups, keep_in)

        plan = _plan_visibly(config, tracking_uri, target, look_into)
        print_plan(plan)
        estimate = reckon(plan)
        nothing_to_do = all(planned.done for planned in plan.stages)
        if not nothing_to_do:
            console.print(_how_long(plan, estimate))
        if target != "preprocess":
            from pipeline.registry.store import make_client

            make_client(tracking_uri)  # a store that cannot be used is better found before the work
        if not nothing_to_do:
            start_ray()
        with Board(estimate) as board:
            results = workflow.run(plan, board, open_run)

    console.print()
    table = Table("stage", "", "time", box=None, pad_edge=False)
    for result in results:
        table.add_row(
            result.name, result.outcome, duration(result.seconds) if result.seconds else ""
        )
    console.print(table)
    _print_where_to_look(plan, target, log)


def _origin(config_path: str) -> "Origin":
    """Who runs this: a person here, or the one who submitted it as a job of a cluster."""
    from pipeline.registry.origin import Origin, commit_of_this_code
    from tasks.cluster import job_metadata
    from tasks.jobs.client import BY

    job = job_metadata()
    kind: Literal["LOCAL", "JOB"] = "LOCAL" if job is None else "JOB"
    return Origin(config_path, kind, (job or {}).get(BY), commit_of_this_code())


def _command_line(target: str, config_path: str, overrides: list[str]) -> str:
    """How a person would type it, an option a line."""
    verb = "run" if target == "sample" else target
    options = [shlex.join(["--set", override]) for override in overrides]
    return " \\\n  ".join([shlex.join(["ddpm", verb, config_path]), *options])


def _how_long(plan: "Plan", estimate: Estimate) -> str:
    """In all, as far as it can be said before anything has run."""
    left = estimate.left()
    if left is None:  # it is another machine that computes
        told = "as soon as training has begun" if not plan["train"].done else "by no stage of these"
        return f"how long it takes in all is told {told}"
    num_images = plan["preprocess"].external.items.num_rows
    more = "" if plan["preprocess"].done or num_images < MANY else ", and the preprocessing"
    return f"takes about {roughly(left)} in all{more}, by a few calls of the network just now"


def _plan_visibly(
    config: "RunConfig", tracking_uri: str, target: str, look_into: "LookInto"
) -> "Plan":
    from tasks.stages.stage import Look

    with Board() as board:
        bar = board.add("source")

        def show(done: int, total: int) -> None:
            if done == 0:
                bar.start(total, "files")
            bar.update(done)

        look = Look(remember=True, progress=show, into=look_into)
        plan = plan_stages(config, tracking_uri, target, look)
        source = plan["preprocess"].external
        num_images, num_classes = source.items.num_rows, len(source.class_names)
        bar.close(f"{num_images:,} images" + (f" of {num_classes} classes" if num_classes else ""))
    return plan


def _print_where_to_look(plan: "Plan", target: str, log: Path) -> None:
    console.print()
    places = {
        "preprocess": ("shards", ""),
        "evaluate": ("scores", "metrics.json"),
        "sample": ("samples", "grid.png"),
    }
    for stage, (what, name) in places.items():
        if any(planned.name == stage for planned in plan.stages):
            parts = [name] if name else []
            console.print(f"{what:<9}{shown(storage.join(plan[stage].folder, *parts))}")
    if target != "preprocess":
        what = "MLflow"
        for line in _where_runs_are(plan.tracking_uri, plan.config.name):
            console.print(f"{what:<9}{line}")
            what = ""
    if target == "sample":
        console.print(f"serve    {command('ddpm')} serve {_what_to_serve(plan)}")
    console.print(f"log      {shown(str(log))}")


def _where_runs_are(tracking_uri: str, experiment: str) -> list[str]:
    """The page of an experiment, after the command that starts a server where there is none.

    MLflow 3.17 opens its pages for language models, whatever an experiment says of itself, unless
    the address or the switch above them says otherwise.
    """
    from pipeline.registry.store import make_client

    start = f"{command('mlflow')} ui --backend-store-uri {shown_uri(tracking_uri)}"
    is_server = tracking_uri.startswith(("http://", "https://"))
    server = tracking_uri.rstrip("/") if is_server else "http://127.0.0.1:5000"
    found = make_client(tracking_uri).get_experiment_by_name(experiment)
    inner = f"/#/experiments/{found.experiment_id}?workflowType=machine_learning" if found else ""
    return [f"{server}{inner}"] if is_server else [start, f"{server}{inner}"]


def _what_to_serve(plan: "Plan") -> str:
    """The alias, or the version itself where the gate kept the alias from it."""
    made = storage.read_manifest(plan["register"].folder)
    assert made is not None
    promoted = made.stats["promotion"]["promoted"]
    which = plan.config.registry.alias if promoted else made.stats["version"]
    return f"{plan.config.name}@{which}"
