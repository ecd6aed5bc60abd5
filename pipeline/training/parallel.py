"""Data-parallel ranks with torch alone; who starts the processes is the caller's business.

A network that does not fit on every rank is cut: each rank keeps a slice of each weight (a DTensor)
and fetches the rest of a block when it computes it.
"""

import contextlib

import torch
from torch import Tensor, distributed, nn
from torch.nn.parallel import DistributedDataParallel

from pipeline.data.order import share
from pipeline.device import is_apart
from pipeline.networks.backbone import Block


def rank_and_world_size() -> tuple[int, int]:
    """(0, 1) outside a process group."""
    if not distributed.is_initialized():
        return 0, 1
    return distributed.get_rank(), distributed.get_world_size()


def wrap(network: nn.Module, device: torch.device) -> nn.Module:
    """The network with gradients averaged over the ranks; itself if it is alone, or cut."""
    if rank_and_world_size()[1] == 1 or any(map(is_sliced, network.parameters())):
        return network
    device_ids = [device.index] if is_apart(device) else None
    return DistributedDataParallel(network, device_ids=device_ids)


def changes_its_layout(forward: nn.Module) -> bool:
    """Whether gradients are added up in another order after the first backward pass.

    DDP arranges them anew then, in the order in which they came. What three ranks or more add up
    depends on the place of a number by rounding, so a run that was resumed would differ from one
    that was not, unless both arrange before their first step.
    """
    return isinstance(forward, DistributedDataParallel)


def reducing(forward: nn.Module, reduce: bool) -> contextlib.AbstractContextManager[None]:
    """Around a forward and backward pass: whether its gradients are averaged over the ranks.

    Those that are not are added to those that come after, and averaged with them.
    """
    if isinstance(forward, DistributedDataParallel) and not reduce:
        without: contextlib.AbstractContextManager[None] = forward.no_sync()
        return without
    if hasattr(forward, "set_requires_gradient_sync"):
        forward.set_requires_gradient_sync(reduce)  # type: ignore[operator]
    return contextlib.nullcontext()


def cut(network: nn.Module, device: torch.device) -> None:
    """Keep a slice of every weight on each rank, block by block (Zhao et al. 2023, FSDP).

    Before its optimizer and its averages are made, which are then cut in the same way.
    """
    # here, since to import them takes every command 0.8 s
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (rank_and_world_size()[1],))
    for block in [module for module in network.modules() if isinstance(module, Block)]:
        fully_shard(block, mesh=mesh)
    fully_shard(network, mesh=mesh)


def is_sliced(tensor: Tensor) -> bool:
    return hasattr(tensor, "to_local")


def slice_of(tensor: Tensor) -> Tensor:
    """This rank's part of a sliced tensor, a view; a whole one as it is."""
    part: Tensor = tensor.to_local() if is_sliced(tensor) else tensor  # type: ignore[attr-defined]
    return part


def whole(tensor: Tensor) -> Tensor:
    """A sliced tensor put together, for which it waits for all ranks; a whole one as it is."""
    full: Tensor = tensor.full_tensor() if is_sliced(tensor) else tensor  # type: ignore[attr-defined]
    return full


def cut_like(tensor: Tensor, like: Tensor) -> Tensor:
    """A whole tensor cut into slices as `like` is, each rank keeping its part of its own copy."""
    if is_sliced(tensor) or not is_sliced(like):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    assert isinstance(like, DTensor)
    there = tensor.to(like.device)
    return distribute_tensor(there, like.device_mesh, like.placements, src_data_rank=None)


def sum_over_ranks(values: Tensor) -> Tensor:
    """The sum of a tensor over the ranks; waits for all of them."""
    values = values.clone()
    if rank_and_world_size()[1] > 1:
        distributed.all_reduce(values)
    return values


def true_on_all_ranks(value: bool, device: torch.device) -> bool:
    """Whether it is true on every rank, the same answer on all; waits for all of them."""
    _, world_size = rank_and_world_size()
    return int(sum_over_ranks(torch.tensor(int(value), device=device))) == world_size


def all_rows(values: Tensor, batch_size: int) -> Tensor:
    """The rows (b, ...) of all ranks in the order of the ranks: (B, ...); waits for all of them."""
    _, world_size = rank_and_world_size()
    if world_size == 1:
        return values
    sizes = [len(share(rank, world_size, batch_size)) for rank in range(world_size)]
    # all must send equally much
    mine = values.new_zeros(max(sizes), *values.shape[1:])
    mine[: len(values)] = values
    parts = [torch.empty_like(mine) for _ in sizes]
    distributed.all_gather(parts, mine)
    return torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
