"""Models from and for elsewhere: `ddpm export` and `ddpm import`."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from pipeline import storage
from pipeline.errors import DataError, RequestError
from tasks.commands.base import ModelArg, tracking_uri
from tasks.console import command, console, shown


class Format(StrEnum):
    """What an exported folder is for."""

    DIFFUSERS = "diffusers"
    ONNX = "onnx"
    TORCH = "torch"


def export(
    context: typer.Context,
    model: ModelArg,
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="A new or empty folder.")],
    format: Annotated[
        Format,
        typer.Option(
            help="A folder of Hugging Face's diffusers; or the network alone, as network.onnx or, "
            "by torch.export, network.pt2."
        ),
    ] = Format.DIFFUSERS,
    label: Annotated[
        int | None,
        typer.Option(help="For a model with classes: the class that DDPMPipeline will draw."),
    ] = None,
) -> None:
    """Write a registered model as files for other tools."""
    from pipeline.exchange import diffusers_folder, graphs
    from pipeline.loading import load_model
    from pipeline.registry.versions import resolve

    if label is not None and format is not Format.DIFFUSERS:
        raise RequestError(f"--label {label} is for --format diffusers: drop one of them", "label")
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise DataError(f"{folder} is there and not empty: name a new folder")
    reference = resolve(model, tracking_uri(context))
    loaded = load_model(reference.uri, reference.tracking_uri)
    weights = loaded.network.state_dict()
    if format is Format.DIFFUSERS:
        files = diffusers_folder.to_diffusers(loaded.spec, weights, label)
    else:
        program = graphs.trace(loaded.spec, weights)
        write = graphs.to_onnx if format is Format.ONNX else graphs.to_torch_export
        files = write(loaded.spec, program)
    for name, data in files.items():
        storage.write_bytes(storage.join(str(folder.absolute()), name), data)
    console.print(f"{reference} is in {shown(str(folder.absolute()))}: {', '.join(sorted(files))}")
    if format is Format.DIFFUSERS and label is None and loaded.spec.num_classes:
        console.print(
            "its UNet2DModel takes class_labels, which a DDPMPipeline does not pass on: --label "
            "makes a folder that draws one class"
        )


def import_(
    context: typer.Context,
    folder: Annotated[
        str,
        typer.Argument(
            metavar="DIR", help="A folder that save_pretrained of a DDPMPipeline wrote."
        ),
    ],
    name: Annotated[str, typer.Option(help="Name of the registered model.")],
) -> None:
    """Register the model in a folder of Hugging Face's diffusers."""
    from safetensors.torch import save

    from pipeline.exchange.diffusers_folder import from_diffusers
    from pipeline.registry.folder import model_digest, model_files
    from pipeline.registry.origin import Origin, commit_of_this_code
    from pipeline.registry.registration import register
    from pipeline.registry.runs import TrackedRun
    from pipeline.registry.versions import check_name

    check_name(name)
    uri = storage.absolute(folder)
    spec, tensors = from_diffusers(uri)
    weights = save(tensors)
    digest = model_digest(spec, weights)
    lineage = {"imported_from": uri}
    files = model_files(spec, weights, lineage)
    note = f"The model in `{uri}`, a folder of diffusers, as `ddpm import` registered it."
    origin = Origin(uri, commit=commit_of_this_code())
    run = TrackedRun(tracking_uri(context), name, f"import-{digest}", lineage, origin, note)
    reference = register(run, name, files, {"ddpm.imported_from": uri})
    run.finish("FINISHED")
    kind = f"{spec.image_size}x{spec.image_size}x{spec.channels}"
    console.print(f"{reference} is the model in {folder}, of {kind} images; try")
    console.print(f"  {command('ddpm')} sample {reference}")
    console.print(f"  {command('ddpm')} promote {reference}")
