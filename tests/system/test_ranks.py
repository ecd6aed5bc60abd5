"""Ranks of a process group: what several train is what one trains."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load
from safetensors.torch import save as save_tensors
from torch import Tensor, multiprocessing

from pipeline import storage
from pipeline.training import checkpoint, parallel
from pipeline.training.ema import Ema
from tests.conftest import free_port
from tests.unit.test_ema import POWER, counting, shaken
from tests.unit.test_training import (
    CPU,
    SPEC,
    TWO_RANKS,
    assert_bit_identical,
    config,
    fresh,
    run,
    save,
)


def _rank_of_three(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=3
    )
    training = config(steps=6)
    straight = fresh(training)
    run(straight, training, rank, 3)
    first = fresh(training)
    run(first, training.model_copy(update={"steps": 3}), rank, 3)
    save(Path(folder), first, SPEC)
    torch.distributed.barrier()
    second = fresh(training)
    checkpoint.load(checkpoint.read(folder, 3), second)
    run(second, training, rank, 3)
    assert_bit_identical(second, straight)
    torch.distributed.destroy_process_group()


def test_three_workers_that_were_interrupted_end_bit_for_bit_as_if_not(tmp_path: Path) -> None:
    """What three add up depends on the order, and DDP has another order in its first step."""
    multiprocessing.spawn(_rank_of_three, (free_port(), str(tmp_path)), nprocs=3)


def _rank_of_two(rank: int, port: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2
    )
    assert parallel.true_on_all_ranks(True, CPU)
    assert not parallel.true_on_all_ranks(rank == 0, CPU), "the same answer on both"
    for name, (spec, values) in TWO_RANKS.items():
        training = config(steps=5, **values)
        state = fresh(training, spec)
        losses = run(state, training.model_copy(update={"steps": 3}), rank, 2, spec)
        save(Path(folder, name), state, spec)
        torch.distributed.barrier()
        state = fresh(training, spec)
        checkpoint.load(checkpoint.read(f"{folder}/{name}", 3), state)
        losses += run(state, training, rank, 2, spec)
        save(Path(folder, name), state, spec)
        if rank == 0:
            storage.write_json(f"{folder}/{name}/losses.json", losses)
        elif state.losses is not None:
            storage.write_json(f"{folder}/{name}/history.json", state.losses.losses.tolist())
    torch.distributed.destroy_process_group()


def test_two_workers_train_the_model_that_one_trains(tmp_path: Path) -> None:
    """Same global batches, noise and timesteps: the losses agree to float tolerance.

    The two were interrupted after three steps; one alone loads the checkpoint of both.
    """
    multiprocessing.spawn(_rank_of_two, (free_port(), str(tmp_path)), nprocs=2)
    for name, (spec, values) in TWO_RANKS.items():
        training, folder = config(steps=5, **values), str(tmp_path / name)
        alone = fresh(training, spec)
        losses = run(alone, training, spec=spec)
        assert storage.read_json(f"{folder}/losses.json") == pytest.approx(losses, rel=1e-4)
        # weights whose gradient is rounding alone may differ by Adam's step; what they compute, not
        together = fresh(training, spec)
        checkpoint.load(checkpoint.read(folder, 5), together)
        if together.losses is not None:  # the history is of all rows, and the same on both ranks
            other = torch.tensor(storage.read_json(f"{folder}/history.json"), dtype=torch.float64)
            assert torch.equal(other, together.losses.losses)
            assert alone.losses is not None
            torch.testing.assert_close(other, alone.losses.losses, rtol=1e-4, atol=0)
        x, t, label = (
            torch.randn(4, 1, 8, 8),
            torch.tensor([1, 300, 600, 999]),
            torch.tensor([0, 1, 2, 0]),
        )
        with torch.no_grad():
            torch.testing.assert_close(
                together.network.eval()(x, t, label),
                alone.network.eval()(x, t, label),
                rtol=0,
                atol=1e-4,
            )


def _sharded_rank(rank: int, folder: str) -> None:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    torch.set_num_threads(1)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2
    )
    network = counting()
    fully_shard(network, mesh=init_device_mesh("cpu", (2,)))
    ema = Ema(network, POWER, 64)
    for step in range(6):
        if step == 3:  # a new start from whole weights, as a checkpoint has them
            whole = {
                name: {key: full(tensor) for key, tensor in weights.items()}
                for name, weights in ema.averages.items()
            }
            ema = Ema(network, POWER, 64)
            for name, weights in whole.items():
                ema.load(weights, name)
        shaken(network, step)
        ema.update(network, step)
    rows = len(ema.weights["2.weight"].to_local())
    gathered = {
        f"{name}/{key}": full(tensor)
        for name, weights in ema.averages.items()
        for key, tensor in weights.items()
    }
    storage.write_bytes(f"{folder}/{rank}-has-{rows}-rows", save_tensors(gathered))
    torch.distributed.destroy_process_group()


def full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def test_sharded_weights_have_the_averages_of_whole_ones_to_the_bit(tmp_path: Path) -> None:
    """Three rows on two ranks, each of which averages its own."""
    multiprocessing.spawn(_sharded_rank, (str(tmp_path),), nprocs=2)
    network = counting()
    ema = Ema(network, POWER, 64)
    for step in range(6):
        shaken(network, step)
        ema.update(network, step)
    for file in ("0-has-2-rows", "1-has-1-rows"):
        gathered = load((tmp_path / file).read_bytes())
        for name, weights in ema.averages.items():
            assert all(torch.equal(gathered[f"{name}/{key}"], weights[key]) for key in weights)
