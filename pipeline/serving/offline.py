"""Drawing images with any sampler, those included whose steps depend on the data.

A plan's images go through the engine, which mixes them row by row. `ode` and `langevin` have no
plan: images of one sampling config are drawn in groups that fill a network call. What was said of
the engine holds for them, too: each call is the engine's own, of one fixed shape and on one thread
in exact mode, noise is addressed, and the rest is arithmetic an image at a time, so that the pixels
of an image do not depend on its group.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from pipeline.data.images import to_uint8
from pipeline.device import send
from pipeline.samplers.config import OFFLINE, SamplingConfig
from pipeline.samplers.langevin import count_evaluations, langevin
from pipeline.samplers.model import Model, make_plan
from pipeline.samplers.plan import GUIDANCE
from pipeline.samplers.probability_flow import probability_flow
from pipeline.seeding import key, normal
from pipeline.serving.config import EXACT_ROWS, Mode
from pipeline.serving.engine import Engine, ImageRequest, check_request


class Drawn(NamedTuple):
    pixels: np.ndarray
    """(N, H, W, C) uint8."""
    evaluations: np.ndarray
    """Rows of network calls that each image took, (N,) int64: a guided evaluation counts twice."""


def draw(
    model: Model,
    requests: Sequence[ImageRequest],
    mode: Mode = "exact",
    rows: int = EXACT_ROWS,
    device: torch.device | None = None,
) -> Drawn:
    """The images of `requests`, in order, whatever their samplers.

    Args:
        mode, rows, device: of the engine.

    Raises:
        RequestError: the model cannot draw one of them.
        UserError: the tolerances of `ode` cannot be met.
    """
    engine = Engine(model, mode, rows, device)
    groups: dict[SamplingConfig | None, list[int]] = {}
    for i, request in enumerate(requests):
        check_request(model.spec, request)
        offline = request.sampling.sampler in OFFLINE
        groups.setdefault(request.sampling if offline else None, []).append(i)
    _, height, width = model.spec.image_shape
    pixels = np.empty((len(requests), height, width, model.spec.channels), np.uint8)
    evaluations = np.empty(len(requests), np.int64)
    for sampling, positions in groups.items():
        size = len(positions) if sampling is None else rows // (2 if sampling.guidance else 1)
        for first in range(0, len(positions), size):
            chunk = positions[first : first + size]
            chosen = [requests[i] for i in chunk]
            drawn = _by_plan(engine, chosen) if sampling is None else _offline(engine, chosen)
            pixels[chunk], evaluations[chunk] = drawn
    return Drawn(pixels, evaluations)


def _by_plan(engine: Engine, requests: list[ImageRequest]) -> Drawn:
    tables = [make_plan(engine.model, request.sampling).table for request in requests]
    evaluations = [int((1 + (table[:, GUIDANCE] != 0).long()).sum()) for table in tables]
    return Drawn(engine.draw(requests), np.array(evaluations))


def _offline(engine: Engine, requests: list[ImageRequest]) -> Drawn:
    """Images of one sampling config, as many as a network call takes."""
    model, sampling = engine.model, requests[0].sampling
    device = engine.device
    labels = send(torch.tensor([engine.label_of(request.label) for request in requests]), device)

    def predict(x: Tensor, rows: Tensor) -> tuple[Tensor, Tensor | None]:
        return engine.x_0(labels, x.float(), send(rows, device), rows)

    def noise(what: str, *counters: int) -> Tensor:
        keys = [key(request.seed, what, request.index, *counters) for request in requests]
        return send(normal(keys, model.spec.image_shape), device)

    x_T = noise("sample", 0)
    if sampling.sampler == "ode":
        solution = probability_flow(model.schedule, predict, x_T.double(), sampling)
        # with a guidance interval this counts the evaluations outside of it twice, too
        rows_each = 2 if sampling.guidance else 1
        return Drawn(to_uint8(solution.x), rows_each * solution.evaluations.numpy())
    plan = make_plan(model, sampling)
    x = langevin(model.schedule, plan, predict, x_T, noise, sampling)
    evaluations = np.full(len(requests), count_evaluations(plan, sampling))
    return Drawn(to_uint8(x), evaluations)
