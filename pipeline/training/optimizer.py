"""What a gradient does to the weights: AdamW, the learning rate, and the loss scale of float16."""

import math
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.device import is_apart
from pipeline.errors import TrainingDiverged
from pipeline.networks.monotone import ScheduledNetwork
from pipeline.training.config import TrainingConfig

LEAST_SCALE = 1.0
MAX_BAD_STEPS = 50
"""One after the other. From 65,536 a good scale is found within 17, then one in 2,000 is bad."""


def make_optimizer(network: nn.Module, config: TrainingConfig) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019); without weight decay that is Adam."""
    groups: list[dict[str, Any]] = [{"params": network.parameters()}]
    if isinstance(network, ScheduledNetwork):  # decay would pull its ends to an SNR of 1
        groups = [
            {"params": network.network.parameters()},
            {"params": network.schedule.parameters(), "weight_decay": 0.0},
        ]
    fused = all(is_apart(parameter.device) for parameter in network.parameters())
    return torch.optim.AdamW(
        groups, lr=config.lr, weight_decay=config.weight_decay, foreach=not fused, fused=fused
    )


def learning_rate(step: int, config: TrainingConfig) -> float:
    """The rate of optimizer step `step` (from 0), after a linear warm-up.

    constant
    cosine        half a period, from the end of the warm-up to 0 after the last step
    inverse_sqrt  constant up to step r = lr_reference_steps, then lr √(r/step) (Karras et al.
                  2024)
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.lr
    if config.lr_schedule == "inverse_sqrt":
        return config.lr / math.sqrt(max(1.0, step / config.lr_reference_steps))
    done = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.lr * 0.5 * (1 + math.cos(math.pi * done))


class LossScale:
    """The factor on the loss that keeps float16 gradients from vanishing; 1 for other precisions.

    It is halved when a gradient overflows, and the step left out; it is doubled after 2,000 steps
    that were good (`torch.amp.GradScaler`). It never falls below LEAST_SCALE.
    """

    def __init__(self, device: torch.device, enabled: bool) -> None:
        self.scaler = torch.amp.GradScaler(device.type, enabled=enabled)
        self._bad_steps = torch.zeros((), dtype=torch.int64, device=device)
        self._until_look = MAX_BAD_STEPS
        """Steps before which there cannot be too many bad ones: the device is not asked earlier."""

    @property
    def bad_steps(self) -> int:
        """One after the other, up to now; waits for the device."""
        return int(self._bad_steps)

    def backward(self, loss: Tensor) -> None:
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]

    def step(self, optimizer: torch.optim.Optimizer) -> None:
        """Step `optimizer`, whose gradients were unscaled, unless they overflowed.

        Raises:
            TrainingDiverged: they did so MAX_BAD_STEPS times, one after the other.
        """
        self.scaler.step(optimizer)
        if not self.scaler.is_enabled():
            return
        scale = self.scaler._get_scale_async()  # get_scale() waits
        assert scale is not None
        before = scale.clone()
        self.scaler.update()
        self._bad_steps = torch.where(scale < before, self._bad_steps + 1, 0)
        scale.clamp_(min=LEAST_SCALE)
        self._until_look -= 1
        if self._until_look:
            return
        if self.bad_steps == MAX_BAD_STEPS:
            raise TrainingDiverged(
                f"the gradients overflowed in {MAX_BAD_STEPS} steps, one after the other, with "
                f"training.precision=float16 and a loss scale of {float(scale):g}; the checkpoints "
                "before are kept: use training.precision=bfloat16, or a lower training.lr"
            )
        self._until_look = MAX_BAD_STEPS - self.bad_steps

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint keeps; nothing where the scale is 1."""
        if not self.scaler.is_enabled():
            return {}
        known = self.scaler.state_dict()
        return {
            "scale": torch.tensor(known["scale"], dtype=torch.float64),
            "good_steps": torch.tensor(known["_growth_tracker"]),
            "bad_steps": torch.tensor(self.bad_steps),
        }

    def load(self, tensors: dict[str, Tensor]) -> None:
        known = self.scaler.state_dict()
        known["scale"] = float(tensors["scale"])
        known["_growth_tracker"] = int(tensors["good_steps"])
        self.scaler.load_state_dict(known)
        self._bad_steps.fill_(int(tensors["bad_steps"]))
        self._until_look = MAX_BAD_STEPS - self.bad_steps
