"""The ingress of a service: requests in over HTTP, images out."""

import asyncio
import secrets
import time
from typing import Any, get_args

from fastapi import Request
from fastapi.responses import JSONResponse, Response, StreamingResponse
from ray import serve
from ray.exceptions import RayActorError
from ray.serve.exceptions import DeploymentUnavailableError

from pipeline.errors import PipelineError
from pipeline.registry.versions import ModelReference
from pipeline.samplers.config import OFFLINE, SamplerName
from pipeline.serving.api import error_body, image_requests, parse_request
from pipeline.serving.config import ServingConfig
from pipeline.serving.contract import (
    AliveReply,
    CancelReply,
    EngineReply,
    GenerationReply,
    ModelReply,
    ModelsReply,
    ReadyReply,
)
from pipeline.storage import sha256
from tasks.service.admission import check_room
from tasks.service.authentication import client_of
from tasks.service.dealer import Dealer, Job
from tasks.service.generations import Asked, Generation, Generations
from tasks.service.metrics import IngressMetrics
from tasks.service.openapi import GENERATION, LISTENING, Api, answers
from tasks.service.page.response import page
from tasks.service.refusals import cause, no_such, refusal
from tasks.service.replica_states import ReplicaStates
from tasks.service.request_body import parse_json, read_body
from tasks.service.served_models import Served, ServedModels
from tasks.service.server_sent_events import server_sent

http = Api(title="ray-ddpm")


@http.exception_handler(PipelineError)
async def refuse(request: Request, error: PipelineError) -> Response:
    return refusal(error)


@serve.deployment(max_ongoing_requests=10_000, ray_actor_options={"num_cpus": 0})
@serve.ingress(http)
class Ingress:
    """HTTP in, images out.

    Args:
        replicas: the handle of the deployment of replicas.
        called: how the user named the model; that name is followed to whatever it comes to mean.
        keys: the name of each client by the sha256 of its API key; none: everybody is served.
    """

    def __init__(
        self,
        replicas: Any,
        model: ModelReference,
        called: str,
        config: ServingConfig,
        keys: dict[str, str],
    ) -> None:
        self.replicas = replicas
        self.served = ServedModels(replicas, model, called)
        self.config = config
        self.keys = keys
        self.created = int(time.time())
        self.metrics = IngressMetrics()
        self.generations = Generations(self.metrics.note_rows)
        self.dealer = Dealer(replicas, config, self.metrics)
        self.states = ReplicaStates(replicas)

    # --- clients ----------------------------------------------------------------------------------

    def _client(self, request: Request) -> str:
        return client_of(request, self.keys)

    def _own(self, id: str, request: Request) -> Generation | None:
        """A request in hand; with API keys only its client's."""
        client, generation = self._client(request), self.generations.get(id)
        if generation is not None and self.keys and generation.asked.client != client:
            return None
        return generation

    # --- requests ---------------------------------------------------------------------------------

    async def _start(self, body: bytes, key: str | None, client: str) -> Generation:
        """The request of a body, in hand; the one that came with the same key, if there is one.

        Raises:
            RequestError, ModelNotFound, StorageError: it cannot be taken.
            TooMuch: not now.
        """
        values = parse_json(body)
        digest = sha256(body)
        if (same := self.generations.of_key(client, key, digest)) is not None:
            return same
        name = values.get("model") if isinstance(values, dict) else None
        served = await self.served.find(name if isinstance(name, str) else None)
        request = parse_request(values, served.spec, self.config)
        seed = secrets.randbits(63) if request.seed is None else request.seed
        images = image_requests(request, served.spec, seed)
        number = int(sha256(client.encode())[:15], 16)
        job = Job(request, served, images, request.mode or self.config.mode, number)
        # again: while the model was looked for it may have come twice
        if (same := self.generations.of_key(client, key, digest)) is not None:
            return same
        asked = Asked(digest, client, len(images), len(images) * job.rows_each, job.room)
        pace = served.rows_per_second[job.mode] * self.config.min_replicas
        check_room(asked, self.generations, self.config, pace)

        async def run(generation: Generation) -> None:
            await self.dealer.run(generation, job)

        return self.generations.start(asked, key, run)

    @http.post(
        "/v1/images/generations",
        openapi_extra=GENERATION,
        responses=answers(
            GenerationReply, 400, 401, 404, 408, 409, 422, 429, 503, 504, images=True
        ),
    )
    async def generate(self, request: Request) -> Response:
        try:
            client = self._client(request)
            body = await read_body(request)
            key = request.headers.get("idempotency-key")
            generation = await self._start(body, key, client)
        except Exception as error:
            reply = refusal(error)
            outcome = "rejected" if reply.status_code == 429 else "invalid"
            self.metrics.note_end(outcome if reply.status_code < 500 else "failed")
            return reply
        if parse_json(body).get("stream"):
            return self._stream(generation, 0)
        return await self._reply(generation)

    async def _reply(self, generation: Generation) -> Response:
        """All images of a request, when they are done."""
        await generation.done()
        if generation.state == "cancelled":
            return JSONResponse(error_body("the request was cancelled", "server_error"), 409)
        if generation.error is not None:
            return refusal(cause(generation.error))
        headers = {"X-Generation-Id": generation.id}
        return JSONResponse(generation.result, headers=headers)

    def _stream(self, generation: Generation, after: int) -> Response:
        headers = {"X-Generation-Id": generation.id, "Cache-Control": "no-store"}
        return StreamingResponse(
            server_sent(generation, after), media_type="text/event-stream", headers=headers
        )

    @http.get(
        "/v1/images/generations/{id}",
        openapi_extra=LISTENING,
        responses=answers(GenerationReply, 401, 404, 409, 422, 503, 504, images=True),
    )
    async def listen(self, id: str, request: Request) -> Response:
        """A request that is running or was done a short while ago: its events, or its images."""
        generation = self._own(id, request)
        if generation is None:
            return no_such(id)
        heard = generation.heard(request.headers.get("last-event-id"))
        if "text/event-stream" in request.headers.get("accept", ""):
            return self._stream(generation, heard)
        return await self._reply(generation)

    @http.delete("/v1/images/generations/{id}", responses=answers(CancelReply, 401, 404))
    async def cancel(self, id: str, request: Request) -> Response:
        generation = self._own(id, request)
        if generation is None:
            return no_such(id)
        await self.generations.cancel(generation)
        return JSONResponse({"id": id, "state": generation.state})

    # --- what there is ----------------------------------------------------------------------------

    @http.get("/v1/models", responses=answers(ModelsReply, 401, 503))
    async def models(self, request: Request) -> Response:
        self._client(request)
        try:
            entry = self._entry(await self.served.find())
        except Exception as error:
            return refusal(error)
        return JSONResponse({"object": "list", "data": [entry]})

    @http.get("/v1/models/{id}", responses=answers(ModelReply, 401, 404, 503))
    async def one_model(self, id: str, request: Request) -> Response:
        """The model that is served, or another that was asked for: looking loads none."""
        self._client(request)
        try:
            entry = self._entry(await self.served.find_loaded(id))
        except Exception as error:
            return refusal(error)
        return JSONResponse(entry)

    def _entry(self, served: Served) -> dict[str, Any]:
        spec = served.spec
        steps = spec.diffusion.timesteps
        return {
            "id": str(served.reference),
            "object": "model",
            "created": self.created,
            "owned_by": "ray-ddpm",
            "digest": served.digest,
            "image_size": spec.image_size,
            "channels": spec.channels,
            "class_names": spec.class_names,
            "timesteps": steps,
            "samplers": [name for name in get_args(SamplerName) if name not in OFFLINE],
            "default_steps": spec.default_steps,
            "guidance": spec.has_null_label,
            "needs_label": bool(spec.class_names) and not spec.has_null_label,
            "max_images": self.config.max_images,
            "max_steps": min(self.config.max_steps or steps, steps),
            "mode": self.config.mode,
        }

    @http.get("/v1/engine", responses=answers(EngineReply, 401))
    async def engine(self, request: Request) -> Response:
        """What is in hand."""
        self._client(request)
        running = self.generations.running
        state = {
            "requests": [
                {
                    "id": of.id,
                    "n": of.asked.n,
                    "done": of.done_images,
                    "rows": of.rows,
                    "created": of.created,
                }
                for of in running
            ],
            "rows": self.generations.rows,
            "max_rows": self.config.max_rows,
            "replicas": await self.states.all(),
        }
        return JSONResponse(state)

    @http.get("/", include_in_schema=False)
    async def index(self) -> Response:
        return page()

    @http.get("/healthz", responses=answers(AliveReply))
    async def healthz(self) -> Response:
        return JSONResponse({"status": "alive"})

    @http.get("/readyz", responses=answers(ReadyReply, 503))
    async def readyz(self) -> Response:
        try:
            facts = self.replicas.describe.remote(self.served.current)
            await asyncio.wait_for(facts, timeout=5)
        except (TimeoutError, DeploymentUnavailableError, RayActorError):
            return JSONResponse(error_body("the model is not loaded yet", "server_error"), 503)
        return JSONResponse({"status": "ready", "model": str(self.served.current)})
