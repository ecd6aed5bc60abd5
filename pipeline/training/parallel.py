"""Data-parallel ranks with torch alone; who starts the processes is the caller's business."""

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


def mean_over_ranks(value: Tensor) -> float:
    """The mean of a scalar over the ranks; waits for all of them."""
    value = value.clone()
    _, world_size = rank_and_world_size()
    if world_size > 1:
        distributed.all_reduce(value)
    return float(value / world_size)


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


def barrier() -> None:
    """Wait for all ranks."""
    if distributed.is_initialized():
        distributed.barrier()
