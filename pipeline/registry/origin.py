"""Where a run comes from, in the tags that MLflow itself sets and its pages show."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

NOTE = "mlflow.note.content"
"""The tag whose Markdown MLflow's pages show as the description of an experiment or a run."""


@dataclass(frozen=True)
class Origin:
    """Who makes a run, and with what."""

    source: str = "ddpm"
    """What MLflow's pages name as the source: the config file, or the program."""
    kind: Literal["LOCAL", "JOB"] = "LOCAL"
    """JOB: a job of a cluster."""
    user: str | None = None
    """By default the user of this process."""
    commit: str | None = None
    """Of the repository that has this code, see `commit_of_this_code`."""

    def tags(self) -> dict[str, str]:
        """MLflow's own tags of user, source and commit; what is not known is left out."""
        from mlflow.tracking.context.default_context import DefaultRunContext
        from mlflow.utils.mlflow_tags import (
            MLFLOW_GIT_COMMIT,
            MLFLOW_SOURCE_NAME,
            MLFLOW_SOURCE_TYPE,
            MLFLOW_USER,
        )

        try:
            user = self.user or DefaultRunContext().tags()[MLFLOW_USER]
        except (KeyError, OSError):  # in a container, a user may have no name
            user = None
        tags = {
            MLFLOW_USER: user,
            MLFLOW_SOURCE_NAME: self.source,
            MLFLOW_SOURCE_TYPE: self.kind,
            MLFLOW_GIT_COMMIT: self.commit,
        }
        return {key: value for key, value in tags.items() if value}


def commit_of_this_code() -> str | None:
    """The git commit of the repository that this package lies in; None if it lies in none.

    MLflow by itself asks for that of the program, which an environment has outside a repository.
    """
    from mlflow.utils.git_utils import get_git_commit

    import pipeline

    commit: str | None = get_git_commit(str(pipeline.__file__))
    return commit
