"""`ddpm serve` on a cluster that was there before and stays."""

import signal
import subprocess
import sys
import threading
from typing import Any

from tests.conftest import ENVIRONMENT, HANG, Workplace, listens, ray_workers, wait_for
from tests.head import Head
from tests.service import Service, served

CONTROLLER = "ray::ServeController"
"""In the titles of Ray's processes."""
OTHER = """
import sys
import ray
from ray import serve

@serve.deployment
class Other:
    pass

ray.init()
if sys.argv[1] == "serve":
    serve.run(Other.bind(), name="other", route_prefix="/other")
else:
    serve.shutdown()
"""


def test_a_service_is_its_command_s_and_what_was_killed_is_cleared_away(
    tiny: Workplace, head: Head
) -> None:
    with served(tiny, "--replicas", "1", **head.joined) as first:
        output = tiny.ddpm("serve", "digits@champion", code=2, **head.joined)
        assert "this Ray cluster serves already, by another `ddpm serve`: end that" in output
        first.process.kill()
        first.process.wait()
    assert ray_workers(head.pid, CONTROLLER) and listens(first.port), "it outlives its command"
    with served(tiny, "--replicas", "1", **head.joined) as second:
        assert len(second.images(num_inference_steps=2)) == 1
        assert not listens(first.port)
        assert_it_ends_a_request_before_itself(second)
    assert not listens(second.port)
    wait_for(lambda: not ray_workers(head.pid, CONTROLLER), "Ray Serve to be gone")


def assert_it_ends_a_request_before_itself(service: Service) -> None:
    """By SIGTERM; by Ctrl-C the other services of the tests are ended."""
    replies: list[tuple[int, Any]] = []
    request = {"n": 8, "num_inference_steps": 150, "sampler": "ancestral"}
    thread = threading.Thread(target=lambda: replies.append(service.post(request)))
    thread.start()
    wait_for(lambda: service.get("/v1/engine")["requests"], "the request", service.process)
    service.process.send_signal(signal.SIGTERM)
    thread.join()
    ((status, reply),) = replies
    assert status == 200, reply
    assert len(reply["data"]) == 8
    assert service.process.wait(timeout=HANG) == 0


def test_what_others_serve_is_left_alone(tiny: Workplace, head: Head) -> None:
    def other(verb: str) -> None:
        command = [sys.executable, "-c", OTHER, verb]
        subprocess.run(command, env={**ENVIRONMENT, **head.joined}, check=True)

    other("serve")
    try:
        output = tiny.ddpm("serve", "digits@champion", code=2, **head.joined)
        assert "error: Ray Serve of this cluster serves already: other; add the model to" in output
        assert ray_workers(head.pid, "ServeReplica:other")
    finally:
        other("shutdown")
