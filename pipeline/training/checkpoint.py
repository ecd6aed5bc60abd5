"""Checkpoints: safetensors and JSON, no pickle.

A checkpoint is a folder `step-000001000/` with `model.safetensors`, the averages of the weights
(`ema.safetensors` is the model's), `optimizer.safetensors`, `timesteps.safetensors` where timesteps
are drawn by the losses so far, `loss_scale.safetensors` with float16 and, written last,
`state.json`: the step, the model's spec, the history of logged metrics and the sha256 of each file.
Without a valid `state.json` a folder does not count.
"""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
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
LOSS_SCALE = "loss_scale.safetensors"


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


def tensors_of(state: TrainState) -> dict[str, dict[str, Tensor]]:
    """All that a run consists of, beside its step: file -> name -> tensor."""
    tensors = {
        "model.safetensors": state.network.state_dict(),
        **{f"{name}.safetensors": weights for name, weights in state.ema.averages.items()},
        "optimizer.safetensors": _optimizer_tensors(state.network, state.optimizer),
    }
    if state.losses is not None:
        tensors[TIMESTEPS] = state.losses.tensors()
    if state.loss_scale.tensors():
        tensors[LOSS_SCALE] = state.loss_scale.tensors()
    return tensors


class Writer:
    """Writes the checkpoints of a run on a thread, one at a time, while training goes on.

    It holds a copy of the state while it writes, in the memory of the CPU. Leaving the context
    waits for what is being written.

    Args:
        folder: URI of the run's folder.
        spec: of the model, as JSON.
        keep: how many complete checkpoints stay.
        written: called on the thread with each checkpoint that is complete.
    """

    def __init__(
        self,
        folder: str,
        spec: dict[str, Any],
        keep: int,
        written: Callable[[CheckpointInfo], None] = lambda info: None,
    ) -> None:
        self.folder, self.spec, self.keep, self.written = folder, spec, keep, written
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._last: Future[None] | None = None

    def save(self, state: TrainState, history: list[dict[str, float]]) -> None:
        """Write the checkpoint of `state.step`; waits for the one before.

        Raises:
            StorageError: the one before could not be written.
        """
        if self._last is not None:
            self._last.result()
        copies = {
            file: {name: _copy(tensor) for name, tensor in tensors.items()}
            for file, tensors in tensors_of(state).items()
        }
        self._last = self._thread.submit(self._write, state.step, copies, list(history))

    def _write(
        self, step: int, files: dict[str, dict[str, Tensor]], history: list[dict[str, float]]
    ) -> None:
        info = save(self.folder, step, files, self.spec, history)
        prune(self.folder, self.keep)
        self.written(info)

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self._thread.shutdown()
        if self._last is not None and error is None:
            self._last.result()


def save(
    folder: str,
    step: int,
    files: dict[str, dict[str, Tensor]],
    spec: dict[str, Any],
    history: list[dict[str, float]],
) -> CheckpointInfo:
    """Write the checkpoint of a step below `folder`; the same step again is harmless.

    Args:
        files: file -> name -> tensor, see `tensors_of`.
    """
    uri = storage.join(folder, checkpoint_name(step))
    hashes = {
        file: storage.write_bytes(storage.join(uri, file), save_tensors(tensors)).sha256
        for file, tensors in files.items()
    }
    record = {"format": 1, "step": step, "spec": spec, "history": history, "files": hashes}
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
    tensors = {name: read_tensors(info, name) for name in info.state["files"]}
    state.network.load_state_dict(tensors["model.safetensors"])
    for average in state.ema.averages:
        state.ema.load(tensors[f"{average}.safetensors"], average)
    _load_optimizer_tensors(state.network, state.optimizer, tensors["optimizer.safetensors"])
    if state.losses is not None:
        state.losses.load(tensors[TIMESTEPS])
    if LOSS_SCALE in tensors:
        state.loss_scale.load(tensors[LOSS_SCALE])
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


def _copy(tensor: Tensor) -> Tensor:
    """In memory of its own on the CPU, which the next step will not change."""
    copy = tensor.detach().to("cpu", copy=True)
    return copy.contiguous()


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
