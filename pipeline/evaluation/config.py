"""How a trained model is measured: the section `evaluation` of a config.

The features that figures compare are by default those of a classifier fitted to the images, else

    evaluation:
      extractor: {file: net.onnx, sha256: "…", name: mine, image_size: 224}   # or TorchScript, .pt
      extractor: {kind: inception, file: inception.safetensors, sha256: "…"}
      extractor: {kind: efficientnet_lite0}
"""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import BaseModel, BeforeValidator, Field, field_validator, model_validator

from pipeline.samplers.config import SamplerName, SamplingConfig

Trace = Literal["hutchinson", "exact"]


class _InFile(BaseModel, frozen=True, extra="forbid", strict=True):
    file: str = Field(min_length=1)
    """Path or fsspec URI of the weights."""
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """SHA-256 of the file; one with another hash is refused."""

    @property
    def digest(self) -> str:
        return self.sha256


class NetworkFile(_InFile, frozen=True):
    """TorchScript (.pt) or ONNX (.onnx), from images (B, 3, S, S) float32 to features (B, D)."""

    kind: Literal["file"]
    """A network in a file, the default."""
    name: str = Field(pattern=r"^[a-z0-9_]+$", max_length=40)
    """What figures are named after, as in fd_NAME; `inception` makes them FID, KID and inception
    score."""
    image_size: int = Field(ge=8, le=1024)
    """S, the side in pixels to which images are resized, by Pillow's bicubic filter (Parmar et al.
    2022)."""
    value_range: Annotated[tuple[float, float], Field(strict=False)] = (-1.0, 1.0)
    """The values of black and white that the network expects."""

    @field_validator("file")
    @classmethod
    def _is_of_a_known_kind(cls, file: str) -> str:
        if not file.lower().endswith((".pt", ".onnx")):
            raise ValueError(f"{file!r} must end in .pt (TorchScript) or .onnx")
        return file


class InceptionWeights(_InFile, frozen=True):
    """safetensors of Inception in the form that the FID is defined on, see inception.py.

    Its weights have the names that pytorch-fid and torch-fidelity give them.
    """

    kind: Literal["inception"]
    """The network that the FID is defined on."""

    name: ClassVar[str] = "inception"
    image_size: ClassVar[int] = 299
    value_range: ClassVar[tuple[float, float]] = (-1.0, 127 / 128)

    @field_validator("file")
    @classmethod
    def _is_safetensors(cls, file: str) -> str:
        if not file.lower().endswith(".safetensors"):
            raise ValueError(
                f"{file!r} must end in .safetensors: no pickle is read here, and configs/README.md "
                "says how to convert one"
            )
        return file


class EfficientNetLite0(BaseModel, frozen=True, extra="forbid", strict=True):
    """EfficientNet-Lite0 with ImageNet weights, out of two packages (`.[efficientnet]`).

    Tan & Le 2019 (arXiv:1905.11946), without squeeze-and-excite and with ReLU6, as Google published
    it in 2020; features are what its last layer averages over the image.
    """

    kind: Literal["efficientnet_lite0"]
    """A network with ImageNet weights that comes out of a package."""

    name: ClassVar[str] = "efficientnet_lite0"
    digest: ClassVar[str] = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
    """sha256 of the weights in version 0.1.0 of the package."""
    image_size: ClassVar[int] = 224
    value_range: ClassVar[tuple[float, float]] = (-127 / 128, 1.0)


def _with_kind(section: Any) -> Any:
    """A section that does not say its kind is of a network in a file."""
    return {"kind": "file"} | section if isinstance(section, dict) else section


ExtractorConfig = Annotated[
    NetworkFile | InceptionWeights | EfficientNetLite0,
    Field(discriminator="kind"),
    BeforeValidator(_with_kind),
]


class OverStepsConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """Samplers that are compared by what they make of few steps."""

    samplers: Annotated[tuple[SamplerName, ...], Field(strict=False)]
    """The samplers to compare."""
    steps: Annotated[tuple[int, ...], Field(strict=False)]
    """The numbers of steps to compare them at."""
    samples: int = Field(default=500, ge=2)
    """Images drawn by each sampler with each number of steps."""

    @model_validator(mode="after")
    def _has_a_point(self) -> "OverStepsConfig":
        if not self.samplers or not self.steps:
            raise ValueError("name at least one of samplers and one of steps")
        return self

    def at(self, sampling: SamplingConfig, sampler: SamplerName, steps: int) -> SamplingConfig:
        """The settings of `sampling` with another sampler and number of steps."""
        values = sampling.model_dump() | {"sampler": sampler, "steps": steps}
        return SamplingConfig.model_validate(values)


class EvaluationConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """How a trained model is measured."""

    samples: int = Field(default=500, ge=1)
    """Images drawn for the figures, their labels going round the classes."""
    sigma_rel: float | None = None
    """For training.ema.kind=power: the width of the average that is measured and registered, any
    that the snapshots can make; by default the first of training.ema.sigma_rel."""
    classifier_epochs: int = Field(default=30, ge=1)
    """Passes over the training images in which the judge is fitted, the classifier that finds
    features and tells classes."""
    extractor: ExtractorConfig | None = None
    """The network that finds the features which figures compare; by default the judge."""
    during_training: int = Field(default=0, ge=0)
    """Images drawn from each checkpoint whose figures are logged while training goes on; 0 for
    none. The number stands in their names, since some figures depend on it."""
    over_steps: OverStepsConfig | None = None
    """Samplers and numbers of steps that are compared, as a curve of quality over evaluations of
    the network; by default none."""
    elbo_images: int = Field(default=0, ge=0)
    """Held-out images whose variational bound is computed, over all timesteps; 0 for none."""
    ode_images: int = Field(default=0, ge=0)
    """Held-out images whose likelihood is computed by the probability-flow ODE; 0 for none."""
    ode_trace: Trace = "hutchinson"
    """How the ODE's divergence is computed: by an unbiased estimate, or exactly, at a cost that
    grows with the number of pixels."""
    ode_draws: int = Field(default=1, ge=1, le=100)
    """Likelihoods of each image, each with its own dequantisation and estimate of the trace."""
