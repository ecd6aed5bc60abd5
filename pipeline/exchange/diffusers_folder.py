"""A model as a folder of Hugging Face diffusers, and such a folder as a model.

    model_index.json                             DDPMPipeline: a UNet2DModel and a DDPMScheduler
    unet/config.json
    unet/diffusion_pytorch_model.safetensors
    scheduler/scheduler_config.json

`diffusers.DDPMPipeline.from_pretrained` opens what `to_diffusers` gives, and draws what our
`ancestral` sampler draws from the same noise, but for the float32 of its schedules. diffusers
itself is not needed here: its keys stand in `diffusers_keys.py`, its names of tensors in
`diffusers_tensors.py`.
"""

import json
from typing import Any, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from pipeline import storage
from pipeline.errors import ConfigError, DataError, RequestError, StorageError
from pipeline.exchange.diffusers_keys import (
    VERSION,
    DDIMScheduler,
    DDPMScheduler,
    UNet2DModel,
    from_keys,
    to_keys,
)
from pipeline.exchange.diffusers_tensors import name_of_today, to_ours, to_theirs
from pipeline.samplers.model import ModelSpec
from pipeline.sentences import first_mistake

INDEX = "model_index.json"
CONFIG = "config.json"
WEIGHTS = "diffusion_pytorch_model.safetensors"
PICKLE = "diffusion_pytorch_model.bin"
SCHEDULER = "scheduler_config.json"
CLASS_NAMES, HAS_NULL_LABEL = "_class_names", "_has_null_label"
"""Beside the keys of a U-Net; diffusers passes over keys with an underscore."""

LABELS, TIME_BIAS = "class_embedding.weight", "time_embedding.linear_2.bias"


# --- out ----------------------------------------------------------------------------------------


def to_diffusers(
    spec: ModelSpec, weights: dict[str, Tensor], label: int | None = None
) -> dict[str, bytes]:
    """The files of a `DDPMPipeline`, by their path in its folder.

    A conditional model becomes a `UNet2DModel` that takes class_labels, the last of them the null
    label. A `DDPMPipeline` has no labels to pass on, so it cannot draw from that; with `label` it
    draws this class: what the label adds to the embedded timestep becomes part of a bias.

    Args:
        weights: of the network of `spec`.
        label: 0 .. num_classes-1; num_classes for the null label, where the model has one.

    Raises:
        ConfigError: the model has an option that diffusers cannot express; the message names it.
        RequestError: the model has no such label.
    """
    unet, scheduler = to_keys(spec)
    tensors = to_theirs(spec, weights)
    config = unet.model_dump()
    if label is not None:
        num_labels = spec.num_classes + (1 if spec.has_null_label else 0)
        if not 0 <= label < num_labels:
            known = f"from 0 to {num_labels - 1}" if num_labels else "none: it has no classes"
            raise RequestError(f"label={label} is not a label of the model, {known}", "label")
        tensors[TIME_BIAS] = tensors[TIME_BIAS] + tensors.pop(LABELS)[label]
        config["num_class_embeds"] = None
    elif spec.num_classes:
        config |= {CLASS_NAMES: spec.class_names, HAS_NULL_LABEL: spec.has_null_label}
    parts = {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    return {
        INDEX: _json("DDPMPipeline", parts),
        f"unet/{CONFIG}": _json("UNet2DModel", config),
        f"unet/{WEIGHTS}": save_tensors(tensors, {"format": "pt"}),
        f"scheduler/{SCHEDULER}": _json("DDPMScheduler", scheduler.model_dump()),
    }


def _json(class_name: str, values: dict[str, Any]) -> bytes:
    values = {"_class_name": class_name, "_diffusers_version": VERSION, **values}
    return json.dumps(values, indent=2).encode()


# --- in -----------------------------------------------------------------------------------------


def from_diffusers(uri: str) -> tuple[ModelSpec, dict[str, Tensor]]:
    """The model in the folder of a `DDPMPipeline` or `DDIMPipeline`, its weights in float32.

    The files may lie in the subfolders or, as in older folders, side by side; model_index.json may
    be missing. Classes are called 0, 1, ... and have no null label, unless the folder is one of
    ours.

    Raises:
        ConfigError: a key or a value that is not known here; the message says what is.
        DataError: the tensors are not those of the network.
        StorageError: a file is missing or cannot be read, or the weights are a pickle.
    """
    index = storage.join(uri, INDEX)
    if storage.exists(index):
        known = ("DDPMPipeline", "DDIMPipeline")
        _check_class(index, _parse(index, storage.read_bytes(index)), known)
    unet, private = _read(uri, "unet", CONFIG, UNet2DModel)
    scheduler, _ = _read(uri, "scheduler", SCHEDULER, DDPMScheduler, DDIMScheduler)
    spec = from_keys(unet, scheduler)
    tensors = _read_tensors(uri)
    names = private.get(CLASS_NAMES)
    if isinstance(names, list) and len(names) + 1 == spec.num_classes:
        trained = private.get(HAS_NULL_LABEL) is True
        classes = {"class_names": [str(name) for name in names], "has_null_label": trained}
        spec = spec.model_copy(update=classes)
    elif spec.num_classes and LABELS in tensors:  # ours have a row for ∅, here never used
        rows = tensors[LABELS]
        tensors[LABELS] = torch.cat([rows, torch.zeros_like(rows[:1])])
    return spec, to_ours(spec, tensors, f"{WEIGHTS} in {uri}")


Keys = TypeVar("Keys", bound=BaseModel)


def _read(uri: str, folder: str, name: str, *known: type[Keys]) -> tuple[Keys, dict[str, Any]]:
    """A JSON file of one of the known classes, and its keys with an underscore."""
    place, data = _find(uri, folder, name)
    given = _parse(place, data)
    private = {key: given.pop(key) for key in list(given) if key.startswith("_")}
    by_name = {keys.__name__: keys for keys in known}
    keys = by_name[_check_class(place, private, tuple(by_name))]
    try:
        return keys.model_validate_json(json.dumps(given)), private
    except ValidationError as error:
        mistake = first_mistake(error)
        key, why = mistake.loc[0], mistake.rule
        if mistake.kind == "missing":
            raise ConfigError(f"{place} does not say {key}, which has no default") from error
        if mistake.kind == "extra_forbidden":
            why = (
                f"it is no key of {keys.__name__} that is known here (diffusers {VERSION}); delete "
                "it if the model does not depend on it"
            )
        raise ConfigError(
            f"{key}={json.dumps(given[key])} in {place} cannot be taken over: {why}"
        ) from error


def _check_class(place: str, given: dict[str, Any], known: tuple[str, ...]) -> str:
    name = given.get("_class_name")
    if name not in known:
        raise ConfigError(
            f"_class_name={name} in {place} cannot be taken over: only {' and '.join(known)} can"
        )
    return str(name)


def _find(uri: str, folder: str, name: str) -> tuple[str, bytes]:
    """Where a file lies, in its subfolder or beside the others, and its content."""
    for place in (storage.join(uri, folder, name), storage.join(uri, name)):
        try:
            return place, storage.read_bytes(place, "check your rights")
        except FileNotFoundError:
            pass
    raise StorageError(
        f"{uri} has neither {folder}/{name} nor {name}: it must be a folder as save_pretrained of "
        "a DDPMPipeline writes it"
    )


def _parse(place: str, data: bytes) -> dict[str, Any]:
    try:
        value = json.loads(data)
    except ValueError as error:
        raise StorageError(f"{place} is not JSON: {error}") from error
    if not isinstance(value, dict):
        raise StorageError(f"{place} is not a JSON object")
    return value


def _read_tensors(uri: str) -> dict[str, Tensor]:
    """All tensors of the weights, by the names of today."""
    try:
        place, data = _find(uri, "unet", WEIGHTS)
    except StorageError:
        for pickle in (storage.join(uri, "unet", PICKLE), storage.join(uri, PICKLE)):
            if storage.exists(pickle):
                raise StorageError(
                    f"{pickle} is a pickle, which can run any code when it is read, and there is "
                    f"no {WEIGHTS}: if you trust it, convert it once with diffusers, "
                    "DDPMPipeline.from_pretrained(DIR).save_pretrained(NEW_DIR)"
                ) from None
        raise
    try:
        tensors = load_tensors(data)
    except SafetensorError as error:
        raise DataError(f"{place} is not a file of safetensors: {error}") from error
    return {name_of_today(name): tensor for name, tensor in tensors.items()}
