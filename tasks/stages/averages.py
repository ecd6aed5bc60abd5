"""Which weights of a training are measured and registered.

Training ends with the average of its weights that the config names first. With
`evaluation.sigma_rel` another one is made from its snapshots, and lies with the figures of it.
"""

import ray
from safetensors.torch import save as save_tensors

from pipeline import storage
from pipeline.loading import read_checkpoint
from pipeline.registry.folder import MODEL_JSON, WEIGHTS, model_files, read_folder
from pipeline.samplers.model import ModelSpec
from pipeline.training import checkpoint, posthoc
from pipeline.training.config import EmaConfig
from tasks.stages.stage import StageContext

FOLDER = "model"
"""In the output of evaluate: the model, if it is not the checkpoint's."""
FILES = [f"{FOLDER}/{name}" for name in (WEIGHTS, MODEL_JSON)]


def last_checkpoint(train_folder: str) -> checkpoint.CheckpointInfo:
    """The one that a finished training ended with."""
    manifest = storage.read_manifest(train_folder)
    assert manifest is not None
    return checkpoint.read(train_folder, manifest.stats["step"])


def of_checkpoints(ema: EmaConfig) -> str:
    """Which weights of a checkpoint are measured, in words."""
    return f"power average, sigma_rel {ema.sigma_rel[0]:g}" if ema.kind == "power" else "ema"


def to_measure(ctx: StageContext) -> tuple[str, str]:
    """Where the model lies that `evaluate` measures, and which weights it has, in words.

    Raises:
        CorruptArtifact: a snapshot does not match its recorded sha256.
    """
    train, sigma_rel = ctx.inputs["train"], ctx.config.evaluation.sigma_rel
    if sigma_rel is None:
        return last_checkpoint(train).uri, of_checkpoints(ctx.config.training.ema)
    make = ray.remote(num_cpus=1, max_retries=3)(make_average)
    missed = ray.get(make.remote(train, sigma_rel, ctx.folder))
    words = f"power average, sigma_rel {sigma_rel:g}, {missed:.2%} of it missed by the snapshots"
    return storage.join(ctx.folder, FOLDER), words


def make_average(train_folder: str, sigma_rel: float, folder: str) -> float:
    """Write a power average of a training; returns the part of its profile that is missed."""
    info = last_checkpoint(train_folder)
    spec = ModelSpec.model_validate(info.state["spec"])
    snapshots = posthoc.find_snapshots(train_folder)
    weights, missed = posthoc.reconstruct(snapshots, sigma_rel, info.step)
    files = model_files(spec, save_tensors(weights), {})
    for path, name in zip(FILES, (WEIGHTS, MODEL_JSON), strict=True):
        storage.write_bytes(storage.join(folder, path), files[name])
    return missed


def measured(train_folder: str, evaluate_folder: str) -> tuple[ModelSpec, bytes]:
    """The spec and the weights that a finished evaluation measured.

    Raises:
        CorruptArtifact: they do not match their recorded hashes.
    """
    try:
        return read_folder(storage.join(evaluate_folder, FOLDER))
    except FileNotFoundError:
        return read_checkpoint(last_checkpoint(train_folder).uri)
