"""API keys: who may ask the service."""

from pipeline import storage
from pipeline.errors import ConfigError
from pipeline.storage import sha256

LEAST_KEY = 16
"""Characters of an API key."""


def read_keys(path: str) -> dict[str, str]:
    """The name of each client by the sha256 of its API key, from a file of lines `NAME KEY`.

    Raises:
        ConfigError: the file cannot be read, or a line is something else.
    """
    keys: dict[str, str] = {}
    try:
        lines = storage.read_bytes(path).decode().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--api-keys {path} cannot be read: {error}") from error
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or line.startswith("#"):
            continue
        # the line is not shown: it may hold a key
        if len(words) != 2 or len(words[1]) < LEAST_KEY:
            raise ConfigError(
                f"--api-keys {path}, line {number}: must be a name and a key of at least "
                f"{LEAST_KEY} characters, with a space between"
            )
        if keys.setdefault(sha256(words[1].encode()), words[0]) != words[0]:
            raise ConfigError(f"--api-keys {path}, line {number}: the key of another name")
    if not keys:
        raise ConfigError(f"--api-keys {path} holds no key: write lines `NAME KEY`")
    return keys
