"""Files at any fsspec URI, written so that each is either absent or whole.

An output of a stage is a folder `<storage>/<stage>/<id>/` whose `manifest.json` is written last: it
names every file with its size and sha256, and its existence means that the output is complete.
"""

from pipeline.storage.files import (
    FileEntry,
    absolute,
    check_writable,
    copy,
    entry_of,
    exists,
    join,
    list_names,
    local_path,
    read_bytes,
    read_json,
    remove,
    sweep,
    write_bytes,
    write_json,
)
from pipeline.storage.hashes import canonical_json, digest, sha256
from pipeline.storage.lock import exclusive
from pipeline.storage.manifest import MANIFEST, Manifest, commit, read_manifest

__all__ = [
    "MANIFEST",
    "FileEntry",
    "Manifest",
    "absolute",
    "canonical_json",
    "check_writable",
    "commit",
    "copy",
    "digest",
    "entry_of",
    "exclusive",
    "exists",
    "join",
    "list_names",
    "local_path",
    "read_bytes",
    "read_json",
    "read_manifest",
    "remove",
    "sha256",
    "sweep",
    "write_bytes",
    "write_json",
]
