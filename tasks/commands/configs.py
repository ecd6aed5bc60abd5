"""What a config says and would do: `ddpm config`, `explain`, `status` and `schedule`."""

from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.table import Table

from pipeline import storage
from tasks.commands.base import ConfigArg, SetOption, load, plan_stages, print_plan
from tasks.console import console, shown


def status(context: typer.Context, config: ConfigArg, set_: SetOption = None) -> None:
    """Show which stages are done and where their outputs are."""
    table = Table("stage", "state", "output", box=None, pad_edge=False)
    for planned in plan_stages(*load(context, config, set_)).stages:
        table.add_row(planned.name, "done" if planned.done else "to do", planned.folder)
    console.print(table)


def explain(context: typer.Context, config: ConfigArg, set_: SetOption = None) -> None:
    """Show for each stage whether it would run, and why."""
    print_plan(plan_stages(*load(context, config, set_)))


def show_config(context: typer.Context, config: ConfigArg, set_: SetOption = None) -> None:
    """Print the config with all defaults filled in."""
    resolved, _ = load(context, config, set_)
    print(yaml.safe_dump(resolved.model_dump(), sort_keys=False), end="")


def draw_schedule(
    context: typer.Context,
    config: ConfigArg,
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("schedule.png"),
    set_: SetOption = None,
) -> None:
    """Draw the noise schedule and the timesteps that the sampler visits, as a PNG."""
    from pipeline.pictures import schedules

    resolved, _ = load(context, config, set_)
    diffusion, sampling = resolved.diffusion, resolved.sampling
    schedule = schedules.schedule_of(diffusion)
    storage.write_bytes(str(out.absolute()), schedules.draw(schedule, diffusion, sampling))
    for line in schedules.describe(schedule, diffusion, sampling):
        console.print(line)
    console.print(f"picture   {shown(str(out.absolute()))}")
