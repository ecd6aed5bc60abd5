"""Serve: a registered model as a Ray Serve application.

An ingress validates a request and deals its n images to the sampler replicas, an engine each; since
an image is its recipe, neither the number of replicas nor who draws what shows in the pixels.
"""

import asyncio
import base64
import contextlib
import json
import logging
import secrets
import time
from typing import Any

import numpy as np
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.config import HTTPOptions
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError

from pipeline.errors import RequestError
from pipeline.registry.models import SERVING_TAG, ModelReference, load_model, read_tag
from pipeline.samplers.model import ModelSpec
from pipeline.samplers.plan import SamplingConfig
from pipeline.serving.api import (
    PARAM_OF_ENGINE,
    ServingConfig,
    error_body,
    image_requests,
    parse_request,
)
from pipeline.serving.engine import (
    EXACT_ROWS,
    Engine,
    EngineThread,
    ImageRequest,
    Mode,
    check_request,
)
from pipeline.serving.recipe import Recipe, encode, fingerprint
from tasks.cluster import worker_device

APPLICATION = "ddpm"
MAX_BODY_BYTES = 64 * 1024
ATTEMPTS = 3
"""Replicas that may die over an image before its request fails."""
IMAGES_IN_HAND_PER_REPLICA = 2 * EXACT_ROWS
"""Enough to fill the next network call; what is beyond them goes to whichever replica is free."""

http = FastAPI(title="ray-ddpm", docs_url=None, redoc_url=None)


@serve.deployment(max_ongoing_requests=IMAGES_IN_HAND_PER_REPLICA, health_check_period_s=5)
class Sampler:
    """A replica: the model, and an engine for each mode that was asked for."""

    def __init__(self, model: ModelReference) -> None:
        self.model = load_model(model.uri, model.tracking_uri)
        self.device = worker_device()
        self.replica = serve.get_replica_context().replica_id.unique_id
        self.engines: dict[Mode, EngineThread] = {}
        # warm: the first network call pays for torch's set-up
        warm_up = ImageRequest(
            0, 0, 0 if self.model.spec.num_classes else None, SamplingConfig(steps=1)
        )
        self._engine("exact").submit(warm_up).result()

    def _engine(self, mode: Mode) -> EngineThread:
        if mode not in self.engines:
            self.engines[mode] = EngineThread(Engine(self.model, mode, device=self.device))
        return self.engines[mode]

    async def draw(self, request: ImageRequest, mode: Mode) -> tuple[np.ndarray, str]:
        """The (H, W, C) uint8 pixels of one image, and the name of this replica."""
        pixels = await asyncio.wrap_future(self._engine(mode).submit(request))
        return pixels, self.replica

    async def describe(self) -> dict[str, Any]:
        """What the ingress needs to know of the model."""
        spec = self.model.spec.model_dump(mode="json")
        return {"spec": spec, "digest": self.model.digest, "device": self.device.type}

    def check_health(self) -> None:
        for mode, engine in self.engines.items():
            if not engine.is_alive:
                raise RuntimeError(f"the thread of the {mode} engine has ended")


# above the ingress: Ray Serve pickles its routes when the class is made


async def _read_json(request: Request) -> Any:
    body = b""
    async for chunk in request.stream():
        body += chunk
        if len(body) > MAX_BODY_BYTES:
            raise RequestError(f"the request body is larger than {MAX_BODY_BYTES} bytes", "body")
    try:
        return json.loads(body)
    except (ValueError, RecursionError) as error:
        raise RequestError("the request body is not JSON", "body") from error


def _too_many() -> JSONResponse:
    body = error_body("the service is full: try again shortly", "rate_limit_error")
    return JSONResponse(body, 429, headers={"Retry-After": "1"})


@serve.deployment(max_ongoing_requests=1024, ray_actor_options={"num_cpus": 0})
@serve.ingress(http)
class Ingress:
    """HTTP in, images out."""

    def __init__(
        self, sampler: Any, model: ModelReference, called: str, config: ServingConfig
    ) -> None:
        self.sampler = sampler
        self.name = str(model)
        self.names = {self.name, model.name, called}
        self.config = config
        self.spec: ModelSpec | None = None
        self.digest = self.device = ""
        self.num_running = 0

    async def _describe(self) -> ModelSpec:
        if self.spec is None:
            await self._ask_a_replica()
        assert self.spec is not None
        return self.spec

    async def _ask_a_replica(self) -> None:
        facts = await self.sampler.describe.remote()
        self.digest, self.device = facts["digest"], facts["device"]
        self.spec = ModelSpec.model_validate(facts["spec"])

    async def _draw(self, image: ImageRequest, mode: Mode) -> tuple[np.ndarray, str]:
        """One image, from another replica if one dies over it: the pixels are the same."""
        for attempt in range(ATTEMPTS):
            try:
                drawn: tuple[np.ndarray, str] = await self.sampler.draw.remote(image, mode)
                return drawn
            except RayActorError:
                if attempt == ATTEMPTS - 1:
                    raise
        raise AssertionError

    @http.post("/v1/images/generations")
    async def generate(self, request: Request) -> JSONResponse:
        if self.num_running >= self.config.max_queued_requests:
            return _too_many()
        self.num_running += 1
        try:
            return await self._generate(await _read_json(request))
        except RequestError as error:
            param = PARAM_OF_ENGINE.get(error.param or "", error.param)
            status = 404 if param == "model" else 400 if param == "body" else 422
            body = error_body(error.message, "invalid_request_error", param)
            return JSONResponse(body, status)
        except BackPressureError:
            return _too_many()
        except (DeploymentUnavailableError, RayActorError):
            return JSONResponse(error_body("no replica of the model is up", "server_error"), 503)
        except Exception:
            logging.getLogger("ray.serve").exception("a request failed")
            message = "the service failed to draw the images; its log says why"
            return JSONResponse(error_body(message, "server_error"), 500)
        finally:
            self.num_running -= 1

    async def _generate(self, body: Any) -> JSONResponse:
        spec = await self._describe()
        request = parse_request(body, spec, self.names, self.config.max_images)
        seed = secrets.randbits(63) if request.seed is None else request.seed
        mode = request.mode or self.config.mode
        images = image_requests(request, spec, seed)
        check_request(spec, images[0])
        drawn = await asyncio.gather(*(self._draw(image, mode) for image in images))
        data = []
        for image, (pixels, replica) in zip(images, drawn, strict=True):
            recipe = Recipe(
                model=self.name,
                model_digest=self.digest,
                seed=seed,
                index=image.index,
                label=image.label,
                sampling=image.sampling,
                mode=mode,
                made_with=fingerprint(self.device),
            )
            data.append(
                {
                    "b64_json": base64.b64encode(encode(pixels, recipe)).decode(),
                    "seed": seed,
                    "index": image.index,
                    "recipe": recipe.model_dump(mode="json"),
                    "replica": replica,
                }
            )
        size = f"{spec.image_size}x{spec.image_size}"
        reply = {
            "created": int(time.time()),
            "model": self.name,
            "output_format": "png",
            "size": size,
        }
        return JSONResponse({**reply, "data": data})

    @http.get("/v1/models")
    async def models(self) -> dict[str, Any]:
        spec = await self._describe()
        entry = {
            "id": self.name,
            "object": "model",
            "owned_by": "ray-ddpm",
            "digest": self.digest,
            "image_size": spec.image_size,
            "channels": spec.channels,
            "class_names": spec.class_names,
            "timesteps": spec.diffusion.timesteps,
        }
        return {"object": "list", "data": [entry]}

    @http.get("/healthz")
    async def healthz(self) -> dict[str, str]:
        return {"status": "alive"}

    @http.get("/readyz")
    async def readyz(self) -> JSONResponse:
        try:
            await asyncio.wait_for(self._ask_a_replica(), timeout=5)
        except (TimeoutError, DeploymentUnavailableError, RayActorError):
            return JSONResponse(error_body("the model is not loaded yet", "server_error"), 503)
        return JSONResponse({"status": "ready", "model": self.name})


def serving_config(model: ModelReference) -> ServingConfig:
    """How the config that made a version says to serve it."""
    tag = read_tag(model, SERVING_TAG)
    return ServingConfig.model_validate_json(tag) if tag else ServingConfig()


def application(model: ModelReference, called: str, config: ServingConfig) -> serve.Application:
    """The application: an ingress over `config.replicas` samplers.

    Args:
        called: how the user named the model; a request may name it so too.
    """
    options = {"num_cpus": config.cpus_per_replica, "num_gpus": config.gpus_per_replica}
    # the decorators make deployments of the classes, which mypy does not see
    deployment: Any = Sampler
    ingress: Any = Ingress
    sampler = deployment.options(num_replicas=config.replicas, ray_actor_options=options)
    return ingress.bind(sampler.bind(model), model, called, config)


def start(model: ModelReference, called: str, config: ServingConfig, host: str, port: int) -> None:
    """Deploy on the connected Ray and return when the model is loaded and answers."""
    serve.start(http_options=HTTPOptions(host=host, port=port))
    serve.run(application(model, called, config), name=APPLICATION, route_prefix="/")


def wait_until_interrupted() -> None:
    """Serve until Ctrl-C, then let the running requests end."""
    with contextlib.suppress(KeyboardInterrupt):
        while True:
            time.sleep(1)
    serve.delete(APPLICATION)
