"""The sampling engine: images of many requests advance together, one network call at a time.

The unit is a row (x_t, t, label). Before each call the engine gathers rows of the images in hand,
whatever their sampler, number of steps, guidance or position, into one batch; images join and leave
between calls. A guided image is two rows, ε(c) and ε(∅).

In `exact` mode the pixels of an image depend on its recipe alone (promise P3): its noise is
addressed by (seed, index, step), and every network call has one fixed shape, padded with zeros, on
one thread, since the kernels that torch picks for another batch size or thread count round
differently. In `fast` mode a call has as many rows as there are.
"""

import contextlib
import queue
import threading
from collections import deque
from collections.abc import Container, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from pipeline.data.images import to_uint8
from pipeline.diffusion.guidance import guided, rescaled
from pipeline.errors import RequestError
from pipeline.samplers.model import Model, ModelSpec, check_sampling, make_plan
from pipeline.samplers.plan import (
    ALPHA_BAR,
    GUIDANCE,
    OFFLINE,
    RESCALE,
    SamplingConfig,
    T,
    X,
    advance,
    needs_noise,
    scaled_noise,
    start,
    threshold,
)
from pipeline.seeding import key, normal

EXACT_ROWS = 16
"""Rows of a network call: where the throughput of small U-Nets on CPU cores has its knee."""

Mode = Literal["exact", "fast"]


@dataclass(frozen=True)
class ImageRequest:
    """The recipe of one image, but for the model: image `index` of the request with `seed`."""

    seed: int
    index: int
    label: int | None
    sampling: SamplingConfig


@dataclass(eq=False)
class _Image:
    """An image in hand: at which row of its plan it is, and the state of its sampler."""

    ticket: int
    request: ImageRequest
    table: Tensor  # (network evaluations, NUM_COLUMNS)
    position: int
    state: Tensor  # (5, C, H, W)

    @property
    def row(self) -> Tensor:
        return self.table[self.position]

    @property
    def rows(self) -> int:
        return 2 if self.row[GUIDANCE] else 1


class Engine:
    """Draws images from one model. Not thread-safe; see EngineThread.

    Args:
        mode: `exact` or `fast`, see the module.
        rows: the most rows in a network call, and in exact mode the number of rows in each.
    """

    def __init__(
        self,
        model: Model,
        mode: Mode = "exact",
        rows: int = EXACT_ROWS,
        device: torch.device | None = None,
    ) -> None:
        assert rows >= 2, "a guided image takes two rows"
        self.model = model
        self.mode = mode
        self.rows = rows
        self.device = device or torch.device("cpu")
        self.num_calls = 0
        self.num_useful_rows = 0
        self._waiting: deque[_Image] = deque()
        self._next_ticket = 0
        model.network.to(self.device)

    @property
    def num_images(self) -> int:
        """Images in hand."""
        return len(self._waiting)

    def add(self, request: ImageRequest) -> int:
        """Take an image in; returns its ticket.

        Raises:
            RequestError: the model cannot draw it.
        """
        check_request(self.model.spec, request)
        assert request.sampling.sampler not in OFFLINE, "drawn by pipeline/serving/offline.py"
        ticket = self._next_ticket
        self._next_ticket += 1
        table = make_plan(self.model, request.sampling).table
        x_T = normal([_noise_key(request, 0)], self.model.spec.image_shape)
        self._waiting.append(_Image(ticket, request, table, 0, start(x_T)[0]))
        return ticket

    def step(self) -> list[tuple[int, np.ndarray]]:
        """One network call; returns (ticket, (H, W, C) uint8) of the images it finished."""
        images = self._gather()
        if not images:
            return []
        state = torch.stack([image.state for image in images])  # (n, 5, C, H, W)
        rows = torch.stack([image.row for image in images])  # (n, NUM_COLUMNS)
        labels = [image.request.label for image in images]
        x_0, fraction = self.x_0(labels, state[:, X], rows)
        z = torch.zeros_like(x_0)
        for i in needs_noise(rows).nonzero().flatten().tolist():
            noise_key = _noise_key(images[i].request, images[i].position + 1)
            z[i] = normal([noise_key], self.model.spec.image_shape)[0]
        z = scaled_noise(z, fraction, rows)
        state = advance(state, threshold(x_0, rows), z, rows)

        finished = []
        for image, following in zip(images, state, strict=True):
            image.state = following
            image.position += 1
            if image.position == len(image.table):
                finished.append(image)
        for image in finished:
            self._waiting.remove(image)
        if not finished:
            return []
        pixels = to_uint8(torch.stack([image.state[X] for image in finished]))
        return [(image.ticket, p) for image, p in zip(finished, pixels, strict=True)]

    def generate(self, requests: Sequence[ImageRequest]) -> Iterator[tuple[int, np.ndarray]]:
        """Draw all requests; yields (position in `requests`, (H, W, C) uint8) as images finish."""
        position = {self.add(request): i for i, request in enumerate(requests)}
        while self.num_images:
            for ticket, pixels in self.step():
                yield position[ticket], pixels

    def draw(self, requests: Sequence[ImageRequest]) -> np.ndarray:
        """The images of `requests`, in order: (N, H, W, C) uint8."""
        images = dict(self.generate(requests))
        return np.stack([images[i] for i in range(len(requests))])

    def drop(self, tickets: Container[int]) -> None:
        """Forget images in hand."""
        self._waiting = deque(image for image in self._waiting if image.ticket not in tickets)

    def _gather(self) -> list[_Image]:
        """The images of the next call: the oldest whose rows fit."""
        images, free = [], self.rows
        for image in self._waiting:
            if image.rows <= free:
                images.append(image)
                free -= image.rows
            if not free:
                break
        return images

    def x_0(
        self, labels: Sequence[int | None], x: Tensor, rows: Tensor
    ) -> tuple[Tensor, Tensor | None]:
        """x̂_0 of n images, guided where their rows of a plan say so, by one call of the network.

        And the fraction of a learned variance; x and both of these (n, C, H, W). Guided images
        count twice, and there are at most `rows`.
        """
        n, null = len(labels), self.model.spec.num_classes
        labels = [null if label is None else label for label in labels]
        w = rows[:, GUIDANCE]
        is_guided = w != 0
        num_rows = n + int(is_guided.sum())
        padding = self.rows - num_rows if self.mode == "exact" else 0
        x_rows = torch.cat([x, x[is_guided], x.new_zeros(padding, *x.shape[1:])])
        t, alpha_bar = (
            torch.cat([column, column[is_guided], column[:1].expand(padding)])
            for column in (rows[:, T], rows[:, ALPHA_BAR])
        )
        label_rows = torch.tensor([*labels, *[null] * (num_rows - n + padding)])

        with self._threads():
            output, fraction = self.model.output(x_rows.to(self.device), t, alpha_bar, label_rows)
        self.num_calls += 1
        self.num_useful_rows += num_rows
        output = output.cpu()
        out, out_null = output[:n], output[n:num_rows]
        if is_guided.any():
            out = out.clone()
            steered = guided(out[is_guided], out_null, w[is_guided])
            phi = rows[is_guided, RESCALE]
            if phi.any():
                steered = rescaled(steered, out[is_guided], phi)
            out[is_guided] = steered
        x_0 = self.model.x_0(out, x, rows[:, ALPHA_BAR])
        return x_0, None if fraction is None else fraction[:n].cpu()

    @contextlib.contextmanager
    def _threads(self) -> Iterator[None]:
        """One thread in exact mode on a CPU: the number of threads changes the last bits."""
        threads = torch.get_num_threads()
        if self.mode != "exact" or self.device.type != "cpu" or threads == 1:
            yield
            return
        torch.set_num_threads(1)
        try:
            yield
        finally:
            torch.set_num_threads(threads)


def check_request(spec: ModelSpec, request: ImageRequest) -> None:
    """Raise RequestError unless a model of that spec can draw `request`."""
    sampling = request.sampling
    check_sampling(spec.diffusion, sampling)
    if request.label is not None and not 0 <= request.label < spec.num_classes:
        known = (
            f"from 0 to {spec.num_classes - 1}" if spec.num_classes else "none: it has no classes"
        )
        raise RequestError(f"label={request.label} is not a class of the model, {known}", "label")
    if request.label is None and spec.num_classes and not spec.has_null_label:
        raise RequestError(
            "label is missing: the model was trained with training.label_dropout=0 and draws only "
            f"images of a class, 0 to {spec.num_classes - 1}",
            "label",
        )
    if sampling.guidance and (request.label is None or not spec.has_null_label):
        why = (
            "it needs a label to guide towards"
            if spec.has_null_label
            else "the model was trained without label dropout"
        )
        raise RequestError(f"guidance={sampling.guidance} cannot be used: {why}; use 0", "guidance")


def _noise_key(request: ImageRequest, draw: int) -> int:
    """Of x_T for draw 0, of the noise after network evaluation `draw` above it."""
    return key(request.seed, "sample", request.index, draw)


class EngineThread:
    """An engine on a thread of its own; `submit` from any thread."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self._inbox: queue.SimpleQueue[tuple[ImageRequest, Future[np.ndarray]] | None]
        self._inbox = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    def submit(self, request: ImageRequest) -> "Future[np.ndarray]":
        """The (H, W, C) uint8 image of a request, when it is done; cancel it to drop the image."""
        future: Future[np.ndarray] = Future()
        self._inbox.put((request, future))
        return future

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def close(self) -> None:
        """End the thread; images that are not done are cancelled."""
        self._inbox.put(None)
        self._thread.join()

    def _run(self) -> None:
        futures: dict[int, Future[np.ndarray]] = {}
        while self._admit(futures):
            gone = {ticket for ticket, future in futures.items() if future.cancelled()}
            if gone:
                self.engine.drop(gone)
                for ticket in gone:
                    del futures[ticket]
            try:
                finished = self.engine.step()
            except Exception as error:  # of the network or the device: no caller may wait for ever
                self.engine.drop(futures)
                for future in futures.values():
                    if future.set_running_or_notify_cancel():
                        future.set_exception(error)
                futures.clear()
                continue
            for ticket, pixels in finished:
                future = futures.pop(ticket)
                if future.set_running_or_notify_cancel():
                    future.set_result(pixels)
        for future in futures.values():
            future.cancel()

    def _admit(self, futures: dict[int, "Future[np.ndarray]"]) -> bool:
        """Take in what was submitted, waiting only if there is no work in hand; False to end."""
        while not futures or not self._inbox.empty():
            message = self._inbox.get()
            if message is None:
                return False
            request, future = message
            try:
                futures[self.engine.add(request)] = future
            except Exception as error:
                if future.set_running_or_notify_cancel():
                    future.set_exception(error)
        return True
