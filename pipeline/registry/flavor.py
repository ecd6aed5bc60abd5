"""The MLflow pyfunc flavour: `mlflow.pyfunc.load_model("models:/digits@champion").predict(...)`.

MLflow finds this module by its name in MLmodel and calls `_load_pyfunc`; nothing is unpickled.
"""

from typing import Any

import numpy as np
from pydantic import ValidationError

from pipeline.errors import RequestError
from pipeline.registry.models import load_model
from pipeline.samplers.model import Model
from pipeline.samplers.plan import SamplingConfig
from pipeline.serving.engine import Engine, ImageRequest

COLUMNS = {"n", "seed", "label", "sampler", "steps", "guidance", "eta"}


class Sampler:
    """What `mlflow.pyfunc` wraps."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> np.ndarray:
        """Images (N, H, W, C) uint8 of one or more requests, one after the other.

        Args:
            model_input: a dict, or a DataFrame with a request a row, of n (default 1), seed (0),
                label, sampler (ddim), steps (50), guidance (0) and eta (0).

        Raises:
            RequestError: an unknown name, or a value out of range.
        """
        requests = (
            [model_input] if isinstance(model_input, dict) else model_input.to_dict("records")
        )
        images = [image for request in requests for image in self._draw(request)]
        return np.stack(images)

    def _draw(self, given: dict[str, Any]) -> list[np.ndarray]:
        if unknown := set(given) - COLUMNS:
            raise RequestError(f"{min(unknown)!r} is not one of {', '.join(sorted(COLUMNS))}", None)
        plain = {name: _plain(value) for name, value in given.items()}
        values = {name: value for name, value in plain.items() if value is not None}
        n, seed, label = values.pop("n", 1), values.pop("seed", 0), values.pop("label", None)
        if n < 1:
            raise RequestError(f"n={n} must be 1 or more", "n")
        try:
            sampling = SamplingConfig.model_validate(values)
        except ValidationError as error:
            problem = error.errors()[0]
            param = str(problem["loc"][0]) if problem["loc"] else None
            raise RequestError(f"{param}: {problem['msg']}", param) from error
        images: list[np.ndarray] = [np.empty(0)] * n
        requests = [ImageRequest(seed, i, label, sampling) for i in range(n)]
        for i, pixels in Engine(self.model).generate(requests):
            images[i] = pixels
        return images


def _plain(value: Any) -> Any:
    """A cell of a DataFrame or a dict as a Python value; NaN is a missing one."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and np.isnan(value):
        return None
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _load_pyfunc(path: str) -> Sampler:
    return Sampler(load_model(path))
