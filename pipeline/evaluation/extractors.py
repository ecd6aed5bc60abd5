"""Feature extractors: what turns images into the vectors that figures of merit compare.

By default it is the classifier of features.py, trained on the images at hand, as published practice
has it for small grey images; its figures are named after the run and compare with no others. A file
of the user's takes its place: a network in TorchScript or ONNX, known by its hash, such as
Inception in the form the FID is defined on. It is read from where the config says, and from nowhere
else.
"""

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, NamedTuple

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, Field, field_validator
from torch import Tensor

from pipeline import storage
from pipeline.data.images import to_unit
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation.features import TrainedClassifier, from_files, to_files

INCEPTION = "inception"
"""An extractor of this name makes figures that are called FID, KID and inception score."""
DESCRIPTION = "extractor.json"
CLASSIFIER = ("classifier.safetensors", "classifier.json")
IMAGES_AT_ONCE = 256


class ExtractorConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """A network in a file, from images (B, 3, S, S) float32 to features (B, D)."""

    file: str = Field(min_length=1)
    """TorchScript (.pt) or ONNX (.onnx), as a path or fsspec URI."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Of the file: another one is refused."""
    name: str = Field(pattern=r"^[a-z0-9_]+$", max_length=40)
    """Figures are named after it, as in fd_NAME; `inception` makes them FID, KID, ..."""
    image_size: int = Field(ge=8, le=1024)
    """S, to which images are brought by Pillow's bicubic filter (Parmar et al. 2022)."""
    value_range: Annotated[tuple[float, float], Field(strict=False)] = (-1.0, 1.0)
    """What black and white are to the network."""

    @field_validator("file")
    @classmethod
    def _is_of_a_known_kind(cls, file: str) -> str:
        if not file.lower().endswith((".pt", ".onnx")):
            raise ValueError(f"{file!r} must end in .pt (TorchScript) or .onnx")
        return file


class Found(NamedTuple):
    """What an extractor finds in images."""

    features: Tensor
    """(N, D) float32"""
    log_probs: Tensor | None
    """(N, classes) float32, if it is a classifier."""


@dataclass(frozen=True)
class Extractor:
    """A network that finds features in uint8 images (N, H, W, C)."""

    name: str
    digest: str
    find: Callable[[np.ndarray], Found]
    """Of at most IMAGES_AT_ONCE images."""

    def __call__(self, pixels: np.ndarray) -> Found:
        parts = [
            self.find(pixels[start : start + IMAGES_AT_ONCE])
            for start in range(0, len(pixels), IMAGES_AT_ONCE)
        ]
        log_probs = [part.log_probs for part in parts if part.log_probs is not None]
        return Found(
            torch.cat([part.features for part in parts]),
            torch.cat(log_probs) if log_probs else None,
        )


def keep_classifier(folder: str, name: str, classifier: TrainedClassifier) -> None:
    """Keep a classifier as the extractor of a folder, where `load_extractor` finds it."""
    digest = ""
    for file, data in to_files(classifier).items():
        entry = storage.write_bytes(storage.join(folder, file), data)
        digest = digest or entry.sha256  # that of the weights, which come first
    description = {"kind": "classifier", "name": f"cnn_{name}", "digest": digest}
    storage.write_json(storage.join(folder, DESCRIPTION), description)


def keep_file(folder: str, config: ExtractorConfig) -> None:
    """Keep where the user's file is as the extractor of a folder."""
    facts = {"kind": "file", "name": config.name, "digest": config.sha256}
    description = {**facts, "config": config.model_dump(mode="json")}
    storage.write_json(storage.join(folder, DESCRIPTION), description)


def load_extractor(folder: str) -> Extractor | None:
    """The extractor of a folder; None if it has none.

    Raises:
        ConfigError: the user's file is missing, is another one, or is not what its name says.
    """
    try:
        description = storage.read_json(storage.join(folder, DESCRIPTION))
    except FileNotFoundError:
        return None
    if description["kind"] == "classifier":
        find = _find_by(load_classifier(folder))
    else:
        find = _find_by_file(ExtractorConfig.model_validate(description["config"]))
    return Extractor(description["name"], description["digest"], find)


def load_classifier(folder: str) -> TrainedClassifier:
    """The classifier that `keep_classifier` kept."""
    return from_files({name: storage.read_bytes(storage.join(folder, name)) for name in CLASSIFIER})


def _find_by(classifier: TrainedClassifier) -> Callable[[np.ndarray], Found]:
    network = classifier.network

    @torch.inference_mode()
    def find(pixels: np.ndarray) -> Found:
        features = network.features(to_unit(torch.from_numpy(pixels)))
        return Found(features, network.out(features).log_softmax(1))

    return find


# --- files of the user --------------------------------------------------------------------------


def _find_by_file(config: ExtractorConfig) -> Callable[[np.ndarray], Found]:
    try:
        data = storage.read_bytes(config.file)
    except FileNotFoundError as error:
        raise ConfigError(f"evaluation.extractor.file={config.file!r} does not exist") from error
    if (found := storage.sha256(data)) != config.sha256:
        raise ConfigError(
            f"evaluation.extractor.file={config.file!r} has the sha256 {found}, not the one in "
            "evaluation.extractor.sha256: it is another file, or was damaged on its way"
        )
    run = _onnx(config, data) if config.file.lower().endswith(".onnx") else _script(config, data)

    def find(pixels: np.ndarray) -> Found:
        low, high = config.value_range
        images = resized(pixels, config.image_size) * ((high - low) / 255.0) + low
        features = run(images.astype(np.float32))
        if features.ndim != 2 or len(features) != len(pixels):
            raise DataError(
                f"evaluation.extractor.file={config.file!r} makes {tuple(features.shape)} of "
                f"{tuple(images.shape)}: it must make (N, D), a row an image"
            )
        return Found(features.float(), None)

    return find


def resized(pixels: np.ndarray, size: int) -> np.ndarray:
    """uint8 (N, H, W, C) as (N, 3, size, size) float32 of 0 to 255, grey in all three channels.

    Each channel by Pillow's bicubic filter, which keeps out what is too fine for the new size, in
    float32 and not rounded after: the rules of clean-fid (Parmar, Zhang & Zhu 2022, section 4).
    """

    def channel(plane: np.ndarray) -> np.ndarray:
        image = Image.fromarray(plane.astype(np.float32), mode="F")
        small = image.resize((size, size), Image.Resampling.BICUBIC)
        return np.asarray(small).clip(0, 255)

    planes = [[channel(image[..., c]) for c in range(image.shape[-1])] for image in pixels]
    return np.stack([np.stack(of if len(of) == 3 else of * 3) for of in planes])


def _script(config: ExtractorConfig, data: bytes) -> Callable[[np.ndarray], Tensor]:
    try:
        with warnings.catch_warnings():
            # what is published as TorchScript has no other form
            warnings.simplefilter("ignore", DeprecationWarning)
            network = torch.jit.load(io.BytesIO(data), map_location="cpu")  # type: ignore[no-untyped-call]
        network.eval()
    except RuntimeError as error:
        raise ConfigError(
            f"evaluation.extractor.file={config.file!r} is not TorchScript: save it with "
            "torch.jit.script or torch.jit.trace"
        ) from error

    @torch.inference_mode()
    def run(images: np.ndarray) -> Tensor:
        features: Tensor = network(torch.from_numpy(images))
        return features

    return run


def _onnx(config: ExtractorConfig, data: bytes) -> Callable[[np.ndarray], Tensor]:
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigError(
            f"evaluation.extractor.file={config.file!r} needs onnxruntime: pip install onnxruntime"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # it has an exception type a cause
        raise ConfigError(
            f"evaluation.extractor.file={config.file!r} is not an ONNX model: {error}"
        ) from error
    name = session.get_inputs()[0].name

    def run(images: np.ndarray) -> Tensor:
        return torch.from_numpy(session.run(None, {name: images})[0])

    return run


def describe(folder: str) -> dict[str, str]:
    """The name and the digest of a folder's extractor; empty if it has none."""
    try:
        description = storage.read_json(storage.join(folder, DESCRIPTION))
    except FileNotFoundError:
        return {}
    return {name: description[name] for name in ("name", "digest")}
