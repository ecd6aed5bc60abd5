"""Models side by side: `ddpm compare`."""

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Table

from pipeline import storage
from pipeline.errors import RequestError
from tasks.commands.base import tracking_uri
from tasks.console import console, shown

if TYPE_CHECKING:
    from pipeline.registry.versions import ModelReference

IMAGES = 10
"""Drawn by each model, in one row of the picture."""


def compare(
    context: typer.Context,
    models: Annotated[
        list[str],
        typer.Argument(metavar="MODEL MODEL...", help="Two or more, as in digits@1 digits@2."),
    ],
    seed: Annotated[
        int, typer.Option(help="Seed of the picture; all models get the same noise.")
    ] = 0,
    out: Annotated[Path, typer.Option(help="The PNG to write.")] = Path("compare.png"),
) -> None:
    """Print the figures of models side by side, and draw images from the same noise."""
    from pipeline.registry.gate import shown as figure_shown
    from pipeline.registry.versions import FIGURES_TAG, read_tag, resolve

    if len(models) < 2:
        raise RequestError(f"{models[0]} alone cannot be compared: name two models or more")
    uri = tracking_uri(context)
    references = [resolve(model, uri) for model in models]
    figures: list[dict[str, Any]] = [
        json.loads(read_tag(reference, FIGURES_TAG) or "{}") for reference in references
    ]
    table = Table("figure", *map(str, references), "", box=None, pad_edge=False)
    for name in dict.fromkeys(name for of in figures for name in of):
        row = [of.get(name) for of in figures]
        cells = ["not measured" if figure is None else figure_shown(figure) for figure in row]
        arrow = next("↑" if of["better"] == "higher" else "↓" for of in row if of is not None)
        table.add_row(f"{name} {arrow}", *cells, _remark(row))
    console.print(table)
    if not any(figures):
        console.print("none of them was measured: imported models have no figures")
    storage.write_bytes(str(out.absolute()), _picture(references, seed))
    console.print(f"picture   {shown(str(out.absolute()))}, a row a model, in that order")


def _remark(row: list[dict[str, Any] | None]) -> str:
    """Which of the figures of one name is better than the next, by more than chance makes."""
    from pipeline.registry.gate import difference, margin

    there = [(i, figure) for i, figure in enumerate(row) if figure is not None]
    if len(there) < 2:
        return ""
    _, first = there[0]
    for _, other in there[1:]:
        if different := difference(first["measured"], other["measured"]):
            return f"measured otherwise: {different}"
    sign = 1 if first["better"] == "higher" else -1
    order = sorted(there, key=lambda pair: -sign * float(pair[1]["value"]))
    (best, figure), (_, second) = order[:2]
    needed = margin(figure, second)
    if needed is None or sign * (figure["value"] - second["value"]) <= needed:
        return "no difference"
    return f"the {_ordinal(best)} is better"


def _ordinal(column: int) -> str:
    names = ("first", "second", "third")
    return names[column] if column < len(names) else f"{column + 1}th"


def _picture(references: "list[ModelReference]", seed: int) -> bytes:
    """The images of one seed by each model, with its default number of DDIM steps."""
    import numpy as np
    from PIL import Image

    from pipeline.data.images import grid, to_pil
    from pipeline.loading import load_model
    from pipeline.samplers.config import SamplingConfig
    from pipeline.serving.engine import ImageRequest
    from pipeline.serving.offline import draw

    rows = []
    for reference in references:
        model = load_model(reference.uri, reference.tracking_uri)
        classes = model.spec.num_classes
        sampling = SamplingConfig(steps=model.spec.default_steps)
        requests = [
            ImageRequest(seed, i, i % classes if classes else None, sampling) for i in range(IMAGES)
        ]
        rows.append(draw(model, requests).pixels)
    side, is_grey = max(row.shape[1] for row in rows), all(row.shape[-1] == 1 for row in rows)

    def alike(pixels: np.ndarray) -> np.ndarray:  # models may be of other sizes, grey and in colour
        image = to_pil(pixels).convert("L" if is_grey else "RGB")
        big = np.asarray(image.resize((side, side), Image.Resampling.NEAREST))
        return big[..., None] if is_grey else big

    return grid(np.stack([alike(image) for row in rows for image in row]), IMAGES)
