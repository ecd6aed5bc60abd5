"""Extractors: the classifier of a run, files of the user's, and what is wrong with them."""

import importlib
import io
import sys
import warnings
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save as save_tensors
from sklearn.datasets import load_sample_images
from torch import Tensor, nn

from pipeline.errors import ConfigError, CorruptArtifact, DataError
from pipeline.evaluation.config import (
    EfficientNetLite0,
    ExtractorConfig,
    InceptionWeights,
    NetworkFile,
)
from pipeline.evaluation.extractor_files import resized
from pipeline.evaluation.extractors import (
    DESCRIPTION,
    WEIGHTS,
    Extractor,
    describe,
    keep_classifier,
    keep_file,
    load_extractor,
)
from pipeline.evaluation.features import Classifier, TrainedClassifier
from pipeline.evaluation.figures import FeatureSet, compare, gather, nearest_in_chunks
from pipeline.evaluation.frechet import fit_gaussian, frechet_distance, moments
from pipeline.evaluation.inception import Inception
from pipeline.evaluation.real_images import features_path, read_features, write_tensors
from pipeline.storage import sha256
from tests import needs

PIXELS = np.random.default_rng(0).integers(0, 256, (300, 8, 8, 1), dtype=np.uint8)


class Means(nn.Module):
    """The mean and the largest value of each channel: (B, 3, S, S) to (B, 6)."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([x.mean((2, 3)), x.amax((2, 3))], 1)


def script(network: nn.Module) -> bytes:
    buffer = io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.jit.save(torch.jit.trace(network, torch.zeros(2, 3, 16, 16)), buffer)  # type: ignore[no-untyped-call]
    return buffer.getvalue()


@pytest.fixture
def file(tmp_path: Path) -> NetworkFile:
    data = script(Means())
    (tmp_path / "means.pt").write_bytes(data)
    return NetworkFile(
        kind="file",
        file=str(tmp_path / "means.pt"),
        sha256=sha256(data),
        name="means",
        image_size=16,
    )


def made(folder: Path, config: ExtractorConfig) -> Extractor:
    """The extractor of a folder after the config's was kept there in place of what was."""
    (folder / DESCRIPTION).unlink(missing_ok=True)
    keep_file(str(folder), config)
    extractor = load_extractor(str(folder))
    assert extractor is not None
    return extractor


def test_a_classifier_is_found_again_under_the_name_of_its_run(tmp_path: Path) -> None:
    torch.manual_seed(0)
    classifier = TrainedClassifier(Classifier(1, 10).eval(), 0.9, 5)
    assert load_extractor(str(tmp_path)) is None
    assert describe(str(tmp_path)) == {}
    keep_classifier(str(tmp_path), "digits", classifier)
    extractor = load_extractor(str(tmp_path))
    assert extractor is not None
    assert describe(str(tmp_path)) == {"name": "cnn_digits", "digest": extractor.digest}
    features, log_probs = extractor(PIXELS)
    assert log_probs is not None
    assert features.shape == (300, 128)
    x = torch.from_numpy(PIXELS).permute(0, 3, 1, 2) / 127.5 - 1
    one_by_one = torch.cat([classifier.network(x[i : i + 1]) for i in (0, 255, 256, 299)])
    few = log_probs[[0, 255, 256, 299]]
    torch.testing.assert_close(few, one_by_one.log_softmax(1), rtol=1e-5, atol=1e-6)
    assert not torch.equal(features[0], features[1])
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(300))


def test_a_script_of_the_users_sees_three_channels_in_its_range(
    tmp_path: Path, file: NetworkFile
) -> None:
    extractor = made(tmp_path, file)
    assert (extractor.name, extractor.digest) == ("means", file.sha256)
    black_and_white = np.zeros((2, 8, 8, 1), np.uint8)
    black_and_white[1] = 255
    features, log_probs = extractor(black_and_white)
    assert log_probs is None
    torch.testing.assert_close(features, torch.tensor([[-1.0] * 6, [1.0] * 6]))
    other = made(tmp_path, file.model_copy(update={"value_range": (0.0, 1.0)}))
    torch.testing.assert_close(
        other(black_and_white).features, torch.tensor([[0.0] * 6, [1.0] * 6])
    )


def test_a_file_is_kept_whole_so_that_it_may_go(tmp_path: Path, file: NetworkFile) -> None:
    found = made(tmp_path, file)(PIXELS).features
    Path(file.file).unlink()
    keep_file(str(tmp_path), file)  # as a run does that goes on
    again = load_extractor(str(tmp_path))
    assert again is not None
    assert torch.equal(again(PIXELS).features, found)
    (tmp_path / WEIGHTS).write_bytes(b"damaged")
    with pytest.raises(CorruptArtifact, match="is damaged: delete its folder"):
        load_extractor(str(tmp_path))


def test_an_onnx_model_of_the_users_finds_the_same(tmp_path: Path, file: NetworkFile) -> None:
    onnx = needs.package("onnx", "onnx")
    needs.package("onnxruntime", "onnx")
    node, tensor = onnx.helper.make_node, onnx.helper.make_tensor_value_info
    graph = onnx.helper.make_graph(
        [
            node("GlobalAveragePool", ["x"], ["mean"]),
            node("GlobalMaxPool", ["x"], ["largest"]),
            node("Concat", ["mean", "largest"], ["both"], axis=1),
            node("Flatten", ["both"], ["features"]),
        ],
        "means",
        [tensor("x", onnx.TensorProto.FLOAT, ["n", 3, 16, 16])],
        [tensor("features", onnx.TensorProto.FLOAT, ["n", 6])],
    )
    opset = [onnx.helper.make_opsetid("", 18)]
    data = onnx.helper.make_model(graph, opset_imports=opset, ir_version=10).SerializeToString()
    (tmp_path / "means.onnx").write_bytes(data)
    same = {"file": str(tmp_path / "means.onnx"), "sha256": sha256(data)}
    by_script = made(tmp_path, file)(PIXELS).features
    by_onnx = made(tmp_path, file.model_copy(update=same))(PIXELS).features
    torch.testing.assert_close(by_script, by_onnx)
    (tmp_path / "no.onnx").write_bytes(b"no")
    no = {"file": f"{tmp_path}/no.onnx", "sha256": sha256(b"no")}
    with pytest.raises(ConfigError, match="no.onnx' is not an ONNX model"):
        made(tmp_path, file.model_copy(update=no))


def test_images_are_resized_by_channel_with_antialiasing_and_are_not_rounded() -> None:
    stripes = np.zeros((1, 64, 64, 3), np.uint8)
    stripes[:, :, ::2, 0] = 255
    stripes[..., 1] = np.arange(64)
    small = resized(stripes, 16)
    assert small.shape == (1, 3, 16, 16)
    np.testing.assert_allclose(small[0, 0, :, 2:-2], 127.5, atol=8)  # else all or nothing
    assert (small[0, 1] % 1 != 0).any()
    assert (small[0, 2] == 0).all()
    want = Image.fromarray(stripes[0, ..., 1].astype(np.float32)).resize((16, 16), Image.BICUBIC)
    np.testing.assert_array_equal(small[0, 1], np.asarray(want))
    same = resized(PIXELS[:3], 8)
    np.testing.assert_array_equal(same, np.repeat(PIXELS[:3].transpose(0, 3, 1, 2), 3, 1))


def test_what_is_wrong_with_a_file_is_one_sentence(tmp_path: Path, file: NetworkFile) -> None:
    def found(**other: str) -> Tensor:
        return made(tmp_path, file.model_copy(update=other))(PIXELS).features

    with pytest.raises(ConfigError, match="nothing.pt' does not exist"):
        found(file=str(tmp_path / "nothing.pt"))
    with pytest.raises(ConfigError, match="has the sha256 .*, not the one in evaluation.extractor"):
        found(sha256="0" * 64)
    (tmp_path / "no.pt").write_bytes(b"no")
    with pytest.raises(ConfigError, match="is not TorchScript: save it with torch.jit"):
        found(file=str(tmp_path / "no.pt"), sha256=sha256(b"no"))
    assert not (tmp_path / DESCRIPTION).exists()
    flat = script(nn.Flatten(0))
    (tmp_path / "flat.pt").write_bytes(flat)
    with pytest.raises(DataError, match=r"'means' .* makes \(24576,\) of .* must make \(N, D\)"):
        found(file=str(tmp_path / "flat.pt"), sha256=sha256(flat))


# --- networks that are known --------------------------------------------------------------------


def fidelity(monkeypatch: pytest.MonkeyPatch) -> Any:
    """torch-fidelity's Inception; the rest of that package needs torchvision."""
    if not (needs.ORACLES / "torch_fidelity").is_dir():
        needs.FIDELITY.skip()
    package = ModuleType("torch_fidelity")
    package.__path__ = [str(needs.ORACLES / "torch_fidelity")]
    monkeypatch.setitem(sys.modules, "torch_fidelity", package)
    module = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
    for name in list(sys.modules):
        if name.startswith("torch_fidelity."):
            monkeypatch.delitem(sys.modules, name)
    return module.FeatureExtractorInceptionV3


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    """Of an Inception that was never trained, whose normalisations suit images."""
    torch.manual_seed(0)
    network = Inception()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
    with torch.no_grad():
        network.train()(torch.randn(8, 3, 299, 299))
    return network.state_dict()


def inception(folder: Path, weights: dict[str, Tensor]) -> InceptionWeights:
    data = save_tensors(weights)
    (folder / "weights.safetensors").write_bytes(data)
    return InceptionWeights(
        kind="inception", file=str(folder / "weights.safetensors"), sha256=sha256(data)
    )


def test_inception_is_torch_fidelitys(
    tmp_path: Path, weights: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save(weights, tmp_path / "weights.pth")
    names = ["2048", "logits_unbiased"]
    oracle = fidelity(monkeypatch)("", names, str(tmp_path / "weights.pth"))
    pixels = np.random.default_rng(1).integers(0, 256, (3, 299, 299, 3), dtype=np.uint8)
    features, logits = oracle(torch.from_numpy(pixels).permute(0, 3, 1, 2))
    extractor = made(tmp_path, inception(tmp_path, weights))
    found = extractor(pixels)
    assert extractor.name == "inception"
    assert found.features.std(0).mean() > 1e-3, "else the images make no difference"
    torch.testing.assert_close(found.features, features, rtol=1e-4, atol=1e-5)
    assert found.log_probs is not None
    torch.testing.assert_close(found.log_probs, logits.log_softmax(1), rtol=1e-4, atol=1e-4)


def test_other_weights_than_inceptions_are_refused(
    tmp_path: Path, weights: dict[str, Tensor]
) -> None:
    name = "Mixed_7c.branch_pool.conv.weight"
    other = {**weights, name: weights[name][:, :100].clone()}
    with pytest.raises(ConfigError, match=rf"{name}, of shape .*, has the shape \(192, 100, 1, 1"):
        made(tmp_path, inception(tmp_path, other))
    fewer = {name: weights[name] for name in weights if not name.startswith("fc.")}
    with pytest.raises(ConfigError, match=r"fc.weight, of shape \(1008, 2048\), is missing"):
        made(tmp_path, inception(tmp_path, fewer))
    uncounted = {name: weights[name] for name in weights if "num_batches" not in name}
    made(tmp_path, inception(tmp_path, uncounted | {"AuxLogits.fc.bias": torch.zeros(3)}))
    with pytest.raises(ValueError, match="must end in .safetensors: no pickle is read here"):
        InceptionWeights(kind="inception", file="weights.pth", sha256="0" * 64)


def test_efficientnet_knows_photographs(tmp_path: Path) -> None:
    needs.package("efficientnet_lite_pytorch", "efficientnet")
    extractor = made(tmp_path, EfficientNetLite0(kind="efficientnet_lite0"))
    (china, flower) = load_sample_images().images
    for image, classes in ((china, {698, 832, 663}), (flower, {985})):
        features, log_probs = extractor(image[None, :, 107:534])
        assert features.shape == (1, 1280)
        assert log_probs is not None
        assert int(log_probs.argmax()) in classes


# --- figures ------------------------------------------------------------------------------------


def normal(n: int, dim: int, seed: int, shift: float = 0.0) -> Tensor:
    return torch.randn(n, dim, generator=torch.Generator().manual_seed(seed)) + shift


def test_figures_are_named_after_the_extractor_and_only_inceptions_are_called_fid() -> None:
    real = gather([normal(500, 4, 0)])
    samples = FeatureSet(moments(normal(400, 4, 1, 0.5)), normal(400, 4, 1, 0.5), None)
    figures, skipped = compare("cnn_digits", samples, real)
    assert set(figures) == {
        f"{short}_cnn_digits"
        for short in ("fd", "kd", "precision", "recall", "density", "coverage")
    }
    assert skipped == {}
    want = frechet_distance(fit_gaussian(normal(400, 4, 1, 0.5)), fit_gaussian(normal(500, 4, 0)))
    assert figures["fd_cnn_digits"]["value"] == pytest.approx(want)
    assert figures["fd_cnn_digits"]["n"] == 400
    low, high = figures["fd_cnn_digits"]["interval"]
    assert low < 1 < high, "of half a deviation in each of four dimensions"
    assert {"fid", "kid"} <= set(compare("inception", samples, real)[0])


def test_what_too_few_samples_cannot_tell_is_missing_and_says_why() -> None:
    figures, skipped = compare("x", gather([normal(5, 8, 0)]), gather([normal(500, 8, 1)]))
    assert set(figures) == {"kd_x"}
    assert "needs at least 9 images a set, here are 5" in skipped["fd_x"]
    assert "need at least 6 images a set" in skipped["precision_x"]


def test_features_are_gathered_without_being_held(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.evaluation.figures.MOST_KEPT", 70)
    whole = normal(200, 6, 0)
    got = gather(torch.split(whole, 30))
    assert torch.equal(got.some, whole[:70])
    assert got.moments.n == 200
    torch.testing.assert_close(got.moments.scatter, moments(whole).scatter)
    chosen = gather(torch.split(whole, 100), keep=lambda number: torch.tensor([number, 50]))
    assert torch.equal(chosen.some, whole[[0, 50, 101, 150]])


def test_the_nearest_of_chunks_is_the_nearest_of_all() -> None:
    x, y = normal(20, 5, 0), normal(300, 5, 1)
    distances, rows = nearest_in_chunks(x, torch.split(y, 77))
    apart = torch.cdist(x.double(), y.double())
    assert torch.equal(rows, apart.argmin(1))
    torch.testing.assert_close(distances, apart.min(1).values.square())


def test_files_of_features_are_read_in_the_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (100_000, 99_999, 7):
        features = {"features": torch.full((1, 1), float(number))}
        write_tensors(f"{tmp_path}/{features_path('train', number)}", features)
    assert [float(chunk) for chunk in read_features(str(tmp_path), "train")] == [7, 99_999, 100_000]
