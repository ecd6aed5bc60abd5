"""An S3 server on this machine (moto's, over real HTTP), and a proxy that makes it unreliable."""

import http.client
import logging
import re
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from moto.server import ThreadedMotoServer

Fault = Callable[[int, str, str], str]
"""(number of the request from 0, method, path) -> "", a key of REFUSALS, "slow", "cut" or "lost".

A lost answer is a 500 to a request that was done.
"""

REFUSALS = {
    "500": (500, "InternalError"),
    "503": (503, "SlowDown"),
    "403": (403, "AccessDenied"),
    "expired": (400, "ExpiredToken"),
    "skewed": (403, "RequestTimeTooSkewed"),
    "unknown key": (403, "InvalidAccessKeyId"),
    "wrong key": (403, "SignatureDoesNotMatch"),
}
"""Status and code."""


class S3:
    """A server with one bucket, `s3://bucket`; those of a process have it in common."""

    def __init__(self) -> None:
        logging.getLogger("werkzeug").setLevel(logging.WARNING)  # else a line for each request
        self._server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
        self._server.start()
        host, port = self._server.get_host_and_port()
        self.port = port
        self.endpoint = f"http://{host}:{port}"
        self._request("PUT", "/bucket")

    def put(self, key: str, data: bytes) -> None:
        self._request("PUT", f"/bucket/{key}", data)

    def environment(self, endpoint: str | None = None, key: str = "test") -> dict[str, str]:
        """What a process needs to find it, with an access key of its own."""
        return {
            "AWS_ENDPOINT_URL": endpoint or self.endpoint,
            "AWS_ACCESS_KEY_ID": key,
            "AWS_SECRET_ACCESS_KEY": "test",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_CONFIG_FILE": "/dev/null",
            "AWS_EC2_METADATA_DISABLED": "true",
        }

    def close(self) -> None:
        self._server.stop()

    def _request(self, method: str, path: str, data: bytes = b"") -> None:
        connection = http.client.HTTPConnection("127.0.0.1", self.port)
        # moto reads the service from the credential's scope
        scope = "AWS4-HMAC-SHA256 Credential=test/20260101/us-east-1/s3/aws4_request"
        connection.request(method, path, data, {"Authorization": scope})
        reply = connection.getresponse()
        reply.read()
        assert reply.status == 200, (method, path, reply.status)
        connection.close()


STUMBLES = ("500", "503", "slow", "cut", "lost")


def stumble(number: int, *_: str) -> str:
    """A fault that lets every 61st request fail, each time in another way."""
    return STUMBLES[number // 61 % len(STUMBLES)] if number % 61 == 60 else ""


class Unreliable:
    """A proxy before an S3 server; `fault` says what goes wrong with each request."""

    def __init__(self, server: S3, fault: Fault, address: str = "127.0.0.1") -> None:
        self.requests: list[tuple[str, str, str]] = []
        """(method, path, what went wrong) of each, in order."""
        self.keys: list[str] = []
        """The access key of each request: whose it is."""
        lock = threading.Lock()
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_one_request(self) -> None:
                try:
                    super().handle_one_request()
                except (ConnectionError, TimeoutError):  # the client went away, as it may
                    self.close_connection = True

            def _forward(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                with lock:
                    signed = re.search("Credential=([^/]+)/", self.headers["Authorization"] or "")
                    proxy.keys.append(signed[1] if signed else "")
                    wrong = fault(len(proxy.requests), self.command, self.path)
                    proxy.requests.append((self.command, self.path, wrong))
                if wrong in REFUSALS:
                    status, code = REFUSALS[wrong]
                    text = f"<Error><Code>{code}</Code><Message>so it is</Message></Error>"
                    return self._answer(status, {}, text.encode())
                if wrong == "slow":
                    time.sleep(0.5)
                connection = http.client.HTTPConnection("127.0.0.1", server.port)
                connection.request(self.command, self.path, body, dict(self.headers))
                reply = connection.getresponse()
                data = reply.read()
                connection.close()
                if wrong == "lost":
                    return self._answer(500, {}, b"")
                self._answer(reply.status, dict(reply.getheaders()), data, cut=wrong == "cut")

            def _answer(
                self, status: int, headers: dict[str, str], data: bytes, cut: bool = False
            ) -> None:
                self.send_response_only(status)
                length = str(len(data))
                for name, value in headers.items():
                    if name.lower() == "content-length":
                        length = value if self.command == "HEAD" else length
                    elif name.lower() not in ("transfer-encoding", "connection"):
                        self.send_header(name, value)
                self.send_header("Content-Length", length)
                self.end_headers()
                if cut:
                    self.wfile.write(data[: len(data) // 2])
                    self.close_connection = True
                elif self.command != "HEAD":
                    self.wfile.write(data)

            do_GET = do_PUT = do_HEAD = do_POST = do_DELETE = _forward

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer((address, 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://{address}:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
