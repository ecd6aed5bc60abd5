"""`ddpm serve` on a cluster that was there before and stays."""

import subprocess
import sys
from collections.abc import Iterator

import pytest

from tests.conftest import ENVIRONMENT, Workplace, listens, ray_workers, wait_for
from tests.head import Head, started
from tests.service import served

OPEN = {"RAY_AUTH_MODE": "disabled"}
CONTROLLER = "ray::ServeController"
"""In the titles of Ray's processes."""
OTHER = """
import ray
from ray import serve

@serve.deployment
class Other:
    pass

ray.init()
serve.run(Other.bind(), name="other", route_prefix="/other")
"""


@pytest.fixture(scope="module")
def head() -> Iterator[Head]:
    with started(**OPEN) as head:
        yield head


@pytest.fixture(scope="module")
def there(head: Head) -> dict[str, str]:
    """The environment of what joins the head."""
    return {"RAY_ADDRESS": f"127.0.0.1:{head.gcs}", **OPEN}


def test_a_service_is_its_command_s_and_what_was_killed_is_cleared_away(
    tiny: Workplace, head: Head, there: dict[str, str]
) -> None:
    with served(tiny, "--replicas", "1", **there) as first:
        output = tiny.ddpm("serve", "digits@champion", code=2, **there)
        assert "this Ray cluster serves already, by another `ddpm serve`: end that" in output
        first.process.kill()
        first.process.wait()
    assert ray_workers(head.pid, CONTROLLER) and listens(first.port), "it outlives its command"
    with served(tiny, "--replicas", "1", **there) as second:
        assert len(second.images(num_inference_steps=2)) == 1
        assert not listens(first.port)
    assert not listens(second.port)
    wait_for(lambda: not ray_workers(head.pid, CONTROLLER), "Ray Serve to be gone")


def test_what_others_serve_is_left_alone(
    tiny: Workplace, head: Head, there: dict[str, str]
) -> None:
    subprocess.run([sys.executable, "-c", OTHER], env={**ENVIRONMENT, **there}, check=True)
    output = tiny.ddpm("serve", "digits@champion", code=2, **there)
    assert "error: Ray Serve of this cluster serves already: other; add the model to" in output
    assert ray_workers(head.pid, "ServeReplica:other")
