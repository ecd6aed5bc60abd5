"""`ddpm submit`: a run as a job on a Ray cluster."""

import os
from pathlib import Path
from typing import Annotated

import typer

from pipeline.errors import ConfigError
from tasks.commands.base import ConfigArg, SetOption, load
from tasks.console import console


def submit(
    context: typer.Context,
    config: ConfigArg,
    address: Annotated[str, typer.Option(help="The head's job server, http://HEAD:8265.")],
    wait: Annotated[
        bool, typer.Option("--wait", help="Follow the job and return its code.")
    ] = False,
    set_: SetOption = None,
) -> None:
    """Run a config as a job on a Ray cluster; the working folder is sent along."""
    from tasks import submit as jobs

    resolved, tracking = load(context, config, set_)  # a mistake is better found here than there
    if not Path(config).absolute().resolve().is_relative_to(Path.cwd().resolve()):
        raise ConfigError(
            f"{config} must be a path within this folder, which is sent to the cluster"
        )
    # the job runs in a folder of its own, so places are sent along as they are seen from here
    places = [
        f"storage={resolved.storage}",
        f"data.source={resolved.data.source}",
        f"tracking.uri={tracking}",
    ]
    job, follow = jobs.submit(
        address, os.path.relpath(config), [*(set_ or []), *places], os.getcwd()
    )
    console.print(
        f"submitted {job}; its outputs go to {resolved.storage}; follow it with\n  {follow}"
    )
    if wait:
        for text in jobs.follow(address, job):
            print(text, end="", flush=True)
        raise typer.Exit(jobs.exit_code(address, job))
