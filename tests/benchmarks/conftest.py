"""A Hugging Face hub on the loopback interface: what `datasets` asks of it, answered from files laid out as there."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Callable, Generator, Mapping
from contextlib import AbstractContextManager, contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, Final
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

COMMIT: Final = "c0ffee" + 34 * "0"
"""What the name of a branch stands for; a commit stands for itself."""

Files = Mapping[str, bytes]
Repositories = Mapping[tuple[str, str], Files]
"""Id and revision -> path -> what the file holds."""


@contextmanager
def serving(repositories: Repositories) -> Generator[str]:
    """Yield the address of a hub that has these data sets."""
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, repositories)) as server:
        thread = Thread(target=functools.partial(server.serve_forever, poll_interval=0.02))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


@pytest.fixture(scope="session")
def hub() -> Callable[[Repositories], AbstractContextManager[str]]:
    """Return what starts a hub that has some data sets, and yields its address."""
    return serving


class _Handler(BaseHTTPRequestHandler):
    def __init__(self, repositories: Repositories, *given: Any) -> None:
        self.repositories = repositories
        super().__init__(*given)

    def do_HEAD(self) -> None:
        self._answer(b"")

    def do_GET(self) -> None:
        self._answer(b"")

    def do_POST(self) -> None:
        self._answer(self.rfile.read(int(self.headers["Content-Length"])))

    def log_message(self, format: str, *args: Any) -> None:
        """Keep still."""

    def _answer(self, body: bytes) -> None:
        """Answer /api/datasets/ID/KIND/REVISION[/PATH], and /datasets/ID/resolve/REVISION/PATH."""
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        is_api = parts[0] == "api"
        owner, name, kind, revision, *path = [*parts[2 if is_api else 1 :], *4 * [""]]
        path = [part for part in path if part]
        files = self._files(f"{owner}/{name}", revision)
        if files is None:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        elif kind == "resolve":
            self._file(files.get("/".join(path)), revision)
        elif kind == "revision":
            siblings = [{"rfilename": path} for path in files]
            self._send_json({"id": f"{owner}/{name}", "sha": _sha(revision), "siblings": siblings, "tags": []})
        else:
            below = "/".join(path)
            asked = _paths(body, self.headers["Content-Type"]) if kind == "paths-info" else [below]
            self._send_json([entry for path in asked for entry in _entries(files, path, is_tree=kind == "tree")])

    def _files(self, name: str, revision: str) -> Files | None:
        """Return what a repository holds at a branch, or at the commit that stands for it."""
        known = {each: files for (owned, each), files in self.repositories.items() if owned == name}
        return known.get(revision) or {_sha(each): files for each, files in known.items()}.get(revision)

    def _file(self, data: bytes | None, revision: str) -> None:
        if data is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        self._send(200, data, {"ETag": f'"{_digest(data)}"', "X-Repo-Commit": _sha(revision)})

    def _send_json(self, value: Any) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, data: bytes, headers: Mapping[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


def _paths(body: bytes, kind: str) -> list[str]:
    return list(json.loads(body)["paths"]) if "json" in kind else parse_qs(body.decode())["paths"]


def _entries(files: Files, below: str, *, is_tree: bool) -> list[dict[str, Any]]:
    """Return the file of that name; of a tree, and of a folder, all files and folders below it."""
    if below in files and not is_tree:
        return [_entry(below, files[below])]
    start = f"{below}/" if below else ""
    inside = [path for path in files if path.startswith(start)]
    folders = sorted({path[: at + 1].rstrip("/") for path in inside for at, mark in enumerate(path) if mark == "/"})
    if not is_tree:
        return [{"type": "directory", "path": below, "oid": COMMIT}] if inside else []
    return [
        *({"type": "directory", "path": path, "oid": COMMIT} for path in folders if path.startswith(start)),
        *(_entry(path, files[path]) for path in inside),
    ]


def _entry(path: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(data), "oid": _digest(data)}


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _sha(revision: str) -> str:
    return revision if len(revision) == len(COMMIT) else COMMIT
