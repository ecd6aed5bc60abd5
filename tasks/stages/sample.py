"""Sample: images from a registered model, one PNG each with its recipe, and a grid of them.

As a stage it draws the grid that ends `ddpm run`; as a command, what a user asks for.
"""

from collections.abc import Callable

import numpy as np
import torch

from pipeline import storage
from pipeline.data.images import grid
from pipeline.device import CPU
from pipeline.loading import load_model
from pipeline.registry.versions import ModelReference, read_reference
from pipeline.seeding import key
from pipeline.serving.config import Mode
from pipeline.serving.engine import ImageRequest
from pipeline.serving.offline import draw
from pipeline.serving.recipe import Recipe, encode
from pipeline.storage import FileEntry
from tasks.stages.drawing import draw_on_cluster
from tasks.stages.stage import Outcome, StageContext

IMAGES_PER_CLASS = 8
MAX_GRID_IMAGES = 400


def draw_to_folder(
    model: ModelReference,
    requests: list[ImageRequest],
    folder: str,
    columns: int,
    mode: Mode = "exact",
    on_done: Callable[[int], None] = lambda n: None,
    gpus_per_task: int = 0,
) -> list[FileEntry]:
    """Draw images on the cluster and write them as they come: 0000.png, ... and grid.png.

    The grid shows the first MAX_GRID_IMAGES.
    """
    files: dict[int, FileEntry] = {}
    shown: dict[int, np.ndarray] = {}
    chunks = draw_on_cluster(model.uri, model.tracking_uri, requests, mode, gpus_per_task)
    for start, (drawn, made_with) in chunks:
        for i, image in enumerate(drawn.pixels, start):
            recipe = Recipe(
                model=str(model),
                model_digest=model.digest,
                seed=requests[i].seed,
                index=requests[i].index,
                label=requests[i].label,
                sampling=requests[i].sampling,
                mode=mode,
                made_with=made_with,
            )
            uri = storage.join(folder, f"{i:04d}.png")
            files[i] = storage.write_bytes(uri, encode(image, recipe))
            if i < MAX_GRID_IMAGES:
                shown[i] = image
        on_done(len(files))
    sheet = grid(np.stack([shown[i] for i in sorted(shown)]), columns)
    entry = storage.write_bytes(storage.join(folder, "grid.png"), sheet)
    return [files[i] for i in sorted(files)] + [entry]


def run(ctx: StageContext) -> Outcome:
    """A grid from the registered model, a row a class."""
    config, model = ctx.config, read_reference(ctx.inputs["register"])
    spec = load_model(model.uri, model.tracking_uri).spec
    labels: list[int | None] = [None] * IMAGES_PER_CLASS**2
    if spec.num_classes:
        labels = [
            label for label in range(min(spec.num_classes, 50)) for _ in range(IMAGES_PER_CLASS)
        ]
    seed = key(config.seed, "grid") >> 1
    sampling = spec.admissible(config.sampling)
    requests = [ImageRequest(seed, i, label, sampling) for i, label in enumerate(labels)]
    ctx.progress.start(len(requests), "samples")
    files = draw_to_folder(
        model,
        requests,
        ctx.folder,
        IMAGES_PER_CLASS,
        on_done=ctx.progress.update,
        gpus_per_task=config.cluster.gpus_per_worker,
    )
    sheet = storage.read_bytes(storage.join(ctx.folder, "grid.png"))
    ctx.tracked_run().log_artifact("samples", "grid.png", sheet)
    return Outcome(files, {"model": str(model)})


def redraw(recipe: Recipe, model: ModelReference) -> np.ndarray:
    """The pixels of a recipe, drawn again in this process: (H, W, C) uint8.

    On a GPU if they were made on one and there is one here.
    """
    loaded = load_model(model.uri, model.tracking_uri)
    on_gpu = recipe.made_with.get("device") == "cuda" and torch.cuda.is_available()
    device = torch.device("cuda", 0) if on_gpu else CPU
    drawn = draw(loaded, [recipe.request()], recipe.mode, recipe.rows, device)
    pixels: np.ndarray = drawn.pixels[0]
    return pixels
