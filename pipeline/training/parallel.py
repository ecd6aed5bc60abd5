"""Data-parallel ranks with torch alone; who starts the processes is the caller's business."""

import contextlib

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel


def rank_and_world_size() -> tuple[int, int]:
    """(0, 1) outside a process group."""
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def wrap(network: nn.Module, device: torch.device) -> nn.Module:
    """The network with gradients averaged over the ranks; itself if it is alone."""
    if rank_and_world_size()[1] == 1:
        return network
    device_ids = [device.index] if device.type == "cuda" else None
    return DistributedDataParallel(network, device_ids=device_ids)


def reducing(forward: nn.Module, reduce: bool) -> contextlib.AbstractContextManager[None]:
    """Around a forward and backward pass: whether its gradients are averaged over the ranks.

    Those that are not are added to those that come after, and averaged with them.
    """
    if reduce or not isinstance(forward, DistributedDataParallel):
        return contextlib.nullcontext()
    without: contextlib.AbstractContextManager[None] = forward.no_sync()
    return without


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of a tensor over the ranks; waits for all of them."""
    values = values.clone()
    if rank_and_world_size()[1] > 1:
        distributed.all_reduce(values)
    return values


def all_rows(values: Tensor) -> Tensor:
    """The rows (b, ...) of all ranks in the order of the ranks: (B, ...); waits for all of them."""
    _, world_size = rank_and_world_size()
    if world_size == 1:
        return values
    parts = [torch.empty_like(values) for _ in range(world_size)]
    distributed.all_gather(parts, values)
    return torch.cat(parts)


def from_rank_zero(value: int, device: torch.device) -> int:
    """Rank 0's value on every rank; waits for all of them."""
    tensor = torch.tensor(value, dtype=torch.int64, device=device)
    if rank_and_world_size()[1] > 1:
        distributed.broadcast(tensor, src=0)
    return int(tensor)
