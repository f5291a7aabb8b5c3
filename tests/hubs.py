"""A Hugging Face Hub on this machine: the requests of the real client are answered out of memory."""

import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import pytest

NOBODY = "http://127.0.0.1:9"
"""An address where no one listens."""


def commit_of(files: dict[str, bytes]) -> str:
    return hashlib.sha1(b"".join(name.encode() + files[name] for name in sorted(files))).hexdigest()


@dataclass
class Hub:
    address: str
    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict, repr=False)
    """`models/owner/name` or `datasets/owner/name` -> branch or commit -> file -> content."""
    breaks: bool = False
    """Whether connections break off in the middle of an answer."""
    asked: list[str] = field(default_factory=list)
    """Requests, "GET /api/...", in their order."""

    def add(self, repository: str, files: dict[str, bytes] | Path, branch: str = "main") -> str:
        """Files of a branch; returns their commit."""
        if isinstance(files, Path):
            paths = (path for path in files.rglob("*") if path.is_file())
            files = {path.relative_to(files).as_posix(): path.read_bytes() for path in paths}
        commits = self.repositories.setdefault(repository, {})
        commits[branch] = commits[commit_of(files)] = files
        return commit_of(files)

    def answer(self, method: str, path: str) -> tuple[int, dict[str, str], bytes]:
        self.asked.append(f"{method} {path}")
        parts = [unquote(part) for part in urlsplit(path).path.strip("/").split("/")]
        kind = parts[1] if parts[0] == "api" else "datasets" if parts[0] == "datasets" else "models"
        parts = parts[2 if parts[0] == "api" else parts[0] == "datasets" :]
        commits = self.repositories.get(f"{kind}/{'/'.join(parts[:2])}")
        if commits is None:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        verb, revision, rest = (parts[2] if len(parts) > 2 else "", parts[3] if len(parts) > 3 else "main", parts[4:])
        files = commits.get(revision)
        if files is None:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        commit = commit_of(files)
        if verb == "tree":
            listed = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
            return 200, {}, json.dumps(listed).encode()
        if verb == "resolve":
            data = files["/".join(rest)]
            return 200, {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}, data
        about = {"id": "/".join(parts[:2]), "sha": commit, "siblings": [{"rfilename": name} for name in files]}
        return 200, {}, json.dumps(about).encode()


@contextmanager
def serving() -> Iterator[Hub]:
    hub = Hub("")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status, headers, data = hub.answer(self.command, self.path)
            self.send_response(status)
            for name, value in (headers | {"Content-Length": str(len(data))}).items():
                self.send_header(name, value)
            self.end_headers()
            if hub.breaks:
                self.close_connection = True
                return
            if self.command == "GET":
                self.wfile.write(data)

        do_HEAD = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.address = f"http://127.0.0.1:{server.server_address[1]}"
    Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()


def ask(monkeypatch: pytest.MonkeyPatch, address: str, cache: Path, *, offline: bool = False) -> None:
    """From now on the client knows this Hub, and this cache."""
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", address)
    places = f"{address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", places)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", offline)
