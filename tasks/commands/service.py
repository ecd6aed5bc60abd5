"""`ddpm serve`: a registered model over HTTP."""

import json
import logging
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline.errors import ConfigError
from tasks.commands.base import (
    ModelArg,
    own_places,
    tracking_uri,
    treat_sigterm_as_ctrl_c,
    validated,
)
from tasks.console import console, log_to_file, shown

if TYPE_CHECKING:
    from pipeline.registry.models import ModelReference


def serve(
    context: typer.Context,
    model: ModelArg,
    replicas: Annotated[
        int | None, typer.Option(help="Copies of the model; by default as its config said.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", help="Any key of a config's `serving`, as in max_images=16."),
    ] = None,
    api_keys: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Lines `NAME KEY`: who may ask; everybody without."),
    ] = None,
) -> None:
    """Serve a registered model over HTTP until Ctrl-C."""
    from pipeline.config import ClusterConfig, apply_override
    from pipeline.registry.models import resolve
    from pipeline.serving.api import ServingConfig
    from pipeline.serving.keys import read_keys
    from tasks import cluster

    if replicas is not None and not 1 <= replicas <= 1000:
        raise ConfigError(f"--replicas {replicas} must be from 1 to 1000")
    cluster.check_port_is_free(host, port)
    reference = resolve(model, tracking_uri(context))
    values = _as_registered(reference)
    if replicas is not None:
        values["replicas"] = replicas
    for setting in settings or []:
        apply_override(values, setting)
    serving: ServingConfig = validated(ServingConfig, "--set ", **values)
    keys = read_keys(api_keys) if api_keys is not None else {}
    log = log_to_file(None)
    from tasks import serve as application

    num_cpus = serving.min_replicas * serving.cpus_per_replica
    num_gpus = serving.min_replicas * serving.gpus_per_replica
    with cluster.connect(ClusterConfig(), num_cpus, num_gpus):
        cluster.check_shared(own_places(reference.tracking_uri))
        serve_log = logging.getLogger("ray.serve")  # it has a handler of its own, for the terminal
        serve_log.handlers = logging.getLogger().handlers
        serve_log.propagate = False
        plural = "s" * (serving.min_replicas > 1)
        console.print(f"loading {reference} on {serving.min_replicas} replica{plural} ...")
        application.start(reference, model, serving, keys, host, port)
        treat_sigterm_as_ctrl_c()
        url = f"http://{host}:{port}"
        console.print(f"serving {reference} at {url}/v1/images/generations, Ctrl-C ends it; try")
        console.print(
            f"  curl -s {url}/v1/images/generations -H 'Content-Type: application/json' "
            """-d '{"n": 4, "seed": 1}'"""
        )
        console.print(f"metrics  {', '.join(cluster.metrics_urls())}")
        console.print(f"log      {shown(str(log))}")
        application.wait_until_interrupted()
        console.print("stopped")


def _as_registered(model: "ModelReference") -> dict[str, Any]:
    """How the config that made a version says to serve it."""
    from pipeline.registry.models import SERVING_TAG, read_tag
    from pipeline.serving.api import ServingConfig

    known = ServingConfig.model_fields  # an earlier version of this project had other settings
    tag = json.loads(read_tag(model, SERVING_TAG) or "{}")
    return {name: value for name, value in tag.items() if name in known}
