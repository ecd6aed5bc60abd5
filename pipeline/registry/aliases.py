"""Aliases of a registered model: who moves them, when, and the history of their moves.

The model is locked (see lock.py) while its alias is read, decided on, moved and recorded, so of
two pipelines that finish at once the second meets the first as champion. The history is a tag of
the registered model.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from pipeline.errors import ModelNotFound, UserError
from pipeline.registry.config import Rule
from pipeline.registry.gate import Champion, Decision, Figures, judge
from pipeline.registry.lock import lock_model
from pipeline.registry.store import explained, make_client
from pipeline.registry.versions import (
    FIGURES_TAG,
    ModelReference,
    get_version,
    look,
    require_model,
    versions_of,
)

if TYPE_CHECKING:  # importing mlflow takes seconds
    from mlflow.entities.model_registry import RegisteredModel
    from mlflow.tracking import MlflowClient

HISTORY_TAG = "ddpm.history"
"""Of the registered model, with `.ALIAS`: its moves as JSON, the oldest first."""
MOST_CHARACTERS = 4900
"""Of a history, which keeps the newest moves: the column of such a tag has room for 5000."""
DECISION_TAG = "ddpm.promotion"
"""Of a version: what the gate decided last, as JSON."""

Mover = Literal["gate", "promote", "rollback"]


@dataclass(frozen=True)
class Move:
    """An alias went from a version to another."""

    at: str
    """ISO 8601 in UTC."""
    before: str | None
    """The version it pointed at; None if it pointed nowhere."""
    after: str
    by: Mover


def decide(
    reference: ModelReference,
    alias: str,
    rules: Mapping[str, Rule],
    figures: Figures,
    skipped: Mapping[str, str],
) -> Decision:
    """Move the alias to a version if the rules hold of its figures; the version's tags tell it.

    Args:
        skipped: why figures are missing, by name.

    Raises:
        StorageError: the registry cannot be used.
        ModelNotFound: the version was deleted meanwhile.
    """
    with _locked_version(reference) as (client, model):
        before = _holder(model, alias)
        champion = None
        if before not in (None, reference.version):
            tags = get_version(client, reference.name, str(before)).tags
            champion = Champion(str(before), json.loads(tags.get(FIGURES_TAG, "{}")))
        verdicts = judge(rules, figures, skipped, champion)
        decision = Decision(alias, reference.version, before, verdicts, _now())
        if decision.promoted:
            _move(client, model, alias, reference.version, "gate")
        client.set_model_version_tag(
            reference.name, reference.version, DECISION_TAG, decision.to_json()
        )
    return decision


def promote(reference: ModelReference, alias: str) -> str | None:
    """Point an alias at a version whatever its figures; returns the version it pointed at.

    Raises:
        StorageError: the registry cannot be used.
        ModelNotFound: the version was deleted meanwhile.
    """
    with _locked_version(reference) as (client, model):
        before = _holder(model, alias)
        _move(client, model, alias, reference.version, "promote")
    return before


def rollback(name: str, alias: str, tracking_uri: str) -> Move:
    """Point an alias at the version it pointed at before; once more goes back further.

    Raises:
        StorageError: the registry cannot be used.
        ModelNotFound: there is no such model, or the version before was deleted.
        UserError: no version before is known.
    """
    with _locked(name, tracking_uri) as (client, model):
        now = _holder(model, alias)
        line = _line(_read_history(model, alias), now)
        if len(line) < 2:
            stays = f"it stays version {now}" if now else "it points nowhere"
            raise UserError(
                f"{name}@{alias} was at no other version before: {stays}, and `ddpm promote "
                f"{name}@VERSION --alias {alias}` moves it"
            )
        before = line[-2]
        there = versions_of(client, name)
        if before not in there:
            raise ModelNotFound(
                f"version {before} of {name}, which {alias} was before, is deleted: choose another "
                f"with `ddpm promote {name}@VERSION --alias {alias}`, of {', '.join(there)}"
            )
        return _move(client, model, alias, before, "rollback")


def history(name: str, alias: str, tracking_uri: str) -> list[Move]:
    """The moves of an alias, the oldest first, as many as are kept.

    Raises:
        StorageError: the registry cannot be used.
        ModelNotFound: there is no such model.
    """
    tag = f"{HISTORY_TAG}.{alias}"
    rows = look(
        tracking_uri,
        "SELECT value FROM registered_models AS model LEFT JOIN registered_model_tags AS tag "
        "ON tag.name = model.name AND tag.key = ? WHERE model.name = ?",
        tag,
        name,
    )
    if rows:
        return _moves(rows[0][0])
    client = make_client(tracking_uri)
    with explained(tracking_uri):
        return _moves(require_model(client, name, tracking_uri).tags.get(tag))


@contextmanager
def _locked_version(reference: ModelReference) -> Iterator[tuple[MlflowClient, RegisteredModel]]:
    """`_locked`, of a version that exists."""
    with _locked(reference.name, reference.tracking_uri) as (client, model):
        get_version(client, reference.name, reference.version)
        yield client, model


@contextmanager
def _locked(name: str, uri: str) -> Iterator[tuple[MlflowClient, RegisteredModel]]:
    """A client, and the registered model, which this process has locked."""
    client = make_client(uri)
    with explained(uri):
        require_model(client, name, uri)
        with lock_model(client, uri, name):
            yield client, client.get_registered_model(name)


def _move(
    client: MlflowClient, model: RegisteredModel, alias: str, version: str, by: Mover
) -> Move:
    """Record first: a move that a kill left undone is seen, and recorded once when it is redone."""
    moves = _read_history(model, alias)
    move = Move(_now(), _holder(model, alias), version, by)
    if move.before == version:
        return move
    if moves and (moves[-1].before, moves[-1].after) == (move.before, version):
        moves.pop()
    moves.append(move)
    while len(text := json.dumps([asdict(each) for each in moves])) > MOST_CHARACTERS:
        moves.pop(0)
    client.set_registered_model_tag(model.name, f"{HISTORY_TAG}.{alias}", text)
    client.set_registered_model_alias(model.name, alias, version)
    return move


def _line(moves: list[Move], now: str | None) -> list[str]:
    """The versions that an alias would go back through, the present one last."""
    line = [moves[0].before] if moves and moves[0].before else []
    for move in moves:
        if move.by == "rollback" and move.after in line:
            line = _up_to(line, move.after)
        elif line[-1:] != [move.after]:
            line.append(move.after)
    if now is None:  # its version was deleted: that one counts as the present one
        return line
    # it may have been moved by others, who record nothing
    return _up_to(line, now) if now in line else [*line, now]


def _up_to(line: list[str], version: str) -> list[str]:
    """The line until the last time that it was at a version."""
    return line[: len(line) - line[::-1].index(version)]


def _holder(model: RegisteredModel, alias: str) -> str | None:
    version = model.aliases.get(alias)
    return None if version is None else str(version)


def _read_history(model: RegisteredModel, alias: str) -> list[Move]:
    return _moves(model.tags.get(f"{HISTORY_TAG}.{alias}"))


def _moves(tag: str | None) -> list[Move]:
    entries: list[dict[str, Any]] = json.loads(tag or "[]")
    return [Move(**entry) for entry in entries]


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
