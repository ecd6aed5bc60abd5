"""Checkpoints: safetensors and JSON, no pickle.

A checkpoint is a folder `step-000001000/` with `model.safetensors`, the averages of the weights
(`ema.safetensors` is the model's), `optimizer.safetensors`, `timesteps.safetensors` where timesteps
are drawn by the losses so far, `loss_scale.safetensors` with float16 and, written last,
`state.json`: the step, the model's spec, the precision of training, the history of logged metrics
and the sha256 of each file. Without a valid `state.json` a folder does not count.
"""

import re
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor, nn

from pipeline import storage
from pipeline.errors import CorruptArtifact, StorageError
from pipeline.training import parallel
from pipeline.training.config import Precision
from pipeline.training.loop import TrainState

STATE = "state.json"
BEST = "best.json"
SUFFIX = ".safetensors"
SLICE = re.compile(r"-\d{5}-of-\d{5}(?=\.safetensors$)")
PATIENCE = 600.0
"""Seconds for which rank 0 waits for what the others write."""


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

    @property
    def precision(self) -> Precision | None:
        """What training computes in; None of a checkpoint from before `auto`."""
        precision: Precision | None = self.state.get("precision")
        return precision


def checkpoint_name(step: int) -> str:
    return f"step-{step:09d}"


class Kept(NamedTuple):
    """A part of a run's state, as a checkpoint keeps it in a file."""

    tensors: dict[str, Tensor]
    load: Callable[[dict[str, Tensor]], None]
    """Takes such tensors over, whole ones."""


def kept(state: TrainState) -> dict[str, Kept]:
    """All that a run consists of, beside its step, by file: what is saved, and how it is loaded."""
    network, optimizer, ema = state.network, state.optimizer, state.ema
    parts = {
        "model.safetensors": Kept(network.state_dict(), partial(_load_network, network)),
        **{
            f"{name}.safetensors": Kept(weights, partial(ema.load, average=name))
            for name, weights in ema.averages.items()
        },
        "optimizer.safetensors": Kept(
            _optimizer_tensors(network, optimizer),
            partial(_load_optimizer_tensors, network, optimizer),
        ),
    }
    if state.losses is not None:
        parts["timesteps.safetensors"] = Kept(state.losses.tensors(), state.losses.load)
    if state.loss_scale.tensors():
        parts["loss_scale.safetensors"] = Kept(state.loss_scale.tensors(), state.loss_scale.load)
    return parts


class Writer:
    """Writes the checkpoints of a run on a thread, one at a time, while training goes on.

    It holds a copy of what this rank writes, in the memory of the CPU. Rank 0 writes what is whole,
    and each rank its slices of what is cut; rank 0 waits for the others, and has the last word with
    `state.json`. Leaving the context waits for what is being written.

    Args:
        folder: URI of the run's folder.
        spec: of the model, as JSON.
        keep: how many complete checkpoints stay.
        written: called on rank 0's thread with each checkpoint that is complete.
        attempt: a number that all ranks of this attempt, and no others, have in common.
    """

    def __init__(
        self,
        folder: str,
        spec: dict[str, Any],
        keep: int,
        written: Callable[[CheckpointInfo], None] = lambda info: None,
        attempt: int = 0,
    ) -> None:
        self.folder, self.spec, self.keep, self.written = folder, spec, keep, written
        self.attempt = attempt
        self.rank, self.world_size = parallel.rank_and_world_size()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._last: Future[None] | None = None

    def save(self, state: TrainState, history: list[dict[str, float]]) -> None:
        """Write the checkpoint of `state.step`; waits for the one before.

        The same step again is harmless. All ranks call it.

        Raises:
            StorageError: the one before could not be written.
        """
        self.wait()
        files, is_cut = {}, False
        for file, (tensors, _) in kept(state).items():
            sliced = {name for name, tensor in tensors.items() if parallel.is_sliced(tensor)}
            is_cut |= bool(sliced)
            mine = tensors.keys() if self.rank == 0 else sliced
            if mine or self.rank == 0:
                path = _slice_name(file, self.rank, self.world_size) if sliced else file
                files[path] = {name: _copy(tensors[name]) for name in tensors if name in mine}
        record = {
            "format": 1,
            "step": state.step,
            "spec": self.spec,
            "precision": state.precision,
            "history": list(history),
        }
        self._last = self._thread.submit(self._write, record, files, is_cut)

    def wait(self) -> None:
        """Until the last one is written.

        Raises:
            StorageError: it could not be.
        """
        if self._last is not None:
            self._last.result()

    def _write(
        self, record: dict[str, Any], files: dict[str, dict[str, Tensor]], is_cut: bool
    ) -> None:
        uri = storage.join(self.folder, checkpoint_name(record["step"]))
        hashes = {
            file: storage.write_bytes(storage.join(uri, file), save_tensors(tensors)).sha256
            for file, tensors in files.items()
        }
        if self.rank:
            if is_cut:
                storage.write_json(self._note(uri, self.rank), hashes)
            return
        notes = [self._note(uri, rank) for rank in range(1, self.world_size if is_cut else 1)]
        for note in notes:
            hashes |= _wait_for_json(note)
        record["files"] = hashes
        storage.write_json(storage.join(uri, STATE), record)
        for note in notes:
            storage.remove(note)
        prune(self.folder, self.keep)
        self.written(CheckpointInfo(uri, record))

    def _note(self, uri: str, rank: int) -> str:
        """Where a rank says what it has written; one that died in between left another."""
        return storage.join(uri, f"rank-{rank:05d}-{self.attempt:x}.json")

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        self._thread.shutdown()
        if self._last is not None and error is None:
            self._last.result()


def _slice_name(file: str, rank: int, world_size: int) -> str:
    """`model.safetensors` -> `model-00001-of-00002.safetensors`"""
    return f"{file.removesuffix(SUFFIX)}-{rank:05d}-of-{world_size:05d}{SUFFIX}"


def _wait_for_json(uri: str) -> Any:
    begin = time.monotonic()
    while not storage.exists(uri):
        if time.monotonic() - begin > PATIENCE:
            raise StorageError(
                f"a rank has not written its part of a checkpoint in {PATIENCE:g} s: {uri} is "
                "missing; run the same command again"
            )
        time.sleep(0.1)
    return storage.read_json(uri)


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
            for file in info.state["files"]:
                _read_file(info, file)
        except (CorruptArtifact, FileNotFoundError):
            continue  # damaged: the one before it will do
        return info
    return None


def read(folder: str, step: int) -> CheckpointInfo:
    """The checkpoint of a step; raises as `at` does."""
    return at(storage.join(folder, checkpoint_name(step)))


def at(uri: str) -> CheckpointInfo:
    """The checkpoint at a place.

    Raises:
        FileNotFoundError: it is not there, or not complete.
    """
    return CheckpointInfo(uri, storage.read_json(storage.join(uri, STATE)))


def load(info: CheckpointInfo, state: TrainState) -> None:
    """Put a checkpoint into `state`.

    Raises:
        CorruptArtifact: a file does not match its hash.
    """
    for file, part in kept(state).items():
        part.load(read_tensors(info, file))
    state.step = info.step


def read_tensors(info: CheckpointInfo, file: str) -> dict[str, Tensor]:
    """What `kept` calls `file`, whole: put together from its slices if it was cut.

    Raises:
        CorruptArtifact: a file does not match the sha256 in state.json.
    """
    paths = sorted(path for path in info.state["files"] if SLICE.sub("", path) == file)
    slices: dict[str, list[Tensor]] = {}
    for path in paths:
        for name, tensor in _read_file(info, path).items():
            slices.setdefault(name, []).append(tensor)
    return {name: torch.cat(of) if len(of) > 1 else of[0] for name, of in slices.items()}


def _read_file(info: CheckpointInfo, path: str) -> dict[str, Tensor]:
    data = storage.read_bytes(storage.join(info.uri, path))
    if storage.sha256(data) != info.state["files"][path]:
        raise CorruptArtifact(f"{storage.join(info.uri, path)} does not match its recorded sha256")
    tensors: dict[str, Tensor] = load_tensors(data)
    return tensors


def prune(folder: str, keep: int) -> None:
    """Delete all complete checkpoints but the newest `keep` and the best."""
    best = read_best(folder)
    for info in complete_checkpoints(folder)[:-keep]:
        if best is None or info.step != best.step:
            storage.remove(storage.join(info.uri, STATE))  # first: it is never half a checkpoint
            storage.remove(info.uri)


class Best(NamedTuple):
    """The checkpoint whose average predicts held-out images best, of those that were tried."""

    step: int
    holdout_loss: float


def read_best(folder: str) -> Best | None:
    """The best checkpoint below `folder` that is there; None if none was tried."""
    try:
        best = Best(**storage.read_json(storage.join(folder, BEST)))
        read(folder, best.step)  # it may have been deleted before its loss was known
    except (FileNotFoundError, ValueError):
        return None
    return best


def note_loss(folder: str, step: int, holdout_loss: float) -> None:
    """Say how well a checkpoint predicts held-out images, so that the best one stays."""
    best = read_best(folder)
    if best is None or holdout_loss < best.holdout_loss:
        storage.write_json(storage.join(folder, BEST), Best(step, holdout_loss)._asdict())


def _copy(tensor: Tensor) -> Tensor:
    """What this rank has of it, on the CPU, in memory that the next step does not change."""
    return parallel.slice_of(tensor.detach()).to("cpu", copy=True).contiguous()


def _load_network(network: nn.Module, tensors: dict[str, Tensor]) -> None:
    here = network.state_dict().items()
    network.load_state_dict({name: parallel.cut_like(tensors[name], to) for name, to in here})


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
        if slot == "step":  # on the GPU only if it is fused
            placed = value.to(parameter.device) if optimizer.defaults["fused"] else value
        elif parallel.is_sliced(parameter):
            placed = parallel.cut_like(value, parameter)
        else:  # in the layout of the parameter, which the fused kernels insist on
            placed = torch.empty_like(parameter).copy_(value)
        optimizer.state[parameter][slot] = placed
