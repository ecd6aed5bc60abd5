"""How a network is fitted: the section `training` of a config."""

from functools import lru_cache
from typing import Literal

import numpy as np
from pydantic import BaseModel, Field, model_validator

from pipeline.data.augment import Augmentation
from pipeline.diffusion.config import DiffusionConfig, LossWeight
from pipeline.training.settings import check_owners

TimestepSampler = Literal["uniform", "stratified", "log_normal", "loss_second_moment"]
"""See pipeline/training/timesteps.py."""

Precision = Literal["float32", "tf32", "bfloat16", "float16"]
"""What a network computes in, once `auto` is resolved: see pipeline/training/precision.py."""

OWNERS = {
    "min_snr_gamma": ("loss_weight", "min_snr"),
    "p2_gamma": ("loss_weight", "p2"),
    "p2_k": ("loss_weight", "p2"),
    "sigmoid_bias": ("loss_weight", "sigmoid"),
    "lr_reference_steps": ("lr_schedule", "inverse_sqrt"),
    "log_normal_mean": ("timestep_sampler", "log_normal"),
    "log_normal_std": ("timestep_sampler", "log_normal"),
    "shuffle_window": ("shuffle", "windowed"),
    "shuffle_lanes": ("shuffle", "windowed"),
}
"""Settings that only one weight, sampler, order or schedule has."""


EMA_OWNERS = {
    "decay": ("kind", "decay"),
    "half_life": ("kind", "half_life"),
    "ramp_up": ("kind", "half_life"),
    "sigma_rel": ("kind", "power"),
    "num_snapshots": ("kind", "power"),
}
"""Settings that only one kind of average has."""


class EmaConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """Which averages of the weights are kept."""

    kind: Literal["decay", "half_life", "power"] = "decay"
    """decay: a factor for each step. half_life: a half-life in images (EDM). power: averages of
    several widths, from which others are made after training (EDM2)."""
    decay: float = Field(default=0.9999, ge=0, lt=1)
    """For kind=decay: how much of the average stays in a step."""
    half_life: int = Field(default=500_000, ge=1)
    """For kind=half_life: images after which half of the average is new."""
    ramp_up: float = Field(default=0.05, gt=0, allow_inf_nan=False)
    """For kind=half_life: the half-life is at most this share of the images seen so far."""
    sigma_rel: list[float] = Field(default=[0.05, 0.10], min_length=1)
    """For kind=power: a width for each average, the standard deviation of the steps in it as a
    share of training. The first is the model's; evaluation.sigma_rel makes any other from the
    snapshots."""
    num_snapshots: int = Field(default=16, ge=1)
    """For kind=power: snapshots of each average, evenly over training, that others are made
    from."""

    @model_validator(mode="after")
    def _settings_have_an_owner(self) -> "EmaConfig":
        check_owners(self, EMA_OWNERS)
        return self

    @model_validator(mode="after")
    def _widths_can_be_had(self) -> "EmaConfig":
        for sigma_rel in self.sigma_rel:
            sigma_rel_to_gamma(sigma_rel)
        if len({f"{sigma_rel:g}" for sigma_rel in self.sigma_rel}) < len(self.sigma_rel):
            raise ValueError(f"sigma_rel={self.sigma_rel} names a width twice: name each once")
        return self

    @property
    def names(self) -> list[str]:
        """Of the averages; the first, always `ema`, is the model's."""
        others = self.sigma_rel[1:] if self.kind == "power" else []
        return ["ema", *(f"ema-power-{sigma_rel:g}" for sigma_rel in others)]


@lru_cache
def sigma_rel_to_gamma(sigma_rel: float) -> float:
    """γ of the power average whose profile has the standard deviation `sigma_rel` t.

    The profile τ^γ on (0, t] has σ² = (γ+1) / ((γ+2)² (γ+3)), which falls from 1/12 at γ = 0, the
    plain mean.

    Raises:
        ValueError: there is none.
    """
    if not 0 < sigma_rel <= 0.2887:
        raise ValueError(
            f"sigma_rel={sigma_rel} must be above 0 and at most 0.2887, which is the plain mean of "
            "all steps"
        )
    s = sigma_rel**-2
    return float(np.roots([1, 7, 16 - s, 12 - s]).real.max())


class TrainingConfig(BaseModel, frozen=True, extra="forbid", strict=True):
    """How the network is fitted.

    Steps are optimizer steps; the batch size is of all workers together.
    """

    steps: int = Field(ge=1)
    """Optimizer steps of the whole training."""
    batch_size: int = Field(ge=1)
    """Images of a step, of all workers together."""
    lr: float = Field(gt=0, allow_inf_nan=False)
    """Learning rate, after the warm-up."""
    objective: Literal["simple", "hybrid", "vlb"] = "simple"
    """simple: the error of the output. vlb: the variational bound. hybrid: simple, and the bound
    for the learned variance alone (Nichol & Dhariwal 2021, Eq. 16)."""
    loss_weight: LossWeight = "uniform"
    """How much each noise level counts in simple and hybrid; formulas in
    pipeline/diffusion/losses.py."""
    min_snr_gamma: float = Field(default=5.0, gt=0, allow_inf_nan=False)
    """For loss_weight=min_snr: γ, the largest weight of an error of x_0."""
    p2_gamma: float = Field(default=1.0, ge=0, allow_inf_nan=False)
    """For loss_weight=p2: the exponent γ."""
    p2_k: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """For loss_weight=p2: what is added to the signal-to-noise ratio."""
    sigmoid_bias: float = Field(default=2.0, allow_inf_nan=False)
    """For loss_weight=sigmoid: b, the log-SNR at which an error of ε counts half."""
    timestep_sampler: TimestepSampler = "uniform"
    """How the timesteps of a batch are drawn; formulas in pipeline/training/timesteps.py."""
    log_normal_mean: float = Field(default=-1.2, allow_inf_nan=False)
    """For timestep_sampler=log_normal: mean of ln σ."""
    log_normal_std: float = Field(default=1.2, gt=0, allow_inf_nan=False)
    """For timestep_sampler=log_normal: standard deviation of ln σ."""
    lr_schedule: Literal["constant", "cosine", "inverse_sqrt"] = "constant"
    """Learning rate after the warm-up. cosine: falls to 0 at the last step. inverse_sqrt: falls as
    1/√step after lr_reference_steps."""
    lr_reference_steps: int = Field(default=10_000, ge=1)
    """For lr_schedule=inverse_sqrt: steps for which the rate stays constant."""
    warmup_steps: int = Field(default=0, ge=0)
    """Steps in which the learning rate rises from 0 to lr."""
    weight_decay: float = Field(default=0.0, ge=0, allow_inf_nan=False)
    """Weight decay of AdamW; 0 makes it Adam."""
    grad_clip: float = Field(default=1.0, gt=0, allow_inf_nan=False)
    """Largest norm of the gradient; larger ones are scaled down to it."""
    ema: EmaConfig = EmaConfig()
    """Which averages of the weights are kept."""
    precision: Literal["auto"] | Precision = "auto"
    """What the network computes in; weights, their averages, noising and the loss stay float32.
    auto: bfloat16 where all workers compute it natively (GPUs from sm_80; CPUs with AVX512_BF16 or
    AMX for networks from 50 MFLOP an image, smaller ones being faster in float32 there), else
    float32. tf32: float32 with products of 10 bits on GPUs that have them. float16: with a loss
    scale."""
    accumulate: int = Field(default=1, ge=1)
    """Parts in which a worker computes its rows of a batch, one after the other, before one step:
    for batches that do not fit in memory."""
    channels_last: bool | None = None
    """Whether images and convolutions lie in memory with their channels last, as the tensor cores
    of GPUs want them; by default on a GPU with bfloat16 or float16. On a CPU it is no faster, and
    with bfloat16 slower."""
    compile: Literal["none", "default", "reduce-overhead", "max-autotune"] = "none"
    """The mode of torch.compile; the last two use CUDA graphs on a GPU. It takes a minute or more
    at each start and needs a C++ compiler; on a CPU it gains nothing."""
    parallel: Literal["ddp", "fsdp"] = "ddp"
    """With several workers. ddp: each has all weights. fsdp: each has a slice of the weights, of
    their averages and of the optimizer's state, for networks that do not fit."""
    recompute: bool = False
    """Whether the backward pass computes the activations within a block again, in place of keeping
    them: less memory for a third more work."""
    label_dropout: float = Field(default=0.1, ge=0, lt=1)
    """Share of the rows that are trained without their label, which guidance needs."""
    shuffle: Literal["full", "windowed"] = "full"
    """full: any image may come next; the decoded images must fit on a node's disk, and better in
    its memory. windowed: images are read by row group and shuffled within windows, so the data may
    have any size."""
    shuffle_window: int = Field(default=16384, ge=1)
    """For shuffle=windowed: images that a batch is drawn from; the workers together hold about
    twice as many."""
    shuffle_lanes: int = Field(default=8, ge=1)
    """For shuffle=windowed: places of the data that a batch is read from at once. With as many
    workers or fewer, each worker reads its own part of the data."""
    horizontal_flip: float = Field(default=0.0, ge=0, le=1)
    """Probability that an image is mirrored left to right."""
    vertical_flip: float = Field(default=0.0, ge=0, le=1)
    """Probability that an image is mirrored top to bottom."""
    shift: int = Field(default=0, ge=0)
    """Most pixels by which an image is moved along each axis; its edges are reflected."""
    log_every: int = Field(default=50, ge=1)
    """Steps between two points of the curves in MLflow."""
    checkpoint_every: int = Field(default=1000, ge=1)
    """Steps between two checkpoints; a multiple of log_every."""
    keep_checkpoints: int = Field(default=3, ge=1)
    """Checkpoints that are kept: the last ones, and beside them the one with the least loss on
    held-out images."""

    @model_validator(mode="after")
    def _slices_agree_on_overflow(self) -> "TrainingConfig":
        if self.parallel == "fsdp" and self.precision == "float16":
            raise ValueError(
                "precision=float16 with parallel=fsdp would let workers disagree on which steps to "
                "leave out: use precision=bfloat16"
            )
        return self

    @model_validator(mode="after")
    def _graphs_keep_no_gradients(self) -> "TrainingConfig":
        if self.compile in ("reduce-overhead", "max-autotune") and self.accumulate > 1:
            raise ValueError(
                f"compile={self.compile} with accumulate={self.accumulate} would overwrite the "
                "gradients of a part with those of the next, in the memory of its CUDA graphs: use "
                "compile=default"
            )
        return self

    @model_validator(mode="after")
    def _checkpoints_fall_on_log_steps(self) -> "TrainingConfig":
        # the logged loss is the mean since the last log: a resumed run must start a new mean
        if self.checkpoint_every % self.log_every:
            raise ValueError(
                f"checkpoint_every={self.checkpoint_every} must be a multiple of "
                f"log_every={self.log_every}"
            )
        return self

    @property
    def augmentation(self) -> Augmentation:
        return Augmentation(self.horizontal_flip, self.vertical_flip, self.shift)

    @model_validator(mode="after")
    def _a_window_holds_a_batch(self) -> "TrainingConfig":
        if self.shuffle == "windowed" and self.shuffle_window < self.batch_size:
            raise ValueError(
                f"shuffle_window={self.shuffle_window} must be at least "
                f"batch_size={self.batch_size}, and better many times as large"
            )
        return self

    @model_validator(mode="after")
    def _settings_have_an_owner(self) -> "TrainingConfig":
        check_owners(self, OWNERS)
        return self

    @model_validator(mode="after")
    def _the_bound_is_not_weighted(self) -> "TrainingConfig":
        if self.objective == "vlb" and self.loss_weight != "uniform":
            raise ValueError(
                f"loss_weight={self.loss_weight} with objective=vlb would no longer be the bound, "
                "which has its own weights: drop loss_weight, or use objective=simple"
            )
        if self.objective != "simple" and self.timestep_sampler == "log_normal":
            raise ValueError(
                f"timestep_sampler=log_normal with objective={self.objective} would no longer be "
                "the bound, a mean over even timesteps: use uniform, stratified or "
                "loss_second_moment"
            )
        return self


def check_objective(diffusion: DiffusionConfig, training: TrainingConfig) -> None:
    """Raise ValueError where a process cannot be trained as `training` says."""
    learned = diffusion.schedule == "learned"
    if learned and training.objective != "vlb":
        raise ValueError(
            f"training.objective={training.objective} cannot learn a schedule: with "
            "diffusion.schedule=learned use training.objective=vlb"
        )
    if learned and training.parallel == "fsdp":
        raise ValueError(
            "training.parallel=fsdp cannot cut a learned schedule, whose weights are single "
            "numbers: use training.parallel=ddp"
        )
    if learned and diffusion.prediction not in ("eps", "v"):
        raise ValueError(
            f"diffusion.prediction={diffusion.prediction} cannot learn a schedule, whose bound is "
            "on the error of ε: with diffusion.schedule=learned use prediction=eps or v"
        )
    no_table = learned or diffusion.is_continuous
    if diffusion.variance == "learned_range":
        if no_table:
            raise ValueError(
                f"diffusion.variance=learned_range with schedule={diffusion.schedule} has no "
                "timesteps to be learned at: use fixed_small, or a discrete schedule such as cosine"
            )
        if training.objective == "simple":
            raise ValueError(
                "diffusion.variance=learned_range with training.objective=simple would leave the "
                "variance untrained: use training.objective=hybrid or vlb"
            )
    elif training.objective == "hybrid":
        raise ValueError(
            f"training.objective=hybrid with diffusion.variance={diffusion.variance} has no "
            "variance to learn: use objective=simple"
            + ("" if no_table else ", or variance=learned_range")
        )
    if training.objective == "vlb" and diffusion.is_continuous:
        raise ValueError(
            f"training.objective=vlb is of discrete timesteps, diffusion.schedule="
            f"{diffusion.schedule} is continuous: objective=simple with loss_weight=likelihood is "
            "its bound"
        )
    if training.timestep_sampler == "loss_second_moment" and no_table:
        raise ValueError(
            "training.timestep_sampler=loss_second_moment keeps the losses of each timestep, and "
            f"diffusion.schedule={diffusion.schedule} has none in training: use uniform or "
            "stratified"
        )
