"""The network of a model as a graph, to run without this project: `torch.export` and ONNX.

    x_t     (B, C, H, W) float32, for any B
    t       (B,) float32
    label   (B,) int64, num_classes for the null label; of conditional models alone
    output  (B, C, H, W) float32; (B, 2C, H, W) where the variance is learned

What the output stands for, and of what schedule, is in the model's spec, which both files carry as
JSON. With diffusion.prediction=edm or diffusion.schedule=learned, x_t and t are what
`network_input` of pipeline/diffusion/parameterisation.py makes of them. There is no dropout.
"""

import importlib
import io
import logging
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor
from torch.export import Dim, ExportedProgram

from pipeline.errors import UserError
from pipeline.networks.monotone import ScheduledNetwork
from pipeline.samplers.model import ModelSpec, build_model

PT2, ONNX = "network.pt2", "network.onnx"
SPEC = "spec.json"
"""Name of the spec among the extra files of a .pt2 and in the metadata of an ONNX model."""


def trace(spec: ModelSpec, weights: dict[str, Tensor]) -> ExportedProgram:
    """The network as a graph, for a batch of any size."""
    network = build_model(spec, weights, "").network
    if isinstance(network, ScheduledNetwork):
        network = network.network
    # two rows: with one, the batch would count as a constant
    inputs = {"x_t": torch.zeros(2, *spec.image_shape), "t": torch.zeros(2)}
    if spec.num_classes:
        inputs["label"] = torch.zeros(2, dtype=torch.long)
    batch = Dim("batch", min=1)
    program = torch.export.export(
        network, (), kwargs=inputs, dynamic_shapes={name: {0: batch} for name in inputs}
    )
    for node in program.graph.nodes:  # it names the files of this machine
        node.meta.pop("stack_trace", None)
    return program


def to_torch_export(spec: ModelSpec, program: ExportedProgram) -> dict[str, bytes]:
    """`network.pt2`, for `torch.export.load`, of a traced network."""
    file = io.BytesIO()
    torch.export.save(program, file, extra_files={SPEC: spec.model_dump_json()})
    return {PT2: file.getvalue()}


def to_onnx(spec: ModelSpec, program: ExportedProgram) -> dict[str, bytes]:
    """`network.onnx` of a traced network; above 2 GB its weights are in a file beside it.

    Raises:
        UserError: the packages that write ONNX are not installed.
    """
    try:
        importlib.import_module("onnx")
        importlib.import_module("onnxscript")
    except ImportError as error:
        raise UserError(
            "ONNX is written by the packages onnx and onnxscript, which are not installed: "
            "pip install 'ray-ddpm[onnx]'"
        ) from error
    with _quiet_exporter():
        onnx = torch.onnx.export(program, dynamo=True, output_names=["output"], verbose=False)
    assert onnx is not None
    onnx.model.metadata_props[SPEC] = spec.model_dump_json()
    with tempfile.TemporaryDirectory() as folder:
        onnx.save(Path(folder, ONNX))
        return {path.name: path.read_bytes() for path in sorted(Path(folder).iterdir())}


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """torch 2.13 warns of its own deprecated names, and of a torchvision that is not there."""
    logger = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)
