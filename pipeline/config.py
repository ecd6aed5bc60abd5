"""A run's configuration: one strict YAML file, assembled from the sections of the modules.

Every mistake is one sentence that names the key, the value, the rule and, for a misspelt key, the
nearest one there is.
"""

import difflib
import itertools
from pathlib import Path
from typing import Annotated, Any, Literal, get_args

from pydantic import BaseModel, Field, ValidationError, model_validator

from pipeline import yaml12
from pipeline.bounds import bounds, number_or_bounds
from pipeline.data.config import DataConfig
from pipeline.diffusion.config import DiffusionConfig
from pipeline.errors import ConfigError, RequestError
from pipeline.evaluation.config import EvaluationConfig
from pipeline.networks.config import NetworkConfig
from pipeline.registry.config import RegistryConfig, TrackingConfig
from pipeline.samplers.config import SamplingConfig, check_sampling
from pipeline.sentences import Mistake, mistakes
from pipeline.serving.config import ServingConfig
from pipeline.training.config import TrainingConfig, check_objective, sigma_rel_to_gamma


class ClusterConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """Where a run runs."""

    address: str | None = None
    """Address of a Ray cluster; by default RAY_ADDRESS, or a Ray of its own on this machine's
    cores."""
    workers: Annotated[int | list[int], number_or_bounds()] = 2
    """Data-parallel training workers from 1; or [least, most], as many as the nodes have room for
    when they are empty."""
    cpus_per_worker: int = Field(default=1, ge=1)
    """CPU cores of a training worker."""
    gpus_per_worker: Literal[0, 1] = 0
    """Whether a training worker has a GPU."""
    max_failures: int = Field(default=10, ge=0)
    """How often training is restarted from its last checkpoint after a worker was lost."""
    resize_seconds: float = Field(default=60.0, gt=0, allow_inf_nan=False)
    """For workers=[least, most]: seconds between two looks for room for more workers, 20 at least.
    A change of their number costs a restart from the last checkpoint."""
    peer_timeout: float = Field(default=300.0, gt=0, allow_inf_nan=False)
    """Seconds for which a worker waits, in a step, for another that has stopped without ending; at
    a checkpoint Ray notices it, after ten minutes."""
    cache: str | None = Field(default=None, pattern="^/")
    """Absolute path of the folder where each node keeps the decoded training images, mapped into
    memory; by default ray-ddpm-cache-UID among the temporary files."""

    @property
    def min_workers(self) -> int:
        return bounds(self.workers)[0]

    @property
    def max_workers(self) -> int:
        return bounds(self.workers)[1]


class RunConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """What is no part of a section below."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100)
    """Name of the MLflow experiment and of the registered model."""
    seed: int = Field(default=0, ge=0, lt=2**63)
    """What all randomness of the run is derived from."""
    storage: str = Field(default="runs", min_length=1)
    """Path or fsspec URI below which outputs lie, at STORAGE/STAGE/ID/."""
    tracking: TrackingConfig = TrackingConfig()
    data: DataConfig
    network: NetworkConfig
    diffusion: DiffusionConfig = DiffusionConfig()
    training: TrainingConfig
    evaluation: EvaluationConfig = EvaluationConfig()
    registry: RegistryConfig = RegistryConfig()
    sampling: SamplingConfig = SamplingConfig()
    serving: ServingConfig = ServingConfig()
    cluster: ClusterConfig = ClusterConfig()

    @model_validator(mode="after")
    def _sections_fit_each_other(self) -> "RunConfig":
        self.network.check_image_size(self.data.image_size)
        check_objective(self.diffusion, self.training)
        try:
            check_sampling(self.diffusion, self.sampling)
        except RequestError as error:
            raise ValueError(f"sampling: {error.message}") from error
        self._check_over_steps()
        self._check_sigma_rel()
        if self.evaluation.ode_images and self.diffusion.zero_terminal_snr:
            raise ValueError(
                f"evaluation.ode_images={self.evaluation.ode_images} needs a last timestep of "
                "finite log-SNR, where the ODE ends, and diffusion.zero_terminal_snr has none: "
                "use 0"
            )
        if self.sampling.guidance and not self.training.label_dropout:
            raise ValueError(
                f"sampling.guidance={self.sampling.guidance} needs training.label_dropout above 0, "
                "since guidance compares with the model without a label"
            )
        parts = self.cluster.max_workers * self.training.accumulate
        if self.training.batch_size < parts:
            raise ValueError(
                f"training.batch_size={self.training.batch_size} is less than the {parts} parts "
                f"into which cluster.workers={self.cluster.workers} and training.accumulate="
                f"{self.training.accumulate} cut it: raise it, or lower one of them"
            )
        return self

    def _check_sigma_rel(self) -> None:
        if (sigma_rel := self.evaluation.sigma_rel) is None:
            return
        if self.training.ema.kind != "power":
            raise ValueError(
                f"evaluation.sigma_rel={sigma_rel} is made from snapshots of power averages, which "
                f"training.ema.kind={self.training.ema.kind} does not keep: use kind=power"
            )
        try:
            sigma_rel_to_gamma(sigma_rel)
        except ValueError as error:
            raise ValueError(f"evaluation.{error}") from error

    def _check_over_steps(self) -> None:
        over_steps = self.evaluation.over_steps
        if over_steps is None:
            return
        for sampler, steps in itertools.product(over_steps.samplers, over_steps.steps):
            try:
                check_sampling(self.diffusion, over_steps.at(self.sampling, sampler, steps))
            except (RequestError, ValueError) as error:
                problem = str(error).splitlines()[-1] if isinstance(error, ValueError) else error
                raise ValueError(
                    f"evaluation.over_steps: {sampler} with {steps} steps: {problem}"
                ) from error


def load_config(path: str, overrides: list[str] | None = None) -> RunConfig:
    """The configuration of a YAML file with `key.path=value` overrides.

    Raises:
        ConfigError: with one line for each mistake.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (FileNotFoundError, IsADirectoryError) as error:
        raise ConfigError(f"{path} is not a config file: see those in configs/") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from error
    values = yaml12.parse(text, path)
    if not isinstance(values, dict):
        raise ConfigError(f"{path} must hold sections such as `data:` and `training:`")
    for override in overrides or []:
        apply_override(values, override)
    return validate_config(values, path)


def validate_config(values: dict[str, Any], where: str) -> RunConfig:
    """The configuration of plain values; `where` stands in the messages."""
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        lines = [f"{where}: {_sentence(mistake)}" for mistake in mistakes(error)]
        raise ConfigError("\n".join(lines)) from error


def _sentence(mistake: Mistake) -> str:
    loc, of_kind = list(mistake.loc), ""
    for section in (["network"], ["evaluation", "extractor"]):  # a union, by `kind`
        if loc[: len(section)] == section and len(loc) > len(section):
            of_kind = f"{'.'.join(section)}.kind={loc.pop(len(section))}"
    key, rule = ".".join(loc), mistake.rule
    if mistake.kind == "extra_forbidden":
        if of_kind and key in known_keys():
            return f"{key}={mistake.value!r} has no meaning for {of_kind}: drop it"
        near = _nearest_key(key)
        return f"{key} is not a known key" + (f"; did you mean {near}?" if near else "")
    if mistake.kind == "missing":
        return f"{key} is missing, and has no default"
    if mistake.is_ours:
        return f"{key}: {rule}" if key else rule
    if mistake.kind == "union_tag_invalid":
        tag, known = mistake.context["tag"], mistake.context["expected_tags"]
        return f"{key}.kind={tag!r} is wrong: should be {known.replace(', ', ' or ')}"
    if mistake.kind in ("model_type", "model_attributes_type", "dict_type"):
        rule = "should be a section with keys of its own"
    return f"{key}={mistake.value!r} is wrong: {rule}"


def known_keys(model: type[BaseModel] = RunConfig, prefix: str = "") -> list[str]:
    """Every key a config may have, dotted."""
    keys = []
    for name, field in model.model_fields.items():
        keys.append(prefix + name)
        for section in _sections_in(field.annotation):
            keys += known_keys(section, f"{prefix}{name}.")
    return keys


def _sections_in(annotation: Any) -> list[type[BaseModel]]:
    """The sections that a type stands for: itself, or those of a union."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [section for part in get_args(annotation) for section in _sections_in(part)]


def _nearest_key(key: str) -> str | None:
    keys = [*known_keys(), "network.preset"]
    if near := difflib.get_close_matches(key, keys, n=1, cutoff=0.6):
        return near[0]
    # right name, wrong section
    same_name = [k for k in keys if k.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    return same_name[0] if same_name else None


def apply_override(values: dict[str, Any], override: str) -> None:
    """Put `key.path=value` into nested plain values; the value is read as YAML.

    Raises:
        ConfigError: it is not of that form.
    """
    path, equals, text = override.partition("=")
    if not equals or not path.strip():
        raise ConfigError(
            f"--set {override!r} must have the form key=value, as in training.lr=3e-4"
        )
    *sections, last = path.strip().split(".")
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override!r}: {section} is a value, not a section")
        values = inner
    values[last] = yaml12.parse(text, f"--set {override}")
