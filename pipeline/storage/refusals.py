"""S3's error codes and the system's as one sentence: the reason and the remedy."""

import contextlib
import errno
from collections.abc import Iterator

from pipeline.errors import StorageError
from pipeline.storage.filesystem import filesystem_of

REMEDY = "choose another place with --set storage=URI"
"""What to do about a place below `storage:`; a caller with another place says what helps there."""

S3 = {
    "ExpiredToken": "the credentials have expired; renew the AWS_* variables and run the same "
    "command again, finished work is kept",
    "InvalidAccessKeyId": "the server does not know the key in AWS_ACCESS_KEY_ID; set that of this "
    "server, or AWS_ENDPOINT_URL to the one that is meant",
    "NoSuchBucket": "there is no such bucket; make it, {remedy}, or set AWS_ENDPOINT_URL to the "
    "server that has it",
    "RequestTimeTooSkewed": "this machine's clock and the server's are too far apart; set the "
    "clock (timedatectl set-ntp true) and run the same command again",
    "SignatureDoesNotMatch": "AWS_SECRET_ACCESS_KEY does not belong to AWS_ACCESS_KEY_ID; set both",
    # of botocore itself, which asks no server
    "EndpointConnectionError": "{error}; check AWS_ENDPOINT_URL, and that the server runs",
    "NoCredentialsError": "there are no credentials; set AWS_ACCESS_KEY_ID and "
    "AWS_SECRET_ACCESS_KEY, on every node",
    "PartialCredentialsError": "of AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY one is missing; set "
    "both, on every node",
}
HEAD_REFUSED = ("400", "403")
"""Codes of an answer to a HEAD, which has a number and no word."""

_NOT_ALLOWED = "{remedy}, or check your rights there (for s3:// the AWS_* variables)"
_DENIED = f"permission denied; {_NOT_ALLOWED}"
_A_FILE = "a part of the path is a file, not a folder; {remedy}"
SYSTEM = {
    errno.EROFS: f"it is read-only; {_NOT_ALLOWED}",
    errno.EACCES: _DENIED,
    errno.EPERM: _DENIED,
    errno.ENOENT: "no such folder, and none can be made; {remedy}",
    errno.EEXIST: _A_FILE,
    errno.ENOTDIR: _A_FILE,
    errno.ENOSPC: "the disk is full; free some space and run the same command again, finished work "
    "is kept",
}
CLASSES = {
    PermissionError: errno.EACCES,
    FileNotFoundError: errno.ENOENT,
    FileExistsError: errno.EEXIST,
    NotADirectoryError: errno.ENOTDIR,
}
"""What these errors mean where a file system's package raises them without a number."""


@contextlib.contextmanager
def explained(verb: str, uri: str, remedy: str = REMEDY) -> Iterator[None]:
    """Turn a file system's error into one sentence, `cannot VERB URI: why; remedy`.

    Raises:
        FileNotFoundError: of `read`: what a missing file means is the caller's to explain.
        StorageError: any other error.
    """
    try:
        yield
    except StorageError:
        raise
    except Exception as error:  # such as botocore's NoCredentialsError
        why = explain(error, uri, remedy)
        if why is None and verb == "read" and isinstance(error, FileNotFoundError):
            raise
        raise StorageError(f"cannot {verb} {uri}: {why or _of_system(error, remedy)}") from error


def explain(error: Exception, uri: str, remedy: str = "choose another") -> str | None:
    """Why S3 refused, and what to do; None for any other error, or one that has no better words."""
    code = code_of(error)
    if code in HEAD_REFUSED:
        code = _code_for(uri)
    sentence = S3.get(code)
    return sentence and sentence.format(error=str(error).rstrip("."), remedy=remedy)


def code_of(error: Exception) -> str:
    """S3's code for an error, which s3fs keeps as the cause of its own, or botocore's class."""
    response = getattr(error.__cause__, "response", None)
    if isinstance(response, dict):
        return str(response.get("Error", {}).get("Code", ""))
    return type(error).__name__


def _code_for(uri: str) -> str:
    """The code with which a request is refused whose answer has one."""
    fs, path = filesystem_of(uri)
    try:
        fs.call_s3("list_objects_v2", Bucket=path.split("/")[0], MaxKeys=1)
    except Exception as error:
        return code_of(error)
    return ""


def _of_system(error: Exception, remedy: str) -> str:
    number = getattr(error, "errno", None) or next(
        (number for kind, number in CLASSES.items() if isinstance(error, kind)), None
    )
    sentence = SYSTEM.get(number) if number else None
    return (
        sentence.format(remedy=remedy) if sentence else str(getattr(error, "strerror", "") or error)
    )
