"""A real Ray Serve application over HTTP: the contract, the fan-out, promise P3 across replicas."""

import base64
import io
import json
import re
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipeline.serving import recipe
from tests.conftest import HANG, Workplace, ray_workers, wait_for
from tests.service import Service, assert_drawn_as_alone

REQUEST = {"seed": 11, "num_inference_steps": 4, "class_label": 3, "guidance_scale": 1.0}


def test_many_requests_at_once_do_not_change_each_others_images(service: Service) -> None:
    quiet = service.images(n=2, **REQUEST)
    others: list[Any] = []
    bodies = [
        {"n": 8, "seed": i, "num_inference_steps": 3 + i, "sampler": sampler}
        for i in range(4)
        for sampler in ("ddim", "heun")
    ]
    threads = [threading.Thread(target=lambda b=b: others.append(service.post(b))) for b in bodies]
    for thread in threads:
        thread.start()
    busy = service.images(n=2, **REQUEST)
    for thread in threads:
        thread.join()
    assert [status for status, _ in others] == [200] * 8
    assert [image["b64_json"] for image in busy] == [image["b64_json"] for image in quiet]


def test_a_seed_is_drawn_and_reported_when_none_is_given(service: Service) -> None:
    (first,), (second,) = (service.images(num_inference_steps=2) for _ in range(2))
    assert first["seed"] != second["seed"]
    (again,) = service.images(num_inference_steps=2, seed=first["seed"])
    assert again["b64_json"] == first["b64_json"]


def test_a_class_name_as_prompt_is_its_label(service: Service) -> None:
    (by_name,) = service.images(prompt="3", seed=1, num_inference_steps=2)
    (by_label,) = service.images(class_label=3, seed=1, num_inference_steps=2)
    assert by_name["b64_json"] == by_label["b64_json"]


def test_a_bad_request_is_422_with_the_parameter(service: Service) -> None:
    """Which requests are bad, and how it is said: tests/unit/test_requests.py."""
    status, reply = service.post({"n": 65})
    assert status == 422
    error = reply["error"]
    assert (error["type"], error["param"]) == ("invalid_request_error", "n")
    assert "must be from 1 to 64" in error["message"]


def test_another_model_is_404(service: Service) -> None:
    status, reply = service.post({"model": "faces@champion"})
    assert (status, reply["error"]["param"]) == (404, "model")


@pytest.mark.parametrize("raw", [b"", b"{", b"\xff\xfe", b"[" * 30_000, b"NaN,", b"x" * 70_000])
def test_a_body_that_is_not_json_is_400(service: Service, raw: bytes) -> None:
    status, reply = service.post(None, raw)
    assert status == 400
    assert re.search("not JSON in UTF-8|larger than", reply["error"]["message"])


def test_nan_in_a_body_is_refused(service: Service) -> None:
    status, reply = service.post(None, b'{"guidance_scale": NaN}')
    assert (status, reply["error"]["param"]) == (422, "guidance_scale")


def test_the_service_says_what_it_serves_and_that_it_is_ready(service: Service) -> None:
    assert service.get("/healthz") == {"status": "alive"}
    assert service.get("/readyz") == {"status": "ready", "model": "digits@1"}
    (model,) = service.get("/v1/models")["data"]
    assert (model["id"], model["image_size"], len(model["class_names"])) == ("digits@1", 8, 10)


def test_fast_mode_agrees_with_exact_to_a_grey_level(service: Service) -> None:
    replies = [service.images(n=6, **REQUEST, mode=mode) for mode in ("exact", "fast")]
    assert [{image["recipe"]["mode"] for image in reply} for reply in replies] == [
        {"exact"},
        {"fast"},
    ]
    exact, fast = (
        np.stack([recipe.decode(base64.b64decode(i["b64_json"]), "")[0] for i in reply])
        for reply in replies
    )
    assert np.abs(exact.astype(int) - fast).max() <= 1


def test_the_model_may_be_named_as_it_was_for_the_command(service: Service) -> None:
    for name in ("digits", "digits@1", "digits@champion"):
        assert len(service.images(model=name, num_inference_steps=1)) == 1


def test_a_replica_that_dies_over_a_request_costs_no_image(service: Service) -> None:
    request = {**REQUEST, "num_inference_steps": 300, "sampler": "ancestral"}
    quiet = service.images(n=24, **request)
    replies: list[Any] = []
    thread = threading.Thread(target=lambda: replies.append(service.post({"n": 24, **request})))
    thread.start()
    wait_for(lambda: service.get("/v1/engine")["requests"], "the request to be taken")
    ray_workers(service.pid, "ServeReplica:ddpm:Replica")[0].kill()
    thread.join()
    ((status, reply),) = replies
    assert status == 200, reply
    assert [i["b64_json"] for i in reply["data"]] == [i["b64_json"] for i in quiet]


def test_a_replica_whose_network_fails_costs_no_image_and_is_replaced(
    service: Service, failing: Path
) -> None:
    wait_for(lambda: len(service.get("/v1/engine")["replicas"]) == 2, "both replicas")
    quiet = [image["b64_json"] for image in service.images(n=8, **REQUEST)]
    broken, *_ = ray_workers(service.pid, "ServeReplica:ddpm:Replica")
    failing.write_text(str(broken.pid))

    def replaced() -> bool:
        images = service.images(n=8, **REQUEST)
        assert [image["b64_json"] for image in images] == quiet
        return not broken.is_running()

    wait_for(replaced, "the replica to be ended")


def test_two_replicas_draw_what_the_model_draws_alone(
    tiny: Workplace, service: Service, tmp_path: Path
) -> None:
    def both() -> list[dict[str, Any]]:
        # Ray Serve's router leaves out a replica that does not tell its queue within 0.1 s, which
        # on busy cores a fresh one may not: both take part soon, not always at once
        images = service.images(n=64, **REQUEST)
        return images if len({image["replica"] for image in images}) == 2 else []

    images = wait_for(both, "images that are dealt to both replicas")
    assert_drawn_as_alone(images, tiny, REQUEST)
    (webp,) = service.images(**REQUEST, output_format="webp")
    for name, image in (("63.png", images[63]), ("0.webp", webp)):
        (tmp_path / name).write_bytes(base64.b64decode(image["b64_json"]))
        again = tmp_path / f"again {name}.png"
        assert "bit for bit" in tiny.quick("reproduce", str(tmp_path / name), "--out", str(again))
    assert (tmp_path / "again 63.png.png").read_bytes() == (tmp_path / "63.png").read_bytes()


# --- streams, and requests in hand ---------------------------------------------------------------


def events_of(text: str) -> list[tuple[int, str, dict[str, Any]]]:
    """(id, event, data) of server-sent events."""
    found = []
    for block in text.strip().split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.split("\n"))
        found.append((int(fields.get("id", 0)), fields["event"], json.loads(fields["data"])))
    return found


def test_a_stream_shows_each_image_on_its_way_and_then_the_image(service: Service) -> None:
    request = {**REQUEST, "n": 3, "num_inference_steps": 8}
    plain = service.images(**request)
    with service.stream({**request, "stream": True, "partial_images": 3}) as reply:
        assert reply.status == 200
        assert reply.getheader("content-type", "").startswith("text/event-stream")
        events = events_of(reply.read().decode())
    assert [number for number, _, _ in events] == list(range(1, 13))
    for image in range(3):
        own = [(name, data) for _, name, data in events if data["image_index"] == image]
        partial, ((name, completed),) = own[:-1], own[-1:]
        assert [data["partial_image_index"] for _, data in partial] == [0, 1, 2]
        assert [data["evaluation"] for _, data in partial] == [2, 4, 6]
        assert {name for name, _ in partial} == {"image_generation.partial_image"}
        assert name == completed["type"] == "image_generation.completed"
        assert completed["b64_json"] == plain[image]["b64_json"]
        for key in ("b64_json", "x_t"):
            with Image.open(io.BytesIO(base64.b64decode(partial[0][1][key]))) as picture:
                assert picture.size == (8, 8)


LONG = {"n": 8, "seed": 1, "num_inference_steps": 1000, "sampler": "ancestral"}


def test_a_request_can_be_listened_to_again_by_its_id(service: Service) -> None:
    request = {**LONG, "n": 2, "num_inference_steps": 200}
    with service.stream({**request, "stream": True, "partial_images": 10}) as reply:
        id = reply.getheader("x-generation-id")
        first = reply.readline(), reply.readline()  # then the connection is lost
    assert first[0] == b"id: 1\n"
    path = f"/v1/images/generations/{id}"
    status, text = service.ask("GET", path, **{"Accept": "text/event-stream", "Last-Event-ID": "1"})
    events = events_of(text.decode())
    assert status == 200
    assert [number for number, _, _ in events] == list(range(2, 23))
    status, body = service.ask("GET", path)
    assert status == 200
    assert [image["b64_json"] for image in json.loads(body)["data"]] == [
        image["b64_json"] for image in service.images(**request)
    ]
    assert service.ask("GET", "/v1/images/generations/gen_0")[0] == 404


def test_a_request_goes_on_without_its_connection(service: Service) -> None:
    with service.stream({**LONG, "stream": True}) as reply:
        id = reply.getheader("x-generation-id")
    time.sleep(1)  # Ray Serve hears of it and ends what it was asked for by that connection
    status, text = service.ask("GET", f"/v1/images/generations/{id}")
    assert status == 200, text
    assert len(json.loads(text)["data"]) == LONG["n"]


def test_a_request_that_is_given_up_makes_room_for_others(service: Service) -> None:
    everything = {**LONG, "n": 64, "class_label": 1, "guidance_scale": 1, "sampler": "heun"}
    with service.stream({**everything, "stream": True}) as reply:
        id = reply.getheader("x-generation-id")
        (running,) = service.get("/v1/engine")["requests"]
        assert running["id"] == id
        assert (running["n"], running["done"]) == (64, 0)
        assert running["rows"] == 64 * 1000 * 2 * 2
        status, body = service.post(LONG)
        assert (status, body["error"]["type"]) == (429, "rate_limit_error")
        status, text = service.ask("DELETE", f"/v1/images/generations/{id}")
        assert (status, json.loads(text)["state"]) == (200, "cancelled")
        assert reply.read() == b""
    assert service.get("/v1/engine")["rows"] == 0

    def idle() -> bool:
        replicas = service.get("/v1/engine")["replicas"]
        return not any(engine["num_images"] for of in replicas for engine in of["engines"])

    wait_for(idle, "no replica to draw what nobody wants")
    service.images(num_inference_steps=2)


def test_a_key_makes_a_request_once(service: Service) -> None:
    def post(body: object) -> tuple[int, Any]:
        headers = {"Idempotency-Key": "k"}
        url = f"{service.url}/v1/images/generations"
        request = urllib.request.Request(url, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=HANG) as reply:
                return reply.status, json.load(reply)
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.load(error)

    once, again = (post({"n": 2, "num_inference_steps": 3}) for _ in range(2))
    assert once[0] == 200
    assert again == once, "the seed was not given, and is the same"
    status, reply = post({"n": 3})
    assert status == 400
    assert "'k' came with another request before" in reply["error"]["message"]


def test_a_port_in_use_is_a_sentence(tiny: Workplace, service: Service) -> None:
    output = tiny.quick("serve", "digits@champion", "--port", str(service.port), code=2)
    assert f"cannot listen on 127.0.0.1:{service.port}" in output
    assert "choose another port with --port" in output
