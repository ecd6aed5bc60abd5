"""Checkpoints: safetensors and JSON, no pickle.

A checkpoint is a folder `step-000001000/` with `model.safetensors`, `ema.safetensors`,
`optimizer.safetensors`, `timesteps.safetensors` where timesteps are drawn by the losses so far and,
written last, `state.json`: the step, the model's spec, the history of logged metrics and the sha256
of each file. Without a valid `state.json` a folder does not count.
"""

from dataclasses import dataclass
from typing import Any

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from pipeline import storage
from pipeline.errors import CorruptArtifact
from pipeline.training.loop import TrainState

STATE = "state.json"
TIMESTEPS = "timesteps.safetensors"


@dataclass(frozen=True)
class CheckpointInfo:
    """A complete checkpoint: where it is and the content of its state.json."""

    uri: str
    state: dict[str, Any]

    @property
    def step(self) -> int:
        return int(self.state["step"])

    @property
    def history(self) -> list[dict[str, float]]:
        """The metrics logged up to this step, one record a log step, oldest first."""
        return list(self.state["history"])


def checkpoint_name(step: int) -> str:
    return f"step-{step:09d}"


def save(
    folder: str, state: TrainState, spec: dict[str, Any], history: list[dict[str, float]]
) -> CheckpointInfo:
    """Write the checkpoint of `state.step` below `folder`; the same step again is harmless."""
    uri = storage.join(folder, checkpoint_name(state.step))
    tensors = {
        "model.safetensors": _cpu(state.network.state_dict()),
        "ema.safetensors": _cpu(state.ema.weights),
        "optimizer.safetensors": _cpu(_optimizer_tensors(state.network, state.optimizer)),
    }
    if state.losses is not None:
        tensors[TIMESTEPS] = state.losses.tensors()
    files = {}
    for name, content in tensors.items():
        files[name] = storage.write_bytes(storage.join(uri, name), save_tensors(content)).sha256
    record = {"format": 1, "step": state.step, "spec": spec, "history": history, "files": files}
    storage.write_json(storage.join(uri, STATE), record)
    return CheckpointInfo(uri, record)


def complete_checkpoints(folder: str) -> list[CheckpointInfo]:
    """The complete checkpoints below `folder`, oldest first."""
    found = []
    for name in storage.list_names(folder):
        if name.startswith("step-"):
            uri = storage.join(folder, name)
            try:
                found.append(CheckpointInfo(uri, storage.read_json(storage.join(uri, STATE))))
            except (FileNotFoundError, ValueError):
                continue  # torn: the writer died before state.json
    return found


def latest_sound(folder: str) -> CheckpointInfo | None:
    """The newest checkpoint whose files all match their hashes; None if there is none."""
    for info in reversed(complete_checkpoints(folder)):
        try:
            for name in info.state["files"]:
                read_tensors(info, name)
        except (CorruptArtifact, FileNotFoundError):
            continue  # damaged: the one before it will do
        return info
    return None


def read(folder: str, step: int) -> CheckpointInfo:
    """The checkpoint of a step.

    Raises:
        FileNotFoundError: it is not there, or not complete.
    """
    uri = storage.join(folder, checkpoint_name(step))
    return CheckpointInfo(uri, storage.read_json(storage.join(uri, STATE)))


def load(info: CheckpointInfo, state: TrainState) -> None:
    """Put a checkpoint into `state`.

    Raises:
        CorruptArtifact: a file does not match its hash.
    """
    state.network.load_state_dict(read_tensors(info, "model.safetensors"))
    state.ema.load(read_tensors(info, "ema.safetensors"))
    optimizer = read_tensors(info, "optimizer.safetensors")
    _load_optimizer_tensors(state.network, state.optimizer, optimizer)
    if state.losses is not None:
        state.losses.load(read_tensors(info, TIMESTEPS))
    state.step = info.step


def read_tensors(info: CheckpointInfo, name: str) -> dict[str, Tensor]:
    """One of a checkpoint's safetensors files.

    Raises:
        CorruptArtifact: it does not match the sha256 in state.json.
    """
    data = storage.read_bytes(storage.join(info.uri, name))
    if storage.sha256(data) != info.state["files"][name]:
        raise CorruptArtifact(f"{storage.join(info.uri, name)} does not match its recorded sha256")
    tensors: dict[str, Tensor] = load_tensors(data)
    return tensors


def prune(folder: str, keep: int) -> None:
    """Delete all but the newest `keep` complete checkpoints."""
    for info in complete_checkpoints(folder)[:-keep]:
        storage.remove(
            storage.join(info.uri, STATE)
        )  # first, so that it is never half a checkpoint
        storage.remove(info.uri)


def _cpu(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}


def _optimizer_tensors(network: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by the parameters' names, e.g. `exp_avg/conv_in.weight`."""
    return {
        f"{slot}/{name}": value
        for name, parameter in network.named_parameters()
        for slot, value in optimizer.state.get(parameter, {}).items()
    }


def _load_optimizer_tensors(
    network: nn.Module, optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]
) -> None:
    by_name = dict(network.named_parameters())
    for path, value in tensors.items():
        slot, name = path.split("/", 1)
        parameter = by_name[name]
        # AdamW keeps its step count on the CPU, its moments beside the parameter
        placed = value if slot == "step" else value.to(parameter.device)
        optimizer.state[parameter][slot] = placed
