"""Between the host and the device that computes: copies that neither side waits for.

A device works through what it was given while the host goes on. Who reads a number from it waits
until it has come that far, and it then stands idle until it is given more.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

CPU = torch.device("cpu")


def is_apart(device: torch.device) -> bool:
    """Whether its memory is not the host's."""
    return device.type != "cpu"


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on a device, which is not waited for; as it is on the CPU."""
    if not is_apart(device) or tensor.device == device:
        return tensor
    return tensor.contiguous().pin_memory().to(device, non_blocking=True)


def send_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """`send` of tensors of eight bytes a number, by a single copy."""
    if not is_apart(device):
        return list(tensors)
    flat = torch.cat([tensor.reshape(-1).view(torch.int64) for tensor in tensors])
    parts = torch.split(send(flat, device), [tensor.numel() for tensor in tensors])
    pairs = zip(parts, tensors, strict=True)
    return [part.view(tensor.dtype).view(tensor.shape) for part, tensor in pairs]


class Fetched:
    """A copy of a tensor on its way to the host; made when the device comes that far."""

    def __init__(self, tensor: Tensor) -> None:
        self._done = None
        self._copy = tensor.to(CPU, non_blocking=True)  # into pinned memory
        if is_apart(tensor.device):
            self._done = torch.Event(device=tensor.device)
            self._done.record()

    def get(self) -> Tensor:
        """The copy; waits until it is there."""
        if self._done is not None:
            self._done.synchronize()
        return self._copy


def synchronize(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if is_apart(device):
        torch.accelerator.synchronize(device)
