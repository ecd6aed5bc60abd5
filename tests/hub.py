"""A Hugging Face Hub on this machine: over real HTTP, as much of it as lists and reads a dataset.

GET /api/datasets/OWNER/NAME[/revision/main]        is there such a repository
GET /api/datasets/OWNER/NAME/tree/main[/FOLDER]     what is in it, in pages
GET /datasets/OWNER/NAME/resolve/main/FILE          a file, or where it is
GET /lfs/FILE                                       a large file, which lies beside git
"""

import hashlib
import json
import re
import threading
import uuid
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit

LARGE = (".parquet", ".tar")
COMMIT = "c" * 40


class Hub:
    """A server with one dataset: the files of a folder, as they are at each request."""

    def __init__(self, folder: Path, page: int = 1000) -> None:
        """
        Args:
            page: how many entries a page of a listing has at most.
        """
        self.repository = f"owner/set-{uuid.uuid4().hex[:8]}"
        self.uri = f"hf://datasets/{self.repository}"
        self.requests: list[str] = []
        """Path and query of each, in order."""
        self.token = ""
        """Who does not send it is told that there is no such repository."""
        self.gated = False
        """What there is can be seen by all, and read by none."""
        self.wrong: Callable[[str], int] = lambda path: 0
        """The status of an error to answer a path with, such as 503; or 0."""
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            wbufsize = -1  # headers and content go together: else each waits for the other's ACK

            def do_GET(self) -> None:
                hub.requests.append(self.path)
                if status := hub.wrong(self.path):
                    return self._refuse(status, "", "so it is")
                url = urlsplit(self.path)
                if url.path.startswith("/lfs/"):
                    return self._send_file(folder / unquote(url.path.removeprefix("/lfs/")))
                match = re.fullmatch(
                    rf"(?:/api)?/datasets/{hub.repository}"
                    r"(?:/(?P<verb>revision|tree|resolve)/(?P<revision>[^/]+)/?(?P<name>.*))?",
                    url.path,
                )
                allowed = not hub.token or self.headers["Authorization"] == f"Bearer {hub.token}"
                if not match or not allowed:
                    return self._refuse(401, "RepoNotFound", "Invalid username or password.")
                verb, name = match["verb"], unquote(match["name"] or "")
                if match["revision"] not in (None, "main", COMMIT):
                    return self._refuse(404, "RevisionNotFound", "Invalid rev id")
                if verb == "tree" and (folder / name).is_dir():
                    query = {key: values[0] for key, values in parse_qs(url.query).items()}
                    return self._list(folder / name, query)
                if verb == "resolve" and hub.gated:
                    return self._refuse(401, "GatedRepo", "You must have access to it.")
                if verb == "resolve" and (folder / name).is_file():
                    if name.endswith(LARGE):
                        return self._send(302, {"Location": f"/lfs/{quote(name)}"})
                    return self._send_file(folder / name)
                if verb in ("tree", "resolve"):
                    return self._refuse(404, "EntryNotFound", "Entry not found")
                self._send_json({"id": hub.repository, "sha": COMMIT, "private": bool(hub.token)})

            def _list(self, root: Path, query: dict[str, str]) -> None:
                found = root.rglob("*") if query["recursive"].lower() == "true" else root.iterdir()
                entries = [_entry(folder, path) for path in sorted(found)]
                start = int(query.pop("cursor", 0))
                headers = {}
                if start + page < len(entries):
                    path = self.path.partition("?")[0]
                    following = urlencode({**query, "cursor": start + page})
                    headers["Link"] = f'<{hub.endpoint}{path}?{following}>; rel="next"'
                self._send_json(entries[start : start + page], headers)

            def _send_file(self, path: Path) -> None:
                data = path.read_bytes()
                headers = {"ETag": f'"{_git_hash(data)}"', "X-Repo-Commit": COMMIT}
                wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                if not wanted:
                    return self._send(200, headers, data)
                first, last = int(wanted[1]), min(int(wanted[2] or len(data)), len(data) - 1)
                headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
                self._send(206, headers, data[first : last + 1])

            def _send_json(self, value: Any, headers: dict[str, str] | None = None) -> None:
                kind = {"Content-Type": "application/json"}
                self._send(200, {**kind, **(headers or {})}, json.dumps(value).encode())

            def _refuse(self, status: int, code: str, message: str) -> None:
                text = json.dumps({"error": message}).encode()
                self._send(status, {"X-Error-Code": code, "X-Error-Message": message}, text)

            def _send(self, status: int, headers: dict[str, str], data: bytes = b"") -> None:
                self.send_response_only(status)
                for name, value in {**headers, "Content-Length": str(len(data))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(data)

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.endpoint = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def listings(self) -> list[str]:
        """The requests for a page of a listing."""
        return [path for path in self.requests if "/tree/" in path]

    def reads(self) -> list[str]:
        """The names of the files that were asked for, once for each request."""
        return [path.split("/resolve/main/")[1] for path in self.requests if "/resolve/" in path]

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _entry(folder: Path, path: Path) -> dict[str, Any]:
    """Of a listing."""
    name = path.relative_to(folder).as_posix()
    if path.is_dir():
        return {"type": "directory", "oid": _git_hash(name.encode()), "size": 0, "path": name}
    data = path.read_bytes()
    entry = {"type": "file", "oid": _git_hash(data), "size": len(data), "path": name}
    if name.endswith(LARGE):  # in git there is a pointer
        sha256 = hashlib.sha256(data).hexdigest()
        pointer = f"oid sha256:{sha256}\nsize {len(data)}\n".encode()
        entry["oid"] = _git_hash(pointer)
        entry["lfs"] = {"oid": sha256, "size": len(data), "pointerSize": len(pointer)}
    return entry


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
