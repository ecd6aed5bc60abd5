"""`ddpm serve`: a registered model over HTTP."""

import logging
from typing import Annotated, Any

import typer

from pipeline.errors import ConfigError
from tasks.commands.base import (
    ModelArg,
    own_places,
    tracking_uri,
    treat_sigterm_as_ctrl_c,
)
from tasks.console import console, log_to_file, shown


def serve(
    context: typer.Context,
    model: ModelArg,
    replicas: Annotated[
        int | None, typer.Option(help="Number of replicas; by default as the model's config says.")
    ] = None,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port to listen on.")] = 8000,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Change a key of `serving`, as in max_images=16; may be repeated.",
        ),
    ] = None,
    api_keys: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="Lines `NAME KEY`; by default everybody may ask."),
    ] = None,
) -> None:
    """Serve a registered model over HTTP until Ctrl-C."""
    from pipeline.config import ClusterConfig, apply_override
    from tasks import cluster
    from tasks.service.deployment import Service, prepare

    if replicas is not None and not 1 <= replicas <= 1000:
        raise ConfigError(f"--replicas {replicas} must be from 1 to 1000")
    if cluster.default_address(ClusterConfig()) is None:  # else it may be Ray Serve that listens
        cluster.check_port_is_free(host, port)
    values: dict[str, Any] = {} if replicas is None else {"replicas": replicas}
    for setting in settings or []:
        apply_override(values, setting)
    service = Service(
        model=model, tracking_uri=tracking_uri(context), api_keys=api_keys, serving=values
    )
    reference, serving, keys = prepare(service, "--set ")
    log = log_to_file(None)
    from tasks.service import application

    num_cpus = serving.min_replicas * serving.cpus_per_replica
    num_gpus = serving.min_replicas * serving.gpus_per_replica
    with cluster.connect(ClusterConfig(), num_cpus, num_gpus):
        cluster.check_shared(own_places(reference.tracking_uri))
        serve_log = logging.getLogger("ray.serve")  # it has a handler of its own, for the terminal
        serve_log.handlers = logging.getLogger().handlers
        serve_log.propagate = False
        treat_sigterm_as_ctrl_c()  # Ray, once connected, has taken it
        plural = "s" * (serving.min_replicas > 1)
        console.print(f"loading {reference} on {serving.min_replicas} replica{plural} ...")
        with application.running(reference, model, serving, keys, host, port):
            url = f"http://{host}:{port}"
            console.print(
                f"serving {reference} at {url}/v1/images/generations, Ctrl-C ends it; try"
            )
            console.print(
                f"  curl -s {url}/v1/images/generations -H 'Content-Type: application/json' "
                """-d '{"n": 4, "seed": 1}'"""
            )
            console.print(f"metrics  {', '.join(cluster.metrics_urls())}")
            console.print(f"log      {shown(str(log))}")
            application.wait_until_interrupted()
        console.print("stopped")
