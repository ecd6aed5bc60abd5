"""What is served, as `ddpm serve` says it and as a Serve config does.

A Serve config (of `serve deploy FILE`, of KubeRay's RayService) names
`import_path: tasks.service.deployment:application`, and has the fields of `Service` as its `args`;
infra/kubernetes/base/serving.yaml has one.
"""

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel

from pipeline.registry.versions import SERVING_TAG, ModelReference, read_tag, resolve
from pipeline.sentences import validated
from pipeline.serving.config import ServingConfig
from pipeline.serving.keys import read_keys

if TYPE_CHECKING:  # a mistake is told before Ray's seconds of import
    from ray.serve import Application


class Service(BaseModel, frozen=True, extra="forbid", strict=True):
    """A model to be served."""

    model: str
    """NAME@ALIAS or NAME@VERSION; an alias is followed to whatever it comes to mean."""
    tracking_uri: str
    """Of the MLflow server that knows it."""
    api_keys: str | None = None
    """A file of lines `NAME KEY`; without one everybody is served."""
    serving: dict[str, Any] = {}
    """Keys of a config's `serving`, before those that the model was registered with."""


def prepare(
    service: Service, called: str = "serving."
) -> tuple[ModelReference, ServingConfig, dict[str, str]]:
    """The version that is meant now, how it is served, and each client by the sha256 of its key.

    Args:
        called: what stands before a key of `serving` where a message names it.

    Raises:
        ModelNotFound, StorageError: as of `resolve`.
        RequestError: a key or a value of `serving`.
        ConfigError: the API keys.
    """
    reference = resolve(service.model, service.tracking_uri)
    values = {**_as_registered(reference), **service.serving}
    serving: ServingConfig = validated(ServingConfig, called, **values)
    keys = {} if service.api_keys is None else read_keys(service.api_keys)
    return reference, serving, keys


def application(service: Service) -> "Application":
    """The Serve application of a Serve config.

    Raises:
        As of `prepare`; Serve shows it as the status of the application.
    """
    from tasks.service.application import make_application

    reference, serving, keys = prepare(service)
    return make_application(reference, service.model, serving, keys)


def _as_registered(model: ModelReference) -> Mapping[str, Any]:
    """How the config that made a version says to serve it."""
    known = ServingConfig.model_fields  # an earlier version of this project had other settings
    tag = json.loads(read_tag(model, SERVING_TAG) or "{}")
    return {name: value for name, value in tag.items() if name in known}
