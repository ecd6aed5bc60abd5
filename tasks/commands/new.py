"""A config for images that nobody has trained on yet: `ddpm new`."""

import math
import shlex
import shutil
import sys
import tempfile
from typing import TYPE_CHECKING, Annotated

import typer

from pipeline.errors import DataError

if TYPE_CHECKING:
    from pipeline.config import RunConfig
    from pipeline.proposal.fit import Machine


def new(
    source: Annotated[
        str,
        typer.Argument(help="A folder, an archive, a glob or a bucket, see configs/README.md."),
    ],
    minutes: Annotated[
        float, typer.Option(min=1, max=1e6, help="How long `ddpm run` may take on this machine.")
    ] = 30,
    size: Annotated[
        int | None,
        typer.Option(help="Height and width in pixels; by default as there is time for."),
    ] = None,
    name: Annotated[
        str | None, typer.Option(help="Name of the model; by default that of the source.")
    ] = None,
) -> None:
    """Look at images and print a config for them, with the reason beside each value."""
    from pipeline.data.survey import survey
    from pipeline.proposal.decisions import propose
    from pipeline.proposal.fit import Wishes, checked_size
    from pipeline.registry.versions import check_name
    from tasks import cluster

    if not source.isprintable():  # of bytes that are no UTF-8 Python makes what cannot be written
        raise DataError(f"{source!r} has letters that no config can hold: give it another name")
    if size is not None:
        checked_size(size)
    if name is not None:
        check_name(name)
    cluster.keep_memory()
    _say(f"looking at {source}")
    found = survey(source)
    _say(f"{found.num_images:,} images; trying training steps")
    wishes = Wishes(minutes, size, name, _command(source, minutes, size, name))
    _, text = propose(found, _machine(), wishes, _measure)
    print(text, end="")


def _measure(config: "RunConfig", num_classes: int, limit: float) -> float:
    """Seconds of a training step, see pipeline/proposal/decisions.py."""
    import torch

    from pipeline.samplers.model import ModelSpec
    from pipeline.training.speed import Fitted, seconds_per_step

    spec = ModelSpec(
        network=config.network,
        diffusion=config.diffusion,
        channels=config.data.channels,
        image_size=config.data.image_size,
        class_names=[str(i) for i in range(num_classes)],
    )
    seconds = seconds_per_step(
        Fitted(spec.make_network, spec.diffusion, spec.image_shape, num_classes),
        config.training,
        config.cluster.min_workers,
        config.cluster.cpus_per_worker,
        torch.device("cuda" if config.cluster.gpus_per_worker else "cpu"),
        limit,
    )
    side, width = config.data.image_size, config.network.model_dump().get("base_channels")
    if seconds < math.inf:
        _say(f"{side}x{side} pixels, {width} channels: {seconds:.2g} s a step")
    return seconds


def _machine() -> "Machine":
    import psutil
    import torch

    from pipeline.proposal.fit import Machine
    from tasks import cluster

    free = shutil.disk_usage(tempfile.gettempdir()).free
    memory = psutil.virtual_memory().available
    return Machine(cluster.num_cores(), torch.cuda.device_count(), min(memory, free))


def _command(source: str, minutes: float, size: int | None, name: str | None) -> str:
    options = {"--minutes": f"{minutes:g}", "--size": size, "--name": name}
    given = [word for key, value in options.items() if value for word in (key, str(value))]
    return shlex.join(["ddpm", "new", source, *given])


def _say(text: str) -> None:
    """To stderr: stdout is the config."""
    print(text, file=sys.stderr)
