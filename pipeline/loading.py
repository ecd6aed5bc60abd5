"""A model ready to draw from, wherever it lies: a registered version, its folder or a checkpoint.

Loading executes nothing that lies in a model's folder (see registry/folder.py).
"""

from __future__ import annotations

from typing import Any

from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors

from pipeline.errors import CorruptArtifact, ModelNotFound
from pipeline.registry.folder import MODEL_JSON, model_digest, read_description, read_folder
from pipeline.registry.versions import DIGEST_TAG, ModelReference, download, version_at
from pipeline.samplers.model import Model, ModelSpec, build_model
from pipeline.training import checkpoint


def load_model(uri: str, tracking_uri: str | None = None) -> Model:
    """A model ready to sample from, from a registered version or from a checkpoint.

    Args:
        uri: `models:/NAME/VERSION`, a model's folder, or a checkpoint's folder (its EMA weights).
        tracking_uri: of the registry, for `models:/`.

    Raises:
        CorruptArtifact: what is there does not match its recorded hashes.
        ModelNotFound: there is no model at that place.
        StorageError: the registry cannot be used, or the files are not where it says.
    """
    wanted = None
    if uri.startswith("models:/"):
        assert tracking_uri is not None
        version = version_at(uri, tracking_uri)
        wanted = version.tags.get(DIGEST_TAG)
        uri = download(version, "", tracking_uri)
    try:
        spec, weights = read_folder(uri)
    except FileNotFoundError:
        try:
            spec, weights = read_checkpoint(uri)
        except FileNotFoundError as error:
            raise ModelNotFound(
                f"{uri} holds neither a registered model nor a checkpoint"
            ) from error
    digest = model_digest(spec, weights)
    if wanted not in (None, digest):
        raise CorruptArtifact(
            f"{uri} holds the model {digest}, the registry says {wanted}: it was replaced since it "
            "was registered"
        )
    return build_model(spec, load_tensors(weights), digest)


def read_checkpoint(uri: str) -> tuple[ModelSpec, bytes]:
    """The spec and the EMA weights of a checkpoint, in one safetensors file even if it was sharded.

    Raises:
        CorruptArtifact: they do not match their recorded sha256.
        FileNotFoundError: there is no complete checkpoint.
    """
    info = checkpoint.at(uri)
    weights = save_tensors(checkpoint.read_tensors(info, "ema.safetensors"))
    return ModelSpec.model_validate(info.state["spec"]), weights


def read_lineage(reference: ModelReference) -> tuple[dict[str, Any], dict[str, str]]:
    """What model.json says of how a version was made, and the version's tags.

    Raises:
        CorruptArtifact: model.json cannot be read.
        ModelNotFound: the version was deleted.
        StorageError: the registry cannot be used, or the file is not where it says.
    """
    version = version_at(reference.uri, reference.tracking_uri)
    path = download(version, f"/{MODEL_JSON}", reference.tracking_uri)
    return read_description(path)["lineage"], dict(version.tags)
