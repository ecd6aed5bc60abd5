"""The engines of a replica on a thread of their own."""

import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, NamedTuple, TypeVar

import numpy as np

from pipeline.serving.engine import Caller, Engine, Frame, ImageRequest

Result = TypeVar("Result")

LONGEST_ADMISSION = 0.02
"""Seconds for which images that come may hold up those in hand, before each network call."""


class StepFailed(Exception):
    """A network call failed: of the network or the device, not of the images that it was for."""


class _Order(NamedTuple):
    """An image that a caller of EngineThread wants."""

    engine: Engine
    request: ImageRequest
    caller: Caller | None
    frames: int
    on_frame: Callable[[Frame], None]
    future: "Future[np.ndarray]"


class _Call(NamedTuple):
    """Something else that the thread is to do."""

    function: Callable[[], Any]
    future: "Future[Any]"


class EngineThread:
    """Engines that take turns on a thread of their own; `submit` from any thread.

    The thread does nothing but steps: who waits for an image or a frame encodes it.

    Args:
        on_step: told of each network call, with its seconds and its rows without padding, on the
            thread, which it must not hold up.
    """

    def __init__(
        self, on_step: Callable[[Engine, float, int], None] = lambda engine, seconds, rows: None
    ) -> None:
        self._on_step = on_step
        self._inbox: queue.SimpleQueue[_Order | _Call | None] = queue.SimpleQueue()
        self._orders: dict[Engine, dict[int, _Order]] = {}
        self._progress = time.monotonic()
        self.failures = 0
        """Network calls that have failed since the last that did not."""
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(
        self,
        engine: Engine,
        request: ImageRequest,
        caller: Caller | None = None,
        frames: int = 0,
        on_frame: Callable[[Frame], None] = lambda frame: None,
    ) -> "Future[np.ndarray]":
        """The (H, W, C) uint8 image of a request, when it is done; cancel it to drop the image.

        A plan that is not known yet is made on the thread: `make_plan` elsewhere before, if it is
        long and others are not to wait for it.

        Args:
            engine: used by this thread alone from now on.
            on_frame: called on this thread, which it must not hold up.

        Raises, as the future:
            RequestError: as of Engine.add.
            StepFailed: a network call for the image failed.
        """
        future: Future[np.ndarray] = Future()
        self._inbox.put(_Order(engine, request, caller, frames, on_frame, future))
        return future

    def call(self, function: Callable[[], Result]) -> "Future[Result]":
        """Call a function on the thread, between network calls."""
        future: Future[Result] = Future()
        self._inbox.put(_Call(function, future))
        return future

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def seconds_in_step(self) -> float:
        """Since the thread last came out of a network call with work in hand; 0 without work."""
        return time.monotonic() - self._progress if self._orders else 0.0

    def close(self) -> None:
        """End the thread; images that are not done are cancelled."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        while self._admit():
            for engine in list(self._orders):
                self._step(engine, self._orders[engine])
                self._progress = time.monotonic()
                if not self._orders[engine]:
                    del self._orders[engine]
        for orders in self._orders.values():
            for order in orders.values():
                order.future.cancel()

    def _step(self, engine: Engine, orders: dict[int, _Order]) -> None:
        gone = {ticket for ticket, order in orders.items() if order.future.cancelled()}
        if gone:
            engine.drop(gone)
            for ticket in gone:
                del orders[ticket]
        begin, useful_rows = time.perf_counter(), engine.num_useful_rows
        try:
            step = engine.step()
        except Exception as error:  # no caller may wait for ever
            self.failures += 1
            failed = StepFailed(f"{type(error).__name__}: {error}")
            failed.__cause__ = error
            engine.drop(orders)
            for order in orders.values():
                _fail(order.future, failed)
            orders.clear()
            return
        if rows := engine.num_useful_rows - useful_rows:
            self.failures = 0
            self._on_step(engine, time.perf_counter() - begin, rows)
        for frame in step.frames:
            orders[frame.ticket].on_frame(frame)
        for ticket, pixels in step.finished:
            future = orders.pop(ticket).future
            if future.set_running_or_notify_cancel():
                future.set_result(pixels)

    def _admit(self) -> bool:
        """Take in what was submitted, waiting only if there is no work in hand; False to end."""
        begin = time.monotonic()
        while not self._orders or not self._inbox.empty():
            order = self._inbox.get()
            if order is None:
                return False
            if isinstance(order, _Call):
                _fulfil(order.future, order.function)
                continue
            if order.future.cancelled():
                continue
            if not self._orders:
                self._progress = begin = time.monotonic()
            try:
                ticket = order.engine.add(order.request, order.caller, order.frames)
            except Exception as error:
                _fail(order.future, error)
            else:
                self._orders.setdefault(order.engine, {})[ticket] = order
            if time.monotonic() - begin > LONGEST_ADMISSION and self._orders:
                return True
        return True


def _fulfil(future: "Future[Any]", function: Callable[[], Any]) -> None:
    try:
        result = function()
    except Exception as error:
        _fail(future, error)
    else:
        if future.set_running_or_notify_cancel():
            future.set_result(result)


def _fail(future: "Future[Any]", error: Exception) -> None:
    if future.set_running_or_notify_cancel():
        future.set_exception(error)
