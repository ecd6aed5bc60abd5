"""The network as a graph of torch.export and of ONNX, against the network itself."""

import io
import re
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from pipeline.errors import UserError
from pipeline.exchange.graphs import to_onnx, to_torch_export, trace
from pipeline.networks.monotone import ScheduledNetwork
from pipeline.samplers.model import ModelSpec, build_model
from tests import needs

SMALL = {"base_channels": 8, "channel_multipliers": [1, 2], "blocks_per_level": 1}
SPECS: dict[str, dict[str, Any]] = {
    "unet": {
        "network": {**SMALL, "attention_at": [4], "halving_padding": "after", "dropout": 0.5},
        "class_names": ["a", "b"],
    },
    "unet-of-blocks": {
        "network": {**SMALL, "resample": "block", "conditioning": "add", "head_channels": 4},
        "diffusion": {"schedule": "learned", "variance": "learned_range"},
    },
    "dit": {
        "network": {"kind": "dit", "patch_size": 4, "width": 8, "depth": 1, "heads": 2}
        | {"dropout": 0.5},
        "class_names": ["a", "b"],
    },
}


class Traced(NamedTuple):
    spec: ModelSpec
    network: nn.Module
    program: ExportedProgram


@pytest.fixture(scope="module")
def traced(request: pytest.FixtureRequest) -> Traced:
    """A network with weights at random."""
    values = {"diffusion": {}, "channels": 3, "image_size": 8} | SPECS[request.param]
    spec = ModelSpec.model_validate(values)
    torch.manual_seed(0)
    network = spec.make_network()
    for parameter in network.parameters():
        nn.init.normal_(parameter, 0.1, 0.2)
    weights = network.state_dict()
    model = build_model(spec, weights, "").network
    inner = model.network if isinstance(model, ScheduledNetwork) else model
    return Traced(spec, inner, trace(spec, weights))


def assert_same_function(
    traced: Traced, run: Callable[[dict[str, Tensor]], Tensor], tolerance: float
) -> None:
    """For batches of one row, of the two that were traced, and of more."""
    for rows in (1, 2, 7):
        inputs = {"x_t": torch.randn(rows, *traced.spec.image_shape), "t": torch.rand(rows) * 999}
        if num_classes := traced.spec.num_classes:
            inputs["label"] = torch.arange(rows) % (num_classes + 1)
        want = traced.network(**inputs)
        assert want.std() > 0.1
        atol = tolerance * float(want.abs().max())
        torch.testing.assert_close(run(inputs), want, rtol=0, atol=atol)


@pytest.mark.parametrize("traced", SPECS, indirect=True)
def test_a_graph_of_torch_export_is_the_network(traced: Traced) -> None:
    files = to_torch_export(traced.spec, traced.program)
    assert list(files) == ["network.pt2"]
    extra = {"spec.json": ""}
    program = torch.export.load(io.BytesIO(files["network.pt2"]), extra_files=extra)
    assert_same_function(traced, lambda inputs: program.module()(**inputs), 1e-6)
    assert ModelSpec.model_validate_json(extra["spec.json"]) == traced.spec
    calls = {str(node.target) for node in program.graph.nodes}
    assert "aten.linear.default" in calls
    assert not [name for name in calls if re.search("dropout|rand|bernoulli", name)]


@pytest.mark.parametrize("traced", ["unet", "dit"], indirect=True)
def test_a_graph_of_onnx_is_the_network(traced: Traced) -> None:
    onnx = needs.package("onnx", "onnx")
    onnxruntime = needs.package("onnxruntime", "onnx")
    files = to_onnx(traced.spec, traced.program)
    assert list(files) == ["network.onnx"]
    session = onnxruntime.InferenceSession(files["network.onnx"])

    def run(inputs: dict[str, Tensor]) -> Tensor:
        arrays = {name: tensor.numpy() for name, tensor in inputs.items()}
        return torch.from_numpy(session.run(["output"], arrays)[0])

    assert_same_function(traced, run, 1e-5)
    metadata = session.get_modelmeta().custom_metadata_map
    assert ModelSpec.model_validate_json(metadata["spec.json"]) == traced.spec
    calls = {node.op_type for node in onnx.load_from_string(files["network.onnx"]).graph.node}
    assert "Conv" in calls
    assert not [name for name in calls if re.search("Dropout|Random|Bernoulli", name)]


@pytest.mark.parametrize("traced", ["dit"], indirect=True)
def test_a_graph_does_not_name_the_files_of_the_machine_that_made_it(traced: Traced) -> None:
    data = to_torch_export(traced.spec, traced.program)["network.pt2"]
    assert b"aten.linear" in data
    assert not re.search(rb"\w+\.py\b", data)


@pytest.mark.parametrize("traced", ["dit"], indirect=True)
def test_what_onnx_needs_is_said_where_it_is_not_installed(
    traced: Traced, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    with pytest.raises(UserError, match=r"onnxscript, which are not installed: pip install 'ray-"):
        to_onnx(traced.spec, traced.program)
