"""Extractors: the classifier of a run, files of the user's, and what is wrong with them."""

import io
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from pipeline.errors import ConfigError, DataError
from pipeline.evaluation.extractors import (
    ExtractorConfig,
    describe,
    keep_classifier,
    keep_file,
    load_extractor,
    resized,
)
from pipeline.evaluation.features import Classifier, TrainedClassifier, predict
from pipeline.evaluation.figures import FeatureSet, compare, gather, nearest_in_chunks
from pipeline.evaluation.frechet import fit_gaussian, frechet_distance, moments
from pipeline.storage import sha256

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
def file(tmp_path: Path) -> ExtractorConfig:
    data = script(Means())
    (tmp_path / "means.pt").write_bytes(data)
    return ExtractorConfig(
        file=str(tmp_path / "means.pt"), sha256=sha256(data), name="means", image_size=16
    )


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
    assert torch.equal(log_probs.argmax(1), predict(classifier.network, x))
    torch.testing.assert_close(log_probs.exp().sum(1), torch.ones(300))


def test_a_script_of_the_users_sees_three_channels_in_its_range(
    tmp_path: Path, file: ExtractorConfig
) -> None:
    keep_file(str(tmp_path), file)
    extractor = load_extractor(str(tmp_path))
    assert extractor is not None
    assert (extractor.name, extractor.digest) == ("means", file.sha256)
    black_and_white = np.zeros((2, 8, 8, 1), np.uint8)
    black_and_white[1] = 255
    features, log_probs = extractor(black_and_white)
    assert log_probs is None
    torch.testing.assert_close(features, torch.tensor([[-1.0] * 6, [1.0] * 6]))
    keep_file(str(tmp_path), file.model_copy(update={"value_range": (0.0, 1.0)}))
    other = load_extractor(str(tmp_path))
    assert other is not None
    torch.testing.assert_close(
        other(black_and_white).features, torch.tensor([[0.0] * 6, [1.0] * 6])
    )


def test_an_onnx_model_of_the_users_finds_the_same(tmp_path: Path, file: ExtractorConfig) -> None:
    onnx = pytest.importorskip("onnx", reason="pip install -e '.[onnx]'")
    pytest.importorskip("onnxruntime", reason="pip install -e '.[onnx]'")
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
    found = []
    for config in (file, file.model_copy(update=same)):
        keep_file(str(tmp_path), config)
        extractor = load_extractor(str(tmp_path))
        assert extractor is not None
        found.append(extractor(PIXELS).features)
    torch.testing.assert_close(found[0], found[1])
    (tmp_path / "no.onnx").write_bytes(b"no")
    keep_file(
        str(tmp_path),
        file.model_copy(update={"file": f"{tmp_path}/no.onnx", "sha256": sha256(b"no")}),
    )
    with pytest.raises(ConfigError, match="no.onnx' is not an ONNX model"):
        load_extractor(str(tmp_path))


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


def test_what_is_wrong_with_a_file_is_one_sentence(tmp_path: Path, file: ExtractorConfig) -> None:
    def load(config: ExtractorConfig) -> None:
        keep_file(str(tmp_path), config)
        extractor = load_extractor(str(tmp_path))
        assert extractor is not None
        extractor(PIXELS)

    with pytest.raises(ConfigError, match="nothing.pt' does not exist"):
        load(file.model_copy(update={"file": str(tmp_path / "nothing.pt")}))
    with pytest.raises(ConfigError, match="has the sha256 .*, not the one in evaluation.extractor"):
        load(file.model_copy(update={"sha256": "0" * 64}))
    (tmp_path / "no.pt").write_bytes(b"no")
    no = {"file": str(tmp_path / "no.pt"), "sha256": sha256(b"no")}
    with pytest.raises(ConfigError, match="is not TorchScript: save it with torch.jit"):
        load(file.model_copy(update=no))
    flat = script(nn.Flatten(0))
    (tmp_path / "flat.pt").write_bytes(flat)
    wrong = {"file": str(tmp_path / "flat.pt"), "sha256": sha256(flat)}
    with pytest.raises(DataError, match=r"makes \(196608,\) of .* it must make \(N, D\)"):
        load(file.model_copy(update=wrong))


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
