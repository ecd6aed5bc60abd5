"""Every exception this project raises on purpose.

PipelineError
├── UserError              the user can mend it: exit code 2, or HTTP 4xx
│   ├── ConfigError        a key or value in the YAML file or in --set
│   ├── DataError          a source or the images in it
│   ├── StorageError       a storage URI that cannot be read or written
│   ├── ModelNotFound      a model name, version or alias               (HTTP 404)
│   ├── RequestError       a sampling request; `param` names the field  (HTTP 422)
│   └── ClusterError       Ray: an address, a port, resources that are not there
├── CorruptArtifact        bytes that do not match their recorded sha256
└── TrainingDiverged       a loss that is not finite

A message is one sentence, or two: what is wrong (key and value), the rule, and the remedy.
"""

import reprlib

MOST_SHOWN = 60
_BRIEF = reprlib.Repr()
_BRIEF.maxstring = _BRIEF.maxother = _BRIEF.maxlong = MOST_SHOWN


def shown(value: object) -> str:
    """A value as a message quotes it: on one line, and cut if it is long or deep."""
    text = _BRIEF.repr(value)
    return text if len(text) <= MOST_SHOWN else f"{text[: MOST_SHOWN - 3]}..."


class PipelineError(Exception):
    """Base of all errors raised on purpose."""


class UserError(PipelineError):
    """Something the user can mend. Exit code 2, or HTTP 4xx."""


class ConfigError(UserError):
    """A configuration key or value."""


class DataError(UserError):
    """A data source or the images in it."""


class StorageError(UserError):
    """A storage URI that cannot be read or written."""


class ModelNotFound(UserError):
    """A registered model, version or alias that does not exist."""


class RequestError(UserError):
    """A sampling request that cannot be served.

    Args:
        message: one clear sentence.
        param: the field of the request that is wrong, as the client spelled it.
    """

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message, param)  # both in args, so that it survives pickling by Ray
        self.message = message
        self.param = param

    def __str__(self) -> str:
        return self.message


class ClusterError(UserError):
    """Ray cannot be reached, or does not have what is asked for."""


class CorruptArtifact(PipelineError):
    """Stored bytes do not match the sha256 recorded when they were written."""


class TrainingDiverged(PipelineError):
    """The training loss is no longer finite."""
