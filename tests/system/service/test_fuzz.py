"""The service under attack: requests drawn from its own OpenAPI, bodies and headers that are none,
clients that stop. Each has a 4xx or a bounded cost, and nothing stays in hand.
"""

import contextlib
import gzip
import http.client
import itertools
import json
import socket
import struct
import time
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import Case, GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.schemas import BaseSchema
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tasks.service.generations import NOBODY_LISTENS
from tasks.service.request_body import BODY_SECONDS
from tests.conftest import HANG, wait_for
from tests.service import Service
from tests.unit.test_requests import SAME

PATH = "/v1/images/generations"
ONE = b'{"num_inference_steps": 1}'


def check_error(status: int, body: bytes, param: str | None = None) -> str:
    """The message of an error, which has OpenAI's form."""
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert 10 < len(error["message"]) < 500 and "\n" not in error["message"]
    message: str = error["message"]
    return message


@pytest.fixture(autouse=True)
def nothing_stays_in_hand(service: Service) -> Iterator[None]:
    """After every test here no request is running and the service is there for others."""
    wait_for(lambda: not in_hand(service), "what came before to be done")
    yield
    wait_for(lambda: service.get("/v1/engine")["rows"] == 0, "all rows to be free")
    assert service.get("/v1/engine")["requests"] == []
    assert len(service.images(num_inference_steps=1)) == 1


# --- what its own OpenAPI makes of it ------------------------------------------------------------


@pytest.fixture(scope="module")
def schema(service: Service) -> BaseSchema:
    return schemathesis.openapi.from_url(f"{service.url}/openapi.json")


def make_cheap(body: Any) -> None:
    """What is taken is drawn in full, so ask for less of it; what is refused stays as it is."""
    for name, most in (("num_inference_steps", 1000), ("n", 64), ("partial_images", 1000)):
        value = body.get(name) if isinstance(body, dict) else None
        if type(value) is int and 4 < value <= most:
            body[name] = value % 4 + 1


CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
POSITIVE, NEGATIVE = GenerationMode.POSITIVE, GenerationMode.NEGATIVE


@pytest.mark.parametrize(
    ("method", "path", "mode", "examples"),
    [
        ("POST", PATH, POSITIVE, 60),
        ("POST", PATH, NEGATIVE, 100),
        ("GET", PATH + "/{id}", POSITIVE, 20),
        ("GET", PATH + "/{id}", NEGATIVE, 20),
        ("DELETE", PATH + "/{id}", POSITIVE, 20),
        ("GET", "/v1/models/{id}", POSITIVE, 20),
        ("GET", "/v1/models", POSITIVE, 1),
        ("GET", "/v1/engine", POSITIVE, 1),
        ("GET", "/healthz", POSITIVE, 1),
        ("GET", "/readyz", POSITIVE, 1),
    ],
)
def test_what_the_openapi_draws_gets_what_it_says(
    service: Service,
    schema: BaseSchema,
    method: str,
    path: str,
    mode: GenerationMode,
    examples: int,
) -> None:
    statuses = Counter[int]()
    turn = itertools.count()
    known = service.post({"num_inference_steps": 2, "n": 3})[1]["id"]
    there = {PATH + "/{id}": known, "/v1/models/{id}": "digits@1"}.get(path)
    checks = [*CHECKS, negative_data_rejection] if mode is NEGATIVE else CHECKS

    @settings(SAME, max_examples=examples, suppress_health_check=list(HealthCheck))
    @given(case=schema[path][method].as_strategy(generation_mode=mode))
    def attack(case: Case) -> None:
        make_cheap(case.body)
        number = next(turn)
        if there and number % 2:
            case.path_parameters["id"] = there
        accept = {"Accept": "text/event-stream"} if number % 4 == 1 else {}
        reply = case.call_and_validate(checks=checks, headers=accept, timeout=HANG)
        statuses[reply.status_code] += 1

    attack()
    assert (200 in statuses) == (mode is POSITIVE), "what is as it should be is answered"
    assert there is None or 404 in statuses


def test_the_fuzzed_paths_are_all_there_are(schema: BaseSchema) -> None:
    (marks,) = (m for m in test_what_the_openapi_draws_gets_what_it_says.pytestmark)
    fuzzed = {(method, path) for method, path, *_ in marks.args[1]}
    there = {
        (method.upper(), path)
        for path, operations in schema.raw_schema["paths"].items()
        for method in operations
    }
    assert fuzzed == there


# --- bodies --------------------------------------------------------------------------------------


def ask(service: Service, data: bytes, stop: bool = False) -> tuple[int, dict[str, str], bytes]:
    """The reply to raw bytes: (status, headers, body); status 0 if the connection was closed.

    Args:
        stop: say that nothing more comes.
    """
    method = data.split(b" ", 1)[0].decode()
    with socket.create_connection(("127.0.0.1", service.port), timeout=HANG) as connection:
        connection.sendall(data)
        if stop:
            connection.shutdown(socket.SHUT_WR)
        reply = http.client.HTTPResponse(connection, method=method)
        with contextlib.closing(reply):
            try:
                reply.begin()
            except http.client.RemoteDisconnected:
                return 0, {}, b""
            return reply.status, dict(reply.getheaders()), reply.read()


def post(body: bytes, *headers: bytes) -> bytes:
    lines = [b"POST %s HTTP/1.1" % PATH.encode(), b"Host: x", *headers]
    return b"\r\n".join([*lines, b"Content-Length: %d" % len(body), b"", body])


def get(path: str, *headers: bytes, method: str = "GET") -> bytes:
    return b"\r\n".join([f"{method} {path} HTTP/1.1".encode(), b"Host: x", *headers, b"", b""])


UNREADABLE = {
    "UTF-16": ONE.decode().encode("utf-16"),
    "a byte-order mark": b"\xef\xbb\xbf" + ONE,
    "Latin-1": '{"prompt": "é"}'.encode("latin-1"),
    "half a surrogate pair in UTF-8": b'{"user": "\xed\xa0\x80"}',
    "bytes": bytes(range(256)),
    "gzip": gzip.compress(ONE),
    "deep objects": b'{"a":' * 5000 + b"1" + b"}" * 5000,
    "deep lists": b'{"n":' + b"[" * 30_000 + b"]" * 30_000 + b"}",
    "5,000 digits": b'{"seed": %s}' % (b"1" * 5000),
    "a line break in a string": b'{"prompt": "a\nb"}',
    "a form": b"n=1&prompt=3",
}


@pytest.mark.parametrize("what", UNREADABLE)
def test_a_body_that_cannot_be_read_is_400(service: Service, what: str) -> None:
    headers = [b"Content-Encoding: gzip"] if what == "gzip" else []
    status, _, body = ask(service, post(UNREADABLE[what], *headers))
    assert status == 400
    assert check_error(status, body, "body") == "the request body is not JSON in UTF-8"


def test_a_body_of_megabytes_is_400_before_it_has_come(service: Service) -> None:
    head = post(b"").replace(b"Content-Length: 0", b"Content-Length: 1000000000")
    status, _, body = ask(service, head + b" " * 5_000_000)
    assert (status, "larger than 65536 bytes" in check_error(status, body, "body")) == (400, True)


def test_what_is_said_twice_is_400(service: Service) -> None:
    status, _, body = ask(service, post(b'{"n": 64, "seed": 1, "n": 1}'))
    assert status == 400
    assert check_error(status, body, "body") == "the request body says 'n' more than once"


HUGE = "1" + "0" * 400


@pytest.mark.parametrize(
    ("body", "param"),
    [
        *((f'{{"{name}": {HUGE}}}', name) for name in ("n", "seed", "class_label", "order")),
        *((f'{{"{name}": {HUGE}}}', name) for name in ("num_inference_steps", "guidance_scale")),
        (f'{{"stream": true, "partial_images": {HUGE}}}', "partial_images"),
        *((f'{{"guidance_scale": {x}}}', "guidance_scale") for x in ("NaN", "-Infinity", "1e999")),
        *((f'{{"eta": {x}}}', "eta") for x in ("NaN", "Infinity", "-1e999")),
        ('{"class_label": 1, "guidance_scale": 1, "guidance_interval": [0, 1e999]}', "guidance_in"),
        ('{"sampler": "euler", "churn": 80, "churn_noise": 1e300}', "churn_noise"),
        *((f'{{"seed": {x}}}', "seed") for x in ("-1", "1.0", "true", '"1"', "[1]", "1e3")),
        ('{"order": true, "sampler": "unipc"}', "order"),
        *((f'{{"prompt": "{x}"}}', "prompt") for x in (r"\ud800", r"\u0000", r"3\n", "x" * 40_000)),
        (r'{"user": "\ud800"}', "user"),
        (r'{"\ud800": 1}', None),
        (r'{"a\nb": 1}', None),
        (f'{{"{"a" * 60_000}": 1}}', None),
        ('{"": 1}', None),
        ('{"steps": 3}', "steps"),
        ("NaN", None),
        ("null", None),
    ],
)
def test_a_value_that_cannot_be_is_422(service: Service, body: str, param: str | None) -> None:
    status, _, reply = ask(service, post(body.encode()))
    assert status == 422, reply
    check_error(status, reply, "guidance_interval" if param == "guidance_in" else param)


@pytest.mark.parametrize("scale", ["-0.0", "0", "5e-324"])
def test_numbers_that_are_just_within_are_drawn(service: Service, scale: str) -> None:
    body = f'{{"num_inference_steps": 1, "class_label": 1, "guidance_scale": {scale}}}'
    status, _, reply = ask(service, post(body.encode()))
    assert status == 200
    assert json.loads(reply)["data"][0]["recipe"]["sampling"]["guidance"] == float(scale)


@pytest.mark.parametrize("kind", [b"text/plain", b"multipart/form-data", b"\xff", b""])
def test_a_body_is_json_whatever_it_is_called(service: Service, kind: bytes) -> None:
    status, _, _ = ask(service, post(ONE, b"Content-Type: " + kind))
    assert status == 200


ODD_NAMES = [
    *("..@1", "../../../etc/passwd@1", "file:///etc/passwd", "s3://bucket/model@1", "/@/"),
    *("http://127.0.0.1:1/@1", "models:/../x/1", "a\nb@1", "a\0b@1", "\ud800@1", "' or 1=1 --@1"),
    *("x" * 60_000, "x" * 60_000 + "@1", "digits@" + "9" * 5000, "digits@١", "", " @1", "%s@1"),
]


@pytest.mark.parametrize("name", ODD_NAMES, ids=range(len(ODD_NAMES)))
def test_a_model_of_an_odd_name_is_404_and_says_nothing_of_here(
    service: Service, name: str
) -> None:
    status, _, body = ask(service, post(json.dumps({"model": name}).encode()))
    assert status == 404
    message = check_error(status, body, "model")
    assert "sqlite" not in message and "/tmp" not in message


# --- headers, methods, paths ---------------------------------------------------------------------


@pytest.mark.parametrize("key", [b"", b"k" * 256, b"k" * 5_000_000])
def test_a_key_that_is_no_key_is_422(service: Service, key: bytes) -> None:
    status, _, body = ask(service, post(ONE, b"Idempotency-Key: " + key))
    assert status == 422
    assert "must have 1 to 255" in check_error(status, body, "Idempotency-Key")


LONG = {"n": 8, "seed": 1, "num_inference_steps": 1000, "sampler": "ancestral", "stream": True}


@contextlib.contextmanager
def running(service: Service) -> Iterator[str]:
    """The id of a long request."""
    connection = http.client.HTTPConnection("127.0.0.1", service.port, timeout=HANG)
    with contextlib.closing(connection):
        connection.request("POST", PATH, json.dumps(LONG))
        with connection.getresponse() as reply:
            id = reply.headers["x-generation-id"]
            yield id
            service.ask("DELETE", f"{PATH}/{id}")


def test_an_event_that_never_was_cannot_be_the_last_one_heard(service: Service) -> None:
    listen = b"Accept: text/event-stream"
    with running(service) as id:
        for last in (b"999", b"-1", b"1e9", b"x", b"\xb2", b"1" * 5000, b"0x1", b"+0"):
            request = get(f"{PATH}/{id}", listen, b"Last-Event-ID: " + last)
            status, _, body = ask(service, request)
            assert status == 422, last
            assert "is no event" in check_error(status, body, "Last-Event-ID")
        assert service.get("/healthz") == {"status": "alive"}


PATHS = [PATH, f"{PATH}/gen_0", "/v1/models", "/v1/models/x", "/v1/engine", "/healthz", "/readyz"]


@pytest.mark.parametrize("path", PATHS)
def test_a_method_that_a_path_does_not_have_is_405(service: Service, path: str) -> None:
    for method in ("HEAD", "OPTIONS", "PUT", "PATCH", "TRACE", "DELETE", "POST", "GET"):
        status, headers, body = ask(service, get(path, method=method))
        if status == 405:
            assert method not in headers["allow"]
            assert method == "HEAD" or check_error(status, body) == (
                f"{method} {path}: Method Not Allowed"
            )
        else:
            assert method in ("DELETE", "POST", "GET")
            assert status in (200, 400, 404)


IDS = [
    "%00",
    "..%2f..%2fetc",
    "%ff%fe",
    "a" * 5000,
    "gen_%0d%0aX",
    "%ed%a0%80",
    "'%20or%201",
    "%d9%a3",
]


@pytest.mark.parametrize("id", IDS, ids=range(len(IDS)))
def test_an_id_that_cannot_be_is_404(service: Service, id: str) -> None:
    for method, path in (("GET", PATH), ("DELETE", PATH), ("GET", "/v1/models")):
        status, _, body = ask(service, get(f"{path}/{id}", method=method))
        assert status == 404
        error = json.loads(body)["error"]
        assert len(error["message"]) < 500 and "\n" not in error["message"]


@pytest.mark.parametrize("path", ["/nothing", "//v1/models", "/v1/models/", f"{PATH}/", "/docs"])
def test_a_path_that_is_none_is_404(service: Service, path: str) -> None:
    status, _, body = ask(service, get(path))
    assert (status, check_error(status, body)) == (404, f"GET {path}: Not Found")


@pytest.mark.parametrize(
    "framing",
    [
        [b"Content-Length: -5", b"", ONE],
        [b"Content-Length: 5", b"Transfer-Encoding: chunked", b"", b"0\r\n\r\n"],
        [b"Transfer-Encoding: chunked", b"", b"zz\r\n"],
        [b"Transfer-Encoding: chunked", b"", b"ffffffffffffffffff\r\n{"],
    ],
)
def test_a_body_of_no_length_is_400(service: Service, framing: list[bytes]) -> None:
    head = post(b"").split(b"Content-Length")[0].rstrip()
    assert ask(service, b"\r\n".join([head, *framing]))[0] == 400


# --- clients that stop ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    "framing",
    [
        [b"Transfer-Encoding: chunked", b"", b'5\r\n{"n":\r\n'],
        [b"Transfer-Encoding: chunked", b"", b'5\r\n{"n'],
        [b"Content-Length: 50", b"", b'{"n":'],
    ],
)
def test_a_body_that_stops_draws_nothing(service: Service, framing: list[bytes]) -> None:
    head = post(b"").split(b"Content-Length")[0].rstrip()
    status, _, _ = ask(service, b"\r\n".join([head, *framing]), stop=True)
    assert status in (0, 400)


def test_a_body_that_trickles_is_408(service: Service) -> None:
    address = ("127.0.0.1", service.port)
    with socket.create_connection(address, timeout=HANG) as slow:
        begin = time.monotonic()
        slow.sendall(post(b"").replace(b"Content-Length: 0", b"Content-Length: 60000"))
        slow.setblocking(False)

        def reply_to_a_byte() -> bytes:
            time.sleep(0.05)
            slow.send(b" ")
            with contextlib.suppress(BlockingIOError):
                return slow.recv(65536)
            return b""

        reply = wait_for(reply_to_a_byte, "a reply")
    assert time.monotonic() - begin >= BODY_SECONDS
    assert reply.startswith(b"HTTP/1.1 408 ")
    assert b"did not come within 10 s" in reply


def in_hand(service: Service) -> set[str]:
    return {request["id"] for request in service.get("/v1/engine")["requests"]}


def reset(connection: socket.socket) -> None:
    """As of a client whose machine is gone: nothing is said, nothing more is taken."""
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()


def test_a_client_that_vanishes_can_come_back_and_if_it_does_not_leaves_no_row(
    service: Service,
) -> None:
    """One while it waits, one before it reads a stream."""
    body = {**LONG, "n": 8, "class_label": 1, "guidance_scale": 1, "sampler": "heun"}
    connections = []
    for stream in (False, True):
        connection = socket.create_connection(("127.0.0.1", service.port), timeout=HANG)
        connection.sendall(post(json.dumps({**body, "stream": stream}).encode()))
        connections.append(connection)
    ids = wait_for(lambda: len(found := in_hand(service)) == 2 and found, "both to be taken")
    vanished = time.monotonic()
    for connection in connections:
        reset(connection)
    wait_for(lambda: len(in_hand(service)) < 2, "one to be given up")
    assert time.monotonic() - vanished >= NOBODY_LISTENS, "it waits for its client for a while"
    wait_for(lambda: not in_hand(service), "the other to be given up")
    for id in ids:
        status, _, reply = ask(service, get(f"{PATH}/{id}"))
        assert (status, check_error(status, reply)) == (409, "the request was cancelled")


def test_a_client_that_never_reads_holds_up_nobody(service: Service) -> None:
    """Its images are drawn, and what it does not take is no more than they are."""
    body = {**LONG, "n": 8, "num_inference_steps": 100, "partial_images": 90}
    with socket.socket() as deaf:
        deaf.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        deaf.connect(("127.0.0.1", service.port))
        deaf.sendall(post(json.dumps(body).encode()))
        (id,) = wait_for(lambda: in_hand(service), "the request to be taken")
        wait_for(lambda: not in_hand(service), "its images to be drawn")
        assert len(service.images(num_inference_steps=1)) == 1
        status, _, reply = ask(service, get(f"{PATH}/{id}"))
        assert (status, len(json.loads(reply)["data"])) == (200, 8)
