"""The MLflow store that a tracking URI names: a client of it, and its errors as sentences."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from pipeline.errors import StorageError
from pipeline.registry.lock import SQLITE, lock_store

if TYPE_CHECKING:  # importing mlflow takes seconds, which `ddpm config` need not wait for
    from mlflow.tracking import MlflowClient


@contextlib.contextmanager
def explained(uri: str) -> Iterator[None]:
    """Turn MLflow's errors into one sentence about the tracking URI."""
    from mlflow.exceptions import MlflowException
    from sqlalchemy.exc import SQLAlchemyError

    try:
        yield
    except (MlflowException, SQLAlchemyError, OSError) as error:
        raise StorageError(f"MLflow at {uri} cannot be used: {_reason(uri, error)}") from error


def _reason(uri: str, error: Exception) -> str:
    """Why, and what helps where that is known."""
    text = str(error)
    if "Invalid Host header" in text:
        host = urlsplit(uri).netloc
        return f"it refuses the name {host}; start it with --allowed-hosts {host}"
    if "NewConnectionError" in text or "NameResolutionError" in text:
        return (
            "nothing answers there; start it (mlflow server), or set MLFLOW_TRACKING_URI to the "
            "server that is meant"
        )
    return first_line(error)


def first_line(error: Exception) -> str:
    """Of an error's message; MLflow's own may go on for a page."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def make_client(uri: str) -> MlflowClient:
    """A client of the tracking and registry store, its database made if it is new.

    The first use of a new sqlite file by two processes at once would fail, so each locks it.
    """
    with lock_store(uri), explained(uri):
        if uri.startswith(SQLITE):
            _make_database(Path(uri.removeprefix(SQLITE)))
        return _open(uri)


def _open(uri: str) -> MlflowClient:
    from mlflow.tracking import MlflowClient

    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    client.search_experiments(max_results=1)
    return client


def _make_database(path: Path) -> None:
    """A sqlite store that is there is whole: a process killed while MLflow makes its tables leaves
    a file that MLflow can neither use nor mend."""
    if path.exists():
        return
    new = path.with_name(f"{path.name}.new")
    for left in (new, new.with_name(f"{new.name}-journal")):
        left.unlink(missing_ok=True)
    _open(f"{SQLITE}{new}")
    new.rename(path)


def artifact_location(uri: str) -> str | None:
    """Where a new experiment's files go: beside a sqlite store, not in the working folder.

    A server has a place of its own for them: None.
    """
    return str(Path(uri.removeprefix(SQLITE)).parent / "mlruns") if uri.startswith(SQLITE) else None
