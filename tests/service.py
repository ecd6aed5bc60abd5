"""A real service on a real Ray, as a test uses it over HTTP."""

import base64
import contextlib
import http.client
import json
import signal
import subprocess
import threading
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import psutil

from pipeline.loading import load_model
from pipeline.registry.versions import resolve
from pipeline.samplers.config import SamplingConfig
from pipeline.serving.engine import ImageRequest
from pipeline.serving.offline import draw
from pipeline.serving.recipe import decode
from tests.conftest import HANG, Workplace, end, free_port


@dataclass(frozen=True)
class Service:
    url: str
    port: int
    process: subprocess.Popen[str]
    metrics: str
    """Where its metrics are."""
    headers: dict[str, str] = field(default_factory=dict)
    """Of every request."""

    @property
    def pid(self) -> int:
        return self.process.pid

    def get(self, path: str) -> Any:
        request = urllib.request.Request(self.url + path, headers=self.headers)
        with urllib.request.urlopen(request, timeout=HANG) as reply:
            return json.load(reply)

    def post(self, body: object, raw: bytes | None = None) -> tuple[int, Any]:
        data = json.dumps(body).encode() if raw is None else raw
        url = f"{self.url}/v1/images/generations"
        request = urllib.request.Request(url, data, self.headers)
        try:
            with urllib.request.urlopen(request, timeout=HANG) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    @contextlib.contextmanager
    def stream(self, body: object) -> Iterator[http.client.HTTPResponse]:
        """The events of a request, which is running now; then the connection is lost."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=HANG)
        with contextlib.closing(connection):
            connection.request(
                "POST", "/v1/images/generations", json.dumps(body), headers=self.headers
            )
            with connection.getresponse() as reply:
                yield reply

    def ask(self, method: str, path: str, **headers: str) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=HANG)
        with contextlib.closing(connection):
            connection.request(method, path, headers=self.headers | headers)
            reply = connection.getresponse()
            return reply.status, reply.read()

    def images(self, **body: object) -> list[dict[str, Any]]:
        status, reply = self.post(body)
        assert status == 200, reply
        data: list[dict[str, Any]] = reply["data"]
        return data


def assert_drawn_as_alone(
    images: list[dict[str, Any]], place: Workplace, request: dict[str, Any]
) -> None:
    """They are those that the champion of a workplace draws in this process, bit for bit."""
    uri = f"sqlite:///{place.folder}/mlflow.db"
    model = load_model(resolve("digits@champion", uri).uri, uri)
    steps, guidance = request["num_inference_steps"], request["guidance_scale"]
    sampling = SamplingConfig(steps=steps, guidance=guidance)
    requests = [
        ImageRequest(request["seed"], i, request["class_label"], sampling)
        for i in range(len(images))
    ]
    assert [(image["seed"], image["index"]) for image in images] == [
        (request.seed, request.index) for request in requests
    ]
    found = [decode(base64.b64decode(image["b64_json"]), "")[0] for image in images]
    assert np.array_equal(np.stack(found), draw(model, requests).pixels)
    assert len({pixels.tobytes() for pixels in found}) == len(images)


@contextlib.contextmanager
def served(place: Workplace, *options: str, **environment: str) -> Iterator[Service]:
    """`ddpm serve digits@champion` with these options; ended by Ctrl-C if it is still there."""
    port = free_port()
    process = place.start("serve", "digits@champion", "--port", str(port), *options, **environment)
    lines: list[str] = []
    ready = threading.Event()

    def read() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            lines.append(line)
            if line.startswith("log "):
                ready.set()
        ready.set()

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        assert ready.wait(HANG) and process.poll() is None, "".join(lines)
        (metrics,) = (line.split()[1] for line in lines if line.startswith("metrics "))
        yield Service(f"http://127.0.0.1:{port}", port, process, metrics)
        if process.poll() is None:
            children = psutil.Process(process.pid).children(recursive=True)
            process.send_signal(signal.SIGINT)
            assert process.wait(timeout=HANG) == 0, "".join(lines)
            assert psutil.wait_procs(children, timeout=HANG)[1] == []
        reader.join(timeout=HANG)
        assert "Traceback" not in "".join(lines)
    finally:
        end(process)
