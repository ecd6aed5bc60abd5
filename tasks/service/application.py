"""A registered model as a Ray Serve application: made, and run on the connected Ray.

An ingress (ingress.py) validates a request and deals its n images to the replicas (replica.py);
since an image is its recipe, neither the number of replicas nor who draws what shows in the pixels.
"""

import contextlib
import io
import time
from collections.abc import Iterator, Mapping
from typing import Any

import ray
from ray import serve
from ray.serve.config import AutoscalingConfig, AutoscalingPolicy, HTTPOptions

from pipeline.errors import ClusterError
from pipeline.registry.versions import ModelReference
from pipeline.serving.config import ServingConfig
from tasks import cluster
from tasks.service.autoscaling import by_work
from tasks.service.ingress import Ingress
from tasks.service.replica import Replica

APPLICATION = "ddpm"
"""Of Ray Serve, as `ddpm serve` deploys it; a Serve config calls its own otherwise."""
ON_HEAD = {"resources": {"node:__internal_head__": 0.001}}
"""Ray's options of an actor that is to be on the head: it takes little of what only that has."""
PATIENCE = 10.0
"""Seconds that a replica is given beyond the longest request, to end what it has in hand."""


def make_application(
    model: ModelReference,
    called: str,
    config: ServingConfig,
    keys: dict[str, str],
    where: Mapping[str, Any] = ON_HEAD,
) -> serve.Application:
    """An ingress before replicas.

    Args:
        called: how the user named the model; a request may name it so too.
        keys: the name of each client by the sha256 of its API key; none: everybody is served.
        where: Ray's options that say on which node the ingress is. It holds the requests, so that
            no other node that is lost takes them with it.
    """
    # the decorators make deployments of the classes, which mypy does not see
    replica: Any = Replica
    ingress: Any = Ingress
    if isinstance(config.replicas, int):
        number: dict[str, Any] = {"num_replicas": config.replicas}
    else:
        least, most = config.replicas
        number = {
            "autoscaling_config": AutoscalingConfig(
                min_replicas=least,
                max_replicas=most,
                policy=AutoscalingPolicy(policy_function=by_work),
                metrics_interval_s=1,
                look_back_period_s=5,
                upscale_delay_s=5,
                downscale_delay_s=60,
            )
        }
    patience = {"graceful_shutdown_timeout_s": config.max_seconds + PATIENCE}
    options = {"num_cpus": config.cpus_per_replica, "num_gpus": config.gpus_per_replica}
    replicas = replica.options(**number, **patience, ray_actor_options=options)
    there = {**ingress.ray_actor_options, **where}
    return ingress.options(**patience, ray_actor_options=there).bind(
        replicas.bind(model, config), model, called, config, keys
    )


@contextlib.contextmanager
def running(
    model: ModelReference,
    called: str,
    config: ServingConfig,
    keys: dict[str, str],
    host: str,
    port: int,
) -> Iterator[None]:
    """The service on the connected Ray, from when its model is loaded and answers.

    The ingress is on the node of this command, where the service is reached. At the end the
    requests in hand are done, and of the service nothing is left; what is left of one whose
    command was killed, the next clears away.

    Raises:
        ClusterError: this cluster serves something already; or nothing can listen there.
    """
    here = {"label_selector": {"ray.io/node-id": ray.get_runtime_context().get_node_id()}}
    with _claim(here):
        if others := serve.status().applications.keys() - {APPLICATION}:
            raise ClusterError(
                f"Ray Serve of this cluster serves already: {', '.join(sorted(others))}; add the "
                "model to its Serve config (see infra/README.md), or join another cluster"
            )
        _end()  # what a command has left that was killed
        cluster.check_port_is_free(host, port)
        try:
            serve.start(http_options=HTTPOptions(host=host, port=port))
            app = make_application(model, called, config, keys, here)
            serve.run(app, name=APPLICATION, route_prefix="/")
        except BaseException:  # Ctrl-C among them
            _delete()
            raise
        try:
            yield
        finally:
            _end()


def wait_until_interrupted() -> None:
    """Return at Ctrl-C."""
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(1)


@ray.remote(num_cpus=0)
class _Serving:
    """An actor that by its name says that somebody serves, and ends with whom it belongs to."""


@contextlib.contextmanager
def _claim(where: Mapping[str, Any]) -> Iterator[None]:
    """Be the only one who serves on this cluster."""
    actor: Any = _Serving
    try:
        claim = actor.options(name=APPLICATION, namespace=APPLICATION, **where).remote()
    except ValueError as error:  # as Ray says that the name is taken
        raise ClusterError(
            "this Ray cluster serves already, by another `ddpm serve`: end that, or join another"
        ) from error
    try:
        yield
    finally:
        ray.kill(claim)


def _end() -> None:
    """Let the requests in hand be done, and Ray Serve be gone."""
    _delete()
    while APPLICATION in serve.status().applications:
        time.sleep(0.2)
    with contextlib.redirect_stdout(io.StringIO()):  # Ray complains that Serve has ended itself
        serve.shutdown()


def _delete() -> None:
    if APPLICATION in serve.status().applications:
        serve.delete(APPLICATION, _blocking=False)  # blocking, Ray gives up after a minute
