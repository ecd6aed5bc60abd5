"""The MLflow pyfunc flavour: `mlflow.pyfunc.load_model("models:/digits@champion").predict(...)`.

MLflow finds this module by its name in MLmodel and calls `_load_pyfunc`; nothing is unpickled.
Over HTTP: `mlflow models serve -m models:/digits@champion --env-manager local`, with this
environment's programs on the PATH; then POST `{"inputs": [{"n": 4, "seed": 1}]}` to `/invocations`.
"""

from typing import Any

import numpy as np
from pydantic import ValidationError
from safetensors.torch import load as load_tensors

from pipeline.errors import RequestError
from pipeline.registry.folder import model_digest, read_folder
from pipeline.registry.signature import PredictRequest
from pipeline.samplers.config import SamplingConfig, SolverSettings
from pipeline.samplers.model import Model, build_model
from pipeline.sentences import first_mistake
from pipeline.serving.engine import ImageRequest
from pipeline.serving.offline import draw


class Sampler:
    """What `mlflow.pyfunc` wraps."""

    def __init__(self, model: Model) -> None:
        self.model = model

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> np.ndarray:
        """Images (N, H, W, C) uint8 of one or more requests, one after the other.

        Args:
            model_input: a dict, a list of them, or a DataFrame with a request a row, of n (default
                1), seed (0), label, steps (50), guidance (0), and the settings of SolverSettings
                (sampler, spacing, order, eta, ...).

        Raises:
            RequestError: an unknown name, or a value of the wrong type or out of range.
        """
        if isinstance(model_input, dict):
            requests = [model_input]
        elif hasattr(model_input, "to_dict"):
            requests = model_input.to_dict("records")
        else:
            requests = model_input
        if not isinstance(requests, list) or not all(isinstance(each, dict) for each in requests):
            raise RequestError(
                "predict takes a dict, a list of dicts or a DataFrame of n, seed, label, ..."
            )
        if not requests:
            raise RequestError("predict takes at least one request, and was given none")
        return np.concatenate([self._draw(request) for request in requests])

    def _draw(self, given: dict[str, Any]) -> np.ndarray:
        plain = {name: _plain(value) for name, value in given.items()}
        try:
            request = PredictRequest.model_validate(
                {name: value for name, value in plain.items() if value is not None}
            )
            sampling = SamplingConfig(
                **request.model_dump(include=set(SolverSettings.model_fields)),
                steps=self.model.spec.default_steps if request.steps is None else request.steps,
                guidance=request.guidance,
            )
        except ValidationError as error:
            mistake = first_mistake(error)
            name = mistake.loc[0] if mistake.loc else None
            if mistake.kind == "extra_forbidden":
                known = ", ".join(PredictRequest.model_fields)
                raise RequestError(f"{name!r} is not one of {known}", name) from error
            raise RequestError(str(mistake), name) from error
        requests = [
            ImageRequest(request.seed, i, request.label, sampling) for i in range(request.n)
        ]
        return draw(self.model, requests).pixels


def _plain(value: Any) -> Any:
    """A cell of a DataFrame or a dict as a Python value; NaN is a missing one."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and np.isnan(value):
        return None
    # a column of integers with a gap in it is one of floats
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _load_pyfunc(path: str) -> Sampler:
    spec, weights = read_folder(path)
    return Sampler(build_model(spec, load_tensors(weights), model_digest(spec, weights)))
