"""`ddpm submit`, `jobs`, `logs`, `cancel`: runs as jobs on a Ray cluster."""

import os
import sys
import time
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.errors import ConfigError
from tasks.commands.base import ConfigArg, SetOption, load
from tasks.console import console

if TYPE_CHECKING:
    from tasks.jobs.client import Jobs

AddressOption = Annotated[
    str,
    typer.Option(
        envvar="RAY_API_SERVER_ADDRESS", help="Job server of the cluster, as http://HEAD:8265."
    ),
]
JobArg = Annotated[
    str, typer.Argument(metavar="JOB", help="Name of a job, as `ddpm jobs` lists it.")
]


def submit(
    context: typer.Context,
    config: ConfigArg,
    address: AddressOption,
    wait: Annotated[
        bool, typer.Option("--wait", help="Follow the job, and end with its exit code.")
    ] = False,
    attempts: Annotated[
        int, typer.Option(min=1, help="Starts at most, if it is killed or fails.")
    ] = 1,
    image: Annotated[
        str | None,
        typer.Option(help="Run in this container image, instead of sending the working folder."),
    ] = None,
    set_: SetOption = None,
) -> None:
    """Run a config as a job on a Ray cluster, or find the job that runs it."""
    from tasks.jobs.client import Jobs, Run

    resolved, tracking = load(context, config, set_)  # a mistake is better found here than there
    if not Path(config).absolute().resolve().is_relative_to(Path.cwd().resolve()):
        raise ConfigError(
            f"{config} must be a path within this folder, which is sent to the cluster"
        )
    # the job runs in a folder of its own, so places are sent along as they are seen from here
    arguments = []
    for override in [
        *(set_ or []),
        f"storage={resolved.storage}",
        f"data.source={resolved.data.source}",
        f"tracking.uri={tracking}",
    ]:
        arguments += ["--set", override]
    identity = f"{resolved.model_dump_json()} {tracking}"
    run = Run(resolved.name, identity, os.path.relpath(config), arguments)
    jobs = Jobs(address)
    id, is_new = jobs.submit(run, attempts, None if image else os.getcwd(), image)
    console.print(
        f"submitted {id}; its outputs go to {resolved.storage}"
        if is_new
        else f"{id} is at this run already; with other code or more attempts: cancel it first"
    )
    if wait:
        raise typer.Exit(_follow(jobs, id))
    console.print(_how_to_follow(jobs.address, id))


def list_jobs(address: AddressOption) -> None:
    """List the jobs of a cluster."""
    from rich.table import Table

    from tasks.jobs.client import BY, CONFIG, Jobs

    table = Table("job", "config", "status", "since", "took", "by", box=None, pad_edge=False)
    jobs = Jobs(address).all()
    for job in jobs:
        begin, end = (job.start_time or 0) / 1000, (job.end_time or 0) / 1000 or time.time()
        metadata = job.metadata or {}
        table.add_row(
            job.submission_id,
            metadata.get(CONFIG, ""),
            job.status.lower(),
            f"{datetime.fromtimestamp(begin):%Y-%m-%d %H:%M}",
            f"{int(end - begin) // 60}:{int(end - begin) % 60:02d}",
            metadata.get(BY, ""),
        )
    console.print(table if jobs else "no job yet")


def logs(
    job: JobArg,
    address: AddressOption,
    follow: Annotated[
        bool,
        typer.Option("--follow", "-f", help="Follow it to its end, and end with its exit code."),
    ] = False,
) -> None:
    """Print the output of a job."""
    from tasks.jobs.client import Jobs

    jobs = Jobs(address)
    if follow:
        raise typer.Exit(_follow(jobs, job))
    _write(jobs.log(job))


def cancel(job: JobArg, address: AddressOption) -> None:
    """Stop a job; submitted again, the run continues from what is finished."""
    from tasks.jobs.client import Jobs

    was_running = Jobs(address).cancel(job)
    console.print(f"{job} {'is stopped' if was_running else 'was over already'}")


def _follow(jobs: "Jobs", id: str) -> int:
    """Write a job's output until it is over; returns its exit code."""
    from tasks.jobs.client import exit_code

    try:
        job = jobs.follow(id, _write)
    except KeyboardInterrupt:
        console.print(f"\nthe job goes on; {_how_to_follow(jobs.address, id)}")
        return 130
    if code := exit_code(job):
        ended = f"{id} has {'been stopped' if code == 130 else 'failed'}"
        console.print(f"{ended}; submitted again, the run goes on from what is finished")
    return code


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _how_to_follow(address: str, id: str) -> str:
    return (
        f"follow it with\n  ddpm logs {id} --follow --address {address}\nand end it with\n"
        f"  ddpm cancel {id} --address {address}"
    )
