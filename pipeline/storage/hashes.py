"""Hashes by which content and outputs are named."""

import hashlib
import json
from typing import Any


def sha256(data: bytes | memoryview) -> str:
    """The SHA-256 of some bytes, in hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def digest(value: Any) -> str:
    """A short stable name for a JSON-able value: 16 hex digits of its sha256."""
    return sha256(canonical_json(value).encode())[:16]


def canonical_json(value: Any) -> str:
    """JSON with sorted keys and no spaces, the same for equal values; NaN is refused."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
