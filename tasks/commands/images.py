"""Images of a registered model: `ddpm sample` and `ddpm reproduce`."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from pipeline import storage
from pipeline.errors import DataError, ModelNotFound, PipelineError, RequestError, UserError
from pipeline.sentences import validated
from tasks.commands.base import ModelArg, own_places, tracking_uri
from tasks.console import console, log_to_file, shown
from tasks.stages.progress import Board

if TYPE_CHECKING:
    import numpy as np

    from pipeline.registry.versions import ModelReference
    from pipeline.serving.recipe import Recipe


def sample(
    context: typer.Context,
    model: ModelArg,
    n: Annotated[int, typer.Option("-n", help="Number of images.")] = 16,
    seed: Annotated[int, typer.Option(help="Seed; its image i is always the same.")] = 0,
    sampler: Annotated[
        str, typer.Option(help="ddim, unipc, heun, ancestral, ...; all are in configs/README.md.")
    ] = "ddim",
    steps: Annotated[
        int | None, typer.Option(help="Noise levels that an image visits; 50 by default.")
    ] = None,
    spacing: Annotated[
        str, typer.Option(help="trailing, leading, linspace, karras or log_snr.")
    ] = "trailing",
    order: Annotated[int, typer.Option(help="Order 1, 2 or 3, for the solvers that have one.")] = 2,
    label: Annotated[
        int | None, typer.Option(help="Number of the class to draw; by default none.")
    ] = None,
    guidance: Annotated[
        float, typer.Option(help="Weight w of classifier-free guidance; 0: none.")
    ] = 0.0,
    eta: Annotated[float, typer.Option(help="DDIM's η, from 0 (deterministic) to 1.")] = 0.0,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Another key of a config's `sampling`, as in churn=10; may be repeated.",
        ),
    ] = None,
    mode: Annotated[
        str, typer.Option(help="exact, or fast: a pixel may differ by a grey level.")
    ] = "exact",
    out: Annotated[Path, typer.Option(help="Folder for the PNG files.")] = Path("samples"),
) -> None:
    """Draw images from a registered model into a folder: 0000.png ... and grid.png."""
    from pipeline.config import ClusterConfig, apply_override
    from pipeline.loading import load_model
    from pipeline.registry.versions import resolve
    from pipeline.samplers.config import SamplingConfig
    from pipeline.serving.engine import ImageRequest, check_request
    from tasks import cluster
    from tasks.stages import sample as stage

    if not 1 <= n <= 1_000_000:
        raise RequestError(f"-n {n} must be from 1 to 1000000", "n")
    if not 0 <= seed < 2**63:
        raise RequestError(f"--seed {seed} must be from 0 to 2**63-1", "seed")
    if mode not in ("exact", "fast"):
        raise RequestError(f"--mode {mode} must be exact or fast", "mode")
    values: dict[str, Any] = {
        "sampler": sampler,
        "spacing": spacing,
        "order": order,
        "guidance": guidance,
        "eta": eta,
    }
    for setting in settings or []:
        apply_override(values, setting)
    if steps is not None:
        values["steps"] = steps
    sampling: SamplingConfig = validated(SamplingConfig, "--", **values)
    reference = resolve(model, tracking_uri(context))
    spec = load_model(reference.uri, reference.tracking_uri).spec
    if steps is None:
        sampling = sampling.model_copy(update={"steps": spec.default_steps})
    requests = [ImageRequest(seed, i, label, sampling) for i in range(n)]
    check_request(spec, requests[0])
    folder = str(out.absolute())
    storage.check_writable(folder, remedy="choose another folder with --out")
    log_to_file(None)
    with cluster.connect(ClusterConfig(), num_cpus=1, num_gpus=0), Board() as board:
        cluster.check_shared(own_places(reference.tracking_uri))
        bar = board.add("sample")
        bar.start(n, "samples")
        columns = max(1, round(min(n, stage.MAX_GRID_IMAGES) ** 0.5))
        stage.draw_to_folder(
            reference,
            requests,
            folder,
            columns,
            mode=mode,  # type: ignore[arg-type]  # checked above
            on_done=bar.update,
        )
        bar.close(f"{n} images in {shown(folder)}")


def reproduce(
    context: typer.Context,
    file: Annotated[Path, typer.Argument(help="A PNG or WebP file made by ddpm.")],
    out: Annotated[Path | None, typer.Option(help="Where to write the image drawn again.")] = None,
) -> None:
    """Draw an image again from the recipe in its file, and compare the pixels."""
    import numpy as np

    from pipeline.serving.recipe import encode, fingerprint
    from tasks.stages.sample import redraw

    pixels, recipe = read_png(file)
    reference = model_of(recipe, file, tracking_uri(context))
    again = redraw(recipe, reference)
    if out is not None:
        storage.write_bytes(str(out.absolute()), encode(again, recipe))
    # of a grey image in WebP there are three equal channels
    if pixels.shape[:2] == again.shape[:2] and np.all(pixels == again):
        console.print(
            f"{file}: the same {again.shape[0]}x{again.shape[1]} pixels again, bit for bit"
        )
        return
    same_size = pixels.shape[:2] == again.shape[:2]
    differing = int((pixels != again).any(axis=-1).sum()) if same_size else again[..., 0].size
    made = ", ".join(f"{name} {value}" for name, value in recipe.made_with.items())
    here = ", ".join(f"{name} {value}" for name, value in fingerprint().items())
    raise PipelineError(
        f"{file}: {differing} pixels differ; it was made in {recipe.mode} mode with {made}, "
        f"this is {here}"
    )


def read_png(file: Path) -> "tuple[np.ndarray, Recipe]":
    """The pixels (H, W, C) uint8 of an image made by ddpm, and its recipe.

    Raises:
        DataError: it cannot be read, or carries no recipe.
    """
    from pipeline.serving.recipe import decode

    try:
        data = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file} cannot be read: {error.strerror}") from error
    return decode(data, str(file))


def model_of(recipe: "Recipe", file: Path, tracking_uri: str) -> "ModelReference":
    """The version that drew a PNG.

    Raises:
        ModelNotFound: it is not in the registry.
        UserError: another model has its place.
    """
    from pipeline.registry.versions import resolve

    try:
        reference = resolve(recipe.model, tracking_uri)
    except ModelNotFound as error:
        raise ModelNotFound(f"the model that made {file} is gone: {error}") from error
    if reference.digest != recipe.model_digest:
        raise UserError(
            f"{recipe.model} is not the model that made {file}: its digest is {reference.digest}, "
            f"the recipe says {recipe.model_digest}"
        )
    return reference
