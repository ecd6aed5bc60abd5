"""The MLflow pyfunc flavour: `mlflow.pyfunc.load_model("models:/digits@champion").predict(...)`.

MLflow finds this module by its name in MLmodel and calls `_load_pyfunc`; nothing is unpickled.
Over HTTP: `mlflow models serve -m models:/digits@champion --env-manager local`, with this
environment's programs on the PATH; then POST `{"inputs": [{"n": 4, "seed": 1}]}` to `/invocations`.
"""

from typing import Any

import numpy as np
import yaml
from pydantic import Field, ValidationError

from pipeline.errors import RequestError
from pipeline.registry.models import load_model
from pipeline.samplers.config import SamplingConfig, SolverSettings
from pipeline.samplers.model import Model, ModelSpec
from pipeline.serving.engine import ImageRequest
from pipeline.serving.offline import draw


class PredictRequest(SolverSettings, frozen=True, extra="forbid", strict=True):
    """One request of `predict`: the settings of a solver (see its fields), and these."""

    n: int = Field(default=1, ge=1, le=10_000)
    seed: int = Field(default=0, ge=0, lt=2**63)
    label: int | None = None
    steps: int | None = None
    guidance: float = 0.0


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
            problem = error.errors()[0]
            name = str(problem["loc"][0]) if problem["loc"] else None
            if problem["type"] == "extra_forbidden":
                known = ", ".join(PredictRequest.model_fields)
                raise RequestError(f"{name!r} is not one of {known}", name) from error
            message = problem["msg"].removeprefix("Value error, ")
            raise RequestError(f"{name}: {message}" if name else message, name) from error
        requests = [
            ImageRequest(request.seed, i, request.label, sampling) for i in range(request.n)
        ]
        return draw(self.model, requests).pixels


def describe_for_mlflow(spec: ModelSpec) -> str:
    """MLmodel: the loader module, and the signature, which MLflow shows and does not enforce.

    It is marked as one from a type hint, as which MLflow hands the requests over as they are. It
    would drop unknown names with no more than a line in a log, and refuse a whole number for a
    float; PredictRequest takes the one and refuses the other.
    """
    import mlflow.pyfunc
    from mlflow.models import Model as MlflowModel
    from mlflow.models import ModelSignature
    from mlflow.types import ColSpec, Schema, TensorSpec
    from mlflow.types.schema import Object, Property

    fields = PredictRequest.model_json_schema()["properties"]
    properties = [
        Property(name, _type_for_mlflow(field), required=False) for name, field in fields.items()
    ]
    channels, height, width = spec.image_shape
    model = MlflowModel(
        signature=ModelSignature(
            inputs=Schema([ColSpec(Object(properties))]),
            outputs=Schema([TensorSpec(np.dtype(np.uint8), (-1, height, width, channels))]),
        )
    )
    mlflow.pyfunc.add_to_model(model, loader_module="pipeline.registry.flavor", data=".")
    return yaml.safe_dump({**model.to_dict(), "is_signature_from_type_hint": True})


def _type_for_mlflow(field: dict[str, Any]) -> Any:
    """MLflow's type of a field of a JSON schema; None is what a field that is left out has."""
    from mlflow.types import DataType
    from mlflow.types.schema import Array

    kind = next(part["type"] for part in (field, *field.get("anyOf", [])) if "type" in part)
    types = {
        "integer": DataType.long,
        "number": DataType.double,
        "string": DataType.string,
        "boolean": DataType.boolean,
        "array": Array(DataType.double),
    }
    return types[kind]


def _plain(value: Any) -> Any:
    """A cell of a DataFrame or a dict as a Python value; NaN is a missing one."""
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and np.isnan(value):
        return None
    # a column of integers with a gap in it is one of floats
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _load_pyfunc(path: str) -> Sampler:
    return Sampler(load_model(path))
