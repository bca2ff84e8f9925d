"""A Hugging Face hub on the loopback interface: what `datasets` asks of it, answered from files laid out as there.

Its client reads where the hub is when it is imported, so what reads from here is a process of its own:

    with serving({("someone/reviews", "main"): {"train.jsonl": lines(rows)}}) as address:
        subprocess.run(command, env={**os.environ, "HF_ENDPOINT": address, "HF_HOME": folder})
"""

from __future__ import annotations

import functools
import hashlib
import io
import json
import re
from collections.abc import Generator, Mapping, Sequence
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any, Final
from urllib.parse import parse_qs, unquote, urlsplit

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

_COMMIT: Final = re.compile("[0-9a-f]{40}")

Files = Mapping[str, bytes]
Repositories = Mapping[tuple[str, str], Files]
"""Id and revision (the name of a branch, or a commit) -> path -> what the file holds."""

Rows = Sequence[Mapping[str, Any]]


@contextmanager
def serving(repositories: Repositories) -> Generator[str]:
    """Yield the address of a hub that has these data sets; they may change while it is up."""
    with ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(_Handler, repositories)) as server:
        thread = Thread(target=functools.partial(server.serve_forever, poll_interval=0.02))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def commit(files: Files) -> str:
    """Return the commit that the name of a branch with these files stands for."""
    return _digest(b"".join(path.encode() + _digest(data).encode() for path, data in sorted(files.items())))


def lines(rows: Rows) -> bytes:
    """Return rows as JSON lines."""
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def parquet(rows: Rows, *, group: int | None = None, **labels: Sequence[str]) -> bytes:
    """Return rows as the hub's own conversion has them: columns of labels are numbers that know their names.

    Args:
        rows: Of numbers, texts, and pictures: `{"bytes": ..., "path": ...}`.
        group: Rows of a row group.
        labels: Column -> the names of its labels.
    """
    kinds = {int: datasets.Value("int64"), str: datasets.Value("string"), dict: datasets.Image()}
    shape: Any = datasets.Features(
        {
            name: datasets.ClassLabel(names=list(labels[name]))
            if name in labels
            else kinds.get(type(value), kinds[str])
            for name, value in rows[0].items()
        }
    )
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(list(rows), schema=shape.arrow_schema), file, row_group_size=group)
    return file.getvalue()


def card(configurations: Mapping[str, Sequence[str]]) -> bytes:
    """Return as much of a repository's card as says where each configuration (name -> its splits) has its files."""
    listed = [
        {
            "config_name": name,
            "data_files": [{"split": split, "path": f"{name}/{split}-*"} for split in splits],
        }
        for name, splits in configurations.items()
    ]
    return f"---\n{json.dumps({'configs': listed})}\n---\n".encode()  # JSON is YAML, too


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
        """Answer /api/datasets/ID[/KIND/REVISION[/PATH]], and /datasets/ID/resolve/REVISION/PATH."""
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        is_api = parts[0] == "api"
        owner, name, *rest = [*parts[2 if is_api else 1 :], "", ""]
        kind, revision, *path = [part for part in rest if part] or ["revision", "main"]
        files = self._files(f"{owner}/{name}", revision)
        if files is None:
            is_known = any(owned == f"{owner}/{name}" for owned, _ in self.repositories)
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound" if is_known else "RepoNotFound"})
        elif kind == "resolve":
            self._file(files.get("/".join(path)), _sha(revision, files))
        elif kind == "revision":
            siblings = [{"rfilename": path} for path in files]
            self._send_json({"id": f"{owner}/{name}", "sha": _sha(revision, files), "siblings": siblings, "tags": []})
        else:
            below = "/".join(path)
            asked = _paths(body, self.headers["Content-Type"]) if kind == "paths-info" else [below]
            self._send_json([entry for path in asked for entry in _entries(files, path, is_tree=kind == "tree")])

    def _files(self, name: str, revision: str) -> Files | None:
        """Return what a repository holds at a branch, or at the commit that stands for it."""
        known = {each: files for (owned, each), files in self.repositories.items() if owned == name}
        return known.get(revision) or {_sha(each, files): files for each, files in known.items()}.get(revision)

    def _file(self, data: bytes | None, sha: str) -> None:
        if data is None:
            self._send(404, b"", {"X-Error-Code": "EntryNotFound"})
            return
        headers = {"ETag": f'"{_digest(data)}"', "X-Repo-Commit": sha}
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
        if asked is None:
            self._send(200, data, headers)
            return
        first, last = int(asked[1]), min(int(asked[2]), len(data) - 1)
        self._send(206, data[first : last + 1], headers | {"Content-Range": f"bytes {first}-{last}/{len(data)}"})

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
        return [{"type": "directory", "path": below, "oid": _digest(b"")}] if inside else []
    return [
        *({"type": "directory", "path": path, "oid": _digest(b"")} for path in folders if path.startswith(start)),
        *(_entry(path, files[path]) for path in inside),
    ]


def _entry(path: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": path, "size": len(data), "oid": _digest(data)}


def _digest(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()


def _sha(revision: str, files: Files) -> str:
    """Return what a branch stands for; a commit stands for itself."""
    return revision if _COMMIT.fullmatch(revision) else commit(files)
