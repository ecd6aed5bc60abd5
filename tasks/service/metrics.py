"""What Prometheus is told of a service; infra/monitoring/grafana.json draws these names.

Ray's agent on each node serves them, with `ray_` before each name. Counters grow for ever: a rate
is the difference of two readings.
"""

import time
from collections import deque

from ray.serve.metrics import Counter, Gauge, Histogram

from pipeline.serving.config import Mode
from pipeline.serving.engine import Engine

STEP_BOUNDARIES = [0.001 * 2**i for i in range(14)]  # 1 ms to 8 s
REQUEST_BOUNDARIES = [0.01 * 2**i for i in range(17)]  # 10 ms to 11 min

OUTCOMES = ("completed", "failed", "cancelled", "late", "rejected", "invalid")
"""Of requests: `late` were given up after max_seconds, `rejected` came when the service was full
(429), `invalid` could not be understood (4xx)."""


class ReplicaMetrics:
    """Of one replica. The thread that draws only notes its steps; `publish` tells of them."""

    def __init__(self) -> None:
        kinds = ("model", "mode")
        self._step_seconds = Histogram(
            "ddpm_step_seconds", "Of a network call and what is around it.", STEP_BOUNDARIES, kinds
        )
        self._useful_rows = Counter("ddpm_useful_rows", "Rows of network calls, images'.", kinds)
        self._call_rows = Counter(
            "ddpm_call_rows", "Rows that the network calls had room for.", kinds
        )
        self._images = Counter("ddpm_images", "Images drawn.", kinds)
        self._rows_waiting = Gauge("ddpm_rows_waiting", "Rows that the images in hand still need.")
        self._images_waiting = Gauge("ddpm_images_waiting", "Images in hand.")
        self._oldest_seconds = Gauge(
            "ddpm_oldest_image_seconds", "Since the image came that is in hand longest."
        )
        self._steps: deque[tuple[Engine, float, int]] = deque()

    def note_step(self, engine: Engine, seconds: float, rows: int) -> None:
        """From the thread that draws."""
        self._steps.append((engine, seconds, rows))

    def note_image(self, model: str, mode: Mode) -> None:
        self._images.inc(1, {"model": model, "mode": mode})

    def publish(self, names: dict[Engine, str], came: list[float]) -> None:
        """Args:
        names: of the models of the engines in memory.
        came: when each image in hand did, by time.monotonic().
        """
        while self._steps:
            engine, seconds, rows = self._steps.popleft()
            tags = {"model": names.get(engine, "unloaded"), "mode": engine.mode}
            self._step_seconds.observe(seconds, tags)
            self._useful_rows.inc(rows, tags)
            self._call_rows.inc(engine.rows, tags)
        self._rows_waiting.set(sum(engine.num_rows for engine in names))
        self._images_waiting.set(len(came))
        self._oldest_seconds.set(time.monotonic() - min(came) if came else 0)


class IngressMetrics:
    """Of the requests of a service."""

    def __init__(self) -> None:
        self._requests = Counter("ddpm_requests", "Requests that have ended.", ("outcome",))
        self._request_seconds = Histogram(
            "ddpm_request_seconds",
            "From a request to its last image.",
            REQUEST_BOUNDARIES,
            ("model", "mode"),
        )
        self._rows_accepted = Gauge("ddpm_rows_accepted", "Rows accepted and not done.")

    def note_end(self, outcome: str) -> None:
        assert outcome in OUTCOMES
        self._requests.inc(1, {"outcome": outcome})

    def note_completed(self, model: str, mode: Mode, seconds: float) -> None:
        self.note_end("completed")
        self._request_seconds.observe(seconds, {"model": model, "mode": mode})

    def note_rows(self, rows: int) -> None:
        self._rows_accepted.set(rows)
