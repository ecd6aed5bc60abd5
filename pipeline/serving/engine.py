"""The sampling engine: images of many requests advance together, one network call at a time.

The unit is a row (x_t, t, label). Before each call the engine gathers rows of the images in hand,
whatever their sampler, number of steps, guidance or position, into one batch; images join and leave
between calls. A guided image is two rows, ε(c) and ε(∅).

In `exact` mode the pixels of an image depend on its recipe alone (promise P3): its noise is
addressed by (seed, index, step), and every network call has one fixed shape, padded if need be, on
one thread, since the kernels that torch picks for another batch size or thread count round
differently. In `fast` mode a call has as many rows as there are, and the network may be compiled,
for calls of a few sizes.
"""

import contextlib
import time
from collections import deque
from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel
from torch import Tensor
from torch.nn import functional as F

from pipeline.data.images import to_uint8
from pipeline.device import CPU, is_apart, send, send_together
from pipeline.diffusion.guidance import guided, rescaled
from pipeline.errors import RequestError, shown
from pipeline.samplers.config import OFFLINE, SamplingConfig, check_sampling
from pipeline.samplers.model import Model, ModelSpec, make_plan
from pipeline.samplers.plan import (
    ALPHA_BAR,
    GUIDANCE,
    NUM_COLUMNS,
    RESCALE,
    SLOTS,
    T,
    X,
    advance,
    needs_noise,
    scaled_noise,
    start,
    threshold,
)
from pipeline.seeding import key, normal
from pipeline.serving import turns
from pipeline.serving.config import EXACT_ROWS, Mode

NO_PLAN = np.empty((0, NUM_COLUMNS))


@dataclass(frozen=True)
class ImageRequest:
    """The recipe of one image, but for the model: image `index` of the request with `seed`."""

    seed: int
    index: int
    label: int | None
    sampling: SamplingConfig


@dataclass(frozen=True)
class Caller:
    """Who waits for an image, so that turns are fair (see turns.py): its request, and whose."""

    request: int
    client: int
    id: str | None = None
    """What people know the request by."""


class ImageInHand(BaseModel, frozen=True, extra="forbid"):
    """An image that is being drawn, as people are shown it."""

    request: str | None
    """The id of its caller."""
    image_index: int
    evaluation: int
    """Evaluations of the network that it has had."""
    evaluations: int
    """All that it takes."""
    t: float
    """Of its next evaluation."""
    rows: int
    """Of the network call that its next evaluation takes."""
    in_call: bool
    """It took part in the last network call."""


class Frame(NamedTuple):
    """An image on its way, after one of its network evaluations."""

    ticket: int
    evaluation: int
    """From 1."""
    evaluations: int
    """Of the whole image."""
    x_t: Tensor
    x_0: Tensor
    """(C, H, W) float32 on the CPU: x_t, and what the network takes the clean image for, in
    [-1, 1]."""


class Step(NamedTuple):
    """What a network call brought."""

    finished: list[tuple[int, np.ndarray]]
    """(ticket, (H, W, C) uint8) of images that are done."""
    frames: list[Frame]


class Engine:
    """Draws images from one model. Not thread-safe; see engine_thread.py.

    Images in hand have places in a few tensors, of which a network call takes some by index. The
    images stay on the device; what decides about a call is known on the host, so that nothing but
    an image or a frame that is wanted is waited for.

    Args:
        mode: `exact` or `fast`, see the module.
        rows: the most rows in a network call, and in exact mode the number of rows in each.
        compiled: with torch.compile, on a GPU as CUDA graphs; of fast mode only.
    """

    def __init__(
        self,
        model: Model,
        mode: Mode = "exact",
        rows: int = EXACT_ROWS,
        device: torch.device | None = None,
        compiled: bool = False,
    ) -> None:
        assert rows >= 2, "a guided image takes two rows"
        assert mode == "fast" or not compiled, "another shape, or another kernel, rounds otherwise"
        self.device = device or CPU
        model.network.to(self.device)
        self.mode = mode
        self.rows = rows
        self.sizes = _powers_of_two(rows) if compiled else (rows,) if mode == "exact" else ()
        """Of a call, which is padded to the next of them; none: of any size."""
        self.model = _compiled(model, self.device) if compiled else model
        self.num_calls = 0
        self.num_useful_rows = 0
        self._next_ticket = 0
        self._under_way: deque[torch.Event] = deque()
        """The last network calls, where a device makes them while the host goes on."""
        self._clear()

    @property
    def num_images(self) -> int:
        """Images in hand."""
        return int(self._book["in_hand"].sum())

    @property
    def num_rows(self) -> int:
        """Network rows that the images in hand still need."""
        book = self._book  # once: this may be asked from another thread
        return int(book["remaining"][book["in_hand"]].sum())

    def add(self, request: ImageRequest, caller: Caller | None = None, frames: int = 0) -> int:
        """Take an image in; returns its ticket.

        Args:
            caller: by default the image is a request of its own, of a client of its own.
            frames: so many are handed out on its way, evenly, and at most one an evaluation.

        Raises:
            RequestError: the model cannot draw it.
        """
        check_request(self.model.spec, request)
        assert request.sampling.sampler not in OFFLINE, "drawn by pipeline/serving/offline.py"
        table = make_plan(self.model, request.sampling).table
        place = self._free_place()
        ticket = self._next_ticket
        self._next_ticket += 1
        caller = caller or Caller(-1 - ticket, -1 - ticket)  # no number of a caller's
        self._requests[place] = request
        self._ids[place] = caller.id
        self._labels[place] = self.label_of(request.label)
        self._tables[place] = table.numpy()
        x_T = normal([_noise_key(request, 0)], self.model.spec.image_shape)
        self._state[place] = start(send(x_T, self.device))[0]
        if frames:
            self._frames_at[place] = evenly(len(table), frames)
        rows = 1 + (table[:, GUIDANCE] != 0).long()
        self._book[place] = (
            True,
            ticket,
            caller.request,
            caller.client,
            self.num_calls,
            0,
            len(table),
            int(rows.sum()),
            int(rows[0]),
        )
        return ticket

    @torch.inference_mode()
    def step(self) -> Step:
        """One network call."""
        places = turns.choose(self._book, self.rows, self.num_calls, self.rows // 2)
        if not len(places):
            return Step([], [])
        self._last_call = self._book["ticket"][places]
        positions = self._book["position"][places]
        known = torch.from_numpy(self._plan_rows(places, positions))
        of_call = (known, *map(torch.from_numpy, (places, self._labels[places])))
        rows, at, labels = send_together(of_call, self.device)
        state = self._state.index_select(0, at)  # (n, 5, C, H, W)
        x_0, fraction = self.x_0(labels, state[:, X], rows, known)
        x_0 = threshold(x_0, rows, known)
        z = self._noise(places, positions, known)
        state = advance(state, x_0, scaled_noise(z, fraction, rows), rows, known)
        self._state.index_copy_(0, at, state)
        self._keep_pace()
        return self._move_on(places, state[:, X], x_0)

    def _noise(self, places: np.ndarray, positions: np.ndarray, known: Tensor) -> Tensor:
        """z of each image in a call, (n, C, H, W); 0 where its row of the plan adds none."""
        shape = self.model.spec.image_shape
        noisy = needs_noise(known).nonzero().flatten().tolist()
        if not noisy:
            return torch.zeros(len(places), *shape, device=self.device)
        z = torch.zeros(len(places), *shape)
        keys = [_noise_key(self._requests[places[i]], int(positions[i]) + 1) for i in noisy]
        z[noisy] = normal(keys, shape)
        return send(z, self.device)

    def _keep_pace(self) -> None:
        """Let a device be no more than a call behind, so that an image that comes waits for few."""
        if not is_apart(self.device):
            return
        done = torch.Event(device=self.device)
        done.record()
        self._under_way.append(done)
        if len(self._under_way) > 2:
            self._under_way.popleft().synchronize()

    def _move_on(self, places: np.ndarray, x_t: Tensor, x_0: Tensor) -> Step:
        """Note that images have had an evaluation, and part with those that are done."""
        book = self._book
        positions = book["position"][places] + 1
        goes_on = positions < book["length"][places]
        book["position"][places] = positions
        book["remaining"][places] -= book["rows"][places]
        going = places[goes_on]
        if len(going):
            following = self._plan_rows(going, positions[goes_on])
            book["rows"][going] = 1 + (following[:, GUIDANCE] != 0)

        frames = []
        wanted = [
            i
            for i, place in enumerate(places.tolist() if self._frames_at else [])
            if positions[i] in self._frames_at.get(place, ())
        ]
        if wanted:
            of_frames = torch.stack([torch.stack([x_t[i], x_0[i]]) for i in wanted]).cpu()
            for i, (here, clean) in zip(wanted, of_frames, strict=True):
                ticket, position, length = book[["ticket", "position", "length"]][places[i]].item()
                frames.append(Frame(ticket, position, length, here, clean))
        done = np.flatnonzero(~goes_on)
        if not len(done):
            return Step([], frames)
        self._forget(places[done].tolist())
        tickets = book["ticket"][places[done]].tolist()
        pixels = to_uint8(torch.stack([x_t[i] for i in done.tolist()]))
        return Step(list(zip(tickets, pixels, strict=True)), frames)

    def _plan_rows(self, places: np.ndarray, positions: np.ndarray) -> np.ndarray:
        """Of each place's plan the row at its position, (n, NUM_COLUMNS)."""
        tables = self._tables
        return np.stack([tables[i][j] for i, j in zip(places, positions, strict=True)])

    def warm_up(self) -> float:
        """Let torch set up, or compile, calls of each size; returns the rows/s of the largest."""
        seconds = 0.0
        for size in (*self.sizes, self.rows, self.rows):
            zeros, half = torch.zeros(size, *self.model.spec.image_shape), torch.full((size,), 0.5)
            labels = torch.full((size,), self.label_of(None))
            with self._kernels():
                begin = time.perf_counter()
                output, _ = self.model.output(
                    zeros.to(self.device), half.double(), half.double(), labels
                )
                output.cpu()
                seconds = time.perf_counter() - begin
        return self.rows / seconds

    def generate(self, requests: Sequence[ImageRequest]) -> Iterator[tuple[int, np.ndarray]]:
        """Draw all requests; yields (position in `requests`, (H, W, C) uint8) as images finish."""
        position = {self.add(request): i for i, request in enumerate(requests)}
        while self.num_images:
            for ticket, pixels in self.step().finished:
                yield position[ticket], pixels

    def draw(self, requests: Sequence[ImageRequest]) -> np.ndarray:
        """The images of `requests`, in order: (N, H, W, C) uint8."""
        images = dict(self.generate(requests))
        return np.stack([images[i] for i in range(len(requests))])

    def in_hand(self) -> list[ImageInHand]:
        """The images in hand: those of the last network call, then those that wait."""
        places = np.flatnonzero(self._book["in_hand"])
        book = self._book[places]
        positions = book["position"]
        in_call = np.isin(book["ticket"], self._last_call)
        images = []
        for i in np.lexsort((book["ticket"], ~in_call)).tolist():
            request = self._requests[places[i]]
            assert request is not None
            evaluation, evaluations, rows = book[["position", "length", "rows"]][i].item()
            images.append(
                ImageInHand(
                    request=self._ids[places[i]],
                    image_index=request.index,
                    evaluation=evaluation,
                    evaluations=evaluations,
                    t=float(self._tables[places[i]][positions[i], T]),
                    rows=rows,
                    in_call=bool(in_call[i]),
                )
            )
        return images

    def drop(self, tickets: Container[int]) -> None:
        """Forget images in hand."""
        places = np.flatnonzero(self._book["in_hand"]).tolist()
        self._forget([place for place in places if int(self._book["ticket"][place]) in tickets])

    # --- places -----------------------------------------------------------------------------------

    def _clear(self) -> None:
        self._book = turns.new_book(0)
        shape = (0, len(SLOTS), *self.model.spec.image_shape)
        self._state = torch.empty(shape, device=self.device)
        self._tables: list[np.ndarray] = []
        """Each image's plan, which it has in common with those drawn alike."""
        self._labels = np.empty(0, dtype=np.int64)
        self._requests: list[ImageRequest | None] = []
        self._ids: list[str | None] = []
        self._last_call = np.empty(0, dtype=np.int64)
        self._frames_at: dict[int, set[int]] = {}

    def _free_place(self) -> int:
        free = np.flatnonzero(~self._book["in_hand"])
        if len(free):
            return int(free[0])
        there = len(self._book)
        more = max(4, there)
        self._book = np.concatenate([self._book, turns.new_book(more)])
        self._state = F.pad(self._state, (0, 0) * 4 + (0, more))
        self._tables += [NO_PLAN] * more
        self._labels = np.pad(self._labels, [(0, more)])
        self._requests += [None] * more
        self._ids += [None] * more
        return there

    def _forget(self, places: list[int]) -> None:
        self._book["in_hand"][places] = False
        for place in places:
            self._tables[place] = NO_PLAN
            self._requests[place] = None
            self._frames_at.pop(place, None)
        if not self.num_images:
            self._clear()  # a crowd leaves nothing to hold

    def label_of(self, label: int | None) -> int:
        """A label as the network takes it, none as the null label."""
        return self.model.spec.num_classes if label is None else label

    # --- the network ------------------------------------------------------------------------------

    def x_0(
        self, labels: Tensor, x: Tensor, rows: Tensor, known: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """x̂_0 of n images, guided where their rows of a plan say so, by one call of the network.

        And the fraction of a learned variance; x and both of these (n, C, H, W), labels (n,) as of
        `label_of`, all on the device. Guided images count twice, and there are at most `rows`.

        Args:
            known: the rows on the CPU, where `rows` are on a device.
        """
        n = len(labels)
        told = (rows if known is None else known).numpy()
        steered = np.flatnonzero(told[:, GUIDANCE])
        num_rows = n + len(steered)
        size = next((size for size in self.sizes if size >= num_rows), num_rows)
        x_rows, plan_rows = x, rows
        if size > n:  # padding repeats an image: what is beside a row does not change it
            padding = np.zeros(size - num_rows, dtype=np.int64)
            order = torch.from_numpy(np.concatenate([np.arange(n), steered, padding]))
            take = send(order, self.device)
            x_rows, plan_rows = x.index_select(0, take), rows.index_select(0, take)
            labels = F.pad(labels, (0, size - n), value=self.label_of(None))

        with self._kernels():
            output, fraction = self.model.output(
                x_rows, plan_rows[:, T], plan_rows[:, ALPHA_BAR], labels
            )
        self.num_calls += 1
        self.num_useful_rows += num_rows
        out = output[:n]
        if len(steered):
            at = take[n:num_rows]
            out = out.clone()
            of_label, w, phi = out[at], rows[at, GUIDANCE], rows[at, RESCALE]
            out_guided = guided(of_label, output[n:num_rows], w)
            if told[steered, RESCALE].any():
                out_guided = rescaled(out_guided, of_label, phi)
            out[at] = out_guided
        x_0 = self.model.x_0(out, x, rows[:, ALPHA_BAR])
        return x_0, None if fraction is None else fraction[:n]

    @contextlib.contextmanager
    def _kernels(self) -> Iterator[None]:
        """In exact mode the same kernels for the same shape, wherever and whenever it is called.

        On a CPU one thread, since their number changes the last bits; on a GPU neither a choice by
        trial nor atomic sums.
        """
        threads = torch.get_num_threads()
        if self.mode == "exact" and self.device.type == "cuda":
            with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True):
                yield
        elif self.mode == "exact" and threads > 1:
            torch.set_num_threads(1)
            try:
                yield
            finally:
                torch.set_num_threads(threads)
        else:
            yield


def evenly(evaluations: int, frames: int) -> set[int]:
    """The evaluations, from 1, after which an image has a frame; none after the last, its end."""
    return {evaluations * (i + 1) // (frames + 1) for i in range(frames)} - {0, evaluations}


def _powers_of_two(rows: int) -> tuple[int, ...]:
    """1, 2, 4, ... and `rows`."""
    return (*(1 << i for i in range((rows - 1).bit_length())), rows)


def _compiled(model: Model, device: torch.device) -> Model:
    """The same model, its network compiled for each shape that it meets."""
    mode = "reduce-overhead" if device.type == "cuda" else None
    # by default dynamo gives up after 8 shapes, and goes on uncompiled
    torch._dynamo.config.recompile_limit = 32
    network: Any = torch.compile(model.network, dynamic=False, mode=mode)
    return replace(model, network=network)


def check_request(spec: ModelSpec, request: ImageRequest) -> None:
    """Raise RequestError unless a model of that spec can draw `request`."""
    sampling = request.sampling
    check_sampling(spec.diffusion, sampling)
    if request.label is not None and not 0 <= request.label < spec.num_classes:
        known = (
            f"from 0 to {spec.num_classes - 1}" if spec.num_classes else "none: it has no classes"
        )
        raise RequestError(
            f"label={shown(request.label)} is not a class of the model, {known}", "label"
        )
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
