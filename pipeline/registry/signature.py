"""What `predict` of a registered model takes and returns, and MLmodel, which tells MLflow so."""

from typing import Any

import numpy as np
import yaml
from pydantic import Field

from pipeline.samplers.config import SolverSettings
from pipeline.samplers.model import ModelSpec


class PredictRequest(SolverSettings, frozen=True, extra="forbid", strict=True):
    """One request of `predict`: the settings of a solver (see its fields), and these."""

    n: int = Field(default=1, ge=1, le=10_000)
    seed: int = Field(default=0, ge=0, lt=2**63)
    label: int | None = None
    steps: int | None = None
    guidance: float = 0.0


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


def with_identity(description: bytes, model_id: str, run_id: str) -> bytes:
    """MLmodel with the logged model and the run that it is of, which `predict`'s users may ask."""
    known = yaml.safe_load(description) | {"model_id": model_id, "run_id": run_id}
    return yaml.safe_dump(known).encode()


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
