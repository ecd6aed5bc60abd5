"""Registered models: `ddpm promote`, `rollback`, `history` and `lineage`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
import yaml
from rich.table import Table

from pipeline.sentences import validated
from tasks.commands.base import tracking_uri
from tasks.commands.images import model_of, read_png
from tasks.console import console, shown_uri

NameArg = Annotated[
    str, typer.Argument(metavar="MODEL", help="Name of a model without a version, as in digits.")
]
AliasOption = Annotated[str, typer.Option(help="The alias to move.")]

CHAIN = {
    "imported": "imported_from",
    "run": "mlflow_run_id",
    "evaluate": "evaluate_id",
    "train": "train_id",
    "step": "step",
    "versions": "versions",
    "shards": "shard_set_id",
    "images": "num_images",
    "source": "source",
    "sha256": "source_sha256",
}
"""The lines of a lineage, from the model to its source, and the keys that they show."""


def promote(
    context: typer.Context,
    model: Annotated[str, typer.Argument(metavar="MODEL@VERSION", help="As in digits@1.")],
    alias: AliasOption = "champion",
) -> None:
    """Point an alias at a version, whatever the gate decided."""
    from pipeline.registry.aliases import promote as move
    from pipeline.registry.versions import resolve

    alias = _checked(alias)
    reference = resolve(model, tracking_uri(context))
    before = move(reference, alias)
    if before == reference.version:
        console.print(f"{reference.name}@{alias} is version {before} already")
    else:
        _say(reference.name, alias, reference.version, before)


def rollback(context: typer.Context, model: NameArg, alias: AliasOption = "champion") -> None:
    """Point an alias at the version before; repeated, at the one before that."""
    from pipeline.registry.aliases import rollback as move

    alias = _checked(alias)
    done = move(model, alias, _registry(context, model))
    _say(model, alias, done.after, done.before)


def history(
    context: typer.Context,
    model: NameArg,
    alias: Annotated[str, typer.Option(help="The alias.")] = "champion",
) -> None:
    """Show when an alias moved, from which version to which, and who moved it."""
    from pipeline.registry.aliases import history as moves_of

    moves = moves_of(model, _checked(alias), _registry(context, model))
    if not moves:
        console.print(f"{model}@{alias} was not moved yet")
        return
    table = Table("when", "from", "to", "by", box=None, pad_edge=False)
    for move in moves:
        table.add_row(move.at, move.before or "", move.after, move.by)
    console.print(table)


def lineage(
    context: typer.Context,
    what: Annotated[
        str, typer.Argument(metavar="FILE.png|MODEL", help="A PNG made by ddpm, or a model.")
    ],
) -> None:
    """Show what an image or a model was made from, down to the hash of its source."""
    from pipeline.loading import read_lineage
    from pipeline.registry.aliases import DECISION_TAG
    from pipeline.registry.versions import resolve

    uri = tracking_uri(context)
    if Path(what).suffix.lower() == ".png" or Path(what).is_file():
        _, recipe = read_png(Path(what))
        reference = model_of(recipe, Path(what), uri)
        label = "" if recipe.label is None else f", label {recipe.label}"
        _line("image", f"{what}, image {recipe.index} of seed {recipe.seed}{label}")
        drawn = recipe.sampling.model_dump(exclude_defaults=True) | {
            "sampler": recipe.sampling.sampler,
            "steps": recipe.sampling.steps,
        }
        _line("drawn", _pairs(drawn) + f", in {recipe.mode} mode")
        _line("with", _pairs(recipe.made_with))
    else:
        reference = resolve(what, uri)
    made_from, tags = read_lineage(reference)
    _line("model", f"{reference}, digest {reference.digest}, in {shown_uri(uri)}")
    if DECISION_TAG in tags:
        _line("gate", json.loads(tags[DECISION_TAG])["sentence"])
    for what, key in CHAIN.items():
        value = tags.get(f"ddpm.{key}", made_from.get(key))  # the tags know of later evaluations
        if value is not None:
            _line(what, _pairs(value) if isinstance(value, Mapping) else str(value))
    if "config" in made_from:
        _line("config", "")
        print(yaml.safe_dump(made_from["config"], sort_keys=False), end="")


def _checked(alias: str) -> str:
    from pipeline.registry.config import RegistryConfig

    checked: str = validated(RegistryConfig, "--alias", alias=alias).alias
    return checked


def _registry(context: typer.Context, model: str) -> str:
    """The registry's URI, for a name that a model may have."""
    from pipeline.registry.versions import check_name, require_store

    uri = tracking_uri(context)
    require_store(check_name(model), uri)
    return uri


def _say(name: str, alias: str, version: str, before: str | None) -> None:
    was = f", was version {before}" if before else ""
    console.print(f"{name}@{alias} is now version {version}{was}")


def _line(what: str, text: str) -> None:
    console.print(f"{what:<10}{text}".rstrip())


def _pairs(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name} {value}" for name, value in values.items())
