"""A loopback server that speaks just enough of the hub's protocol; the real network is never touched."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from huggingface_hub import constants
from huggingface_hub.utils import close_session

TOKEN = "hf_secret"


@dataclass
class FakeHub:
    """What the server serves, and what it was asked for."""

    url: str = ""
    repos: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)  # id -> commit -> files
    refs: dict[tuple[str, str], str] = field(default_factory=dict)  # (id, branch) -> commit
    tags: dict[str, list[str]] = field(default_factory=dict)  # of models, by id
    gated: set[str] = field(default_factory=set)
    private: set[str] = field(default_factory=set)
    status: int | None = None  # every answer fails with it
    body: bytes | None = None  # every answer is this
    answers: dict[str, tuple[int, bytes, dict[str, str]]] = field(default_factory=dict)  # part of a path -> answer
    cuts: str | None = None  # answers to paths with this in them end in the middle
    requests: list[str] = field(default_factory=list)
    weight_bytes: int = 0  # sent of files of weights

    def publish(self, repo_id: str, files: dict[str, bytes], branch: str = "main") -> str:
        commit = hashlib.sha1(repr((repo_id, sorted(files.items()))).encode()).hexdigest()
        self.repos.setdefault(repo_id, {})[commit] = files
        self.refs[repo_id, branch] = commit
        return commit

    def commit(self, repo_id: str, revision: str) -> str | None:
        return revision if revision in self.repos[repo_id] else self.refs.get((repo_id, revision))

    def num_downloads(self) -> int:
        return sum(line.startswith("GET") and ("/resolve/" in line or "/cdn/" in line) for line in self.requests)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *args) -> None:
        pass

    def reply(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command == "GET":
            is_cut = self.hub.cuts is not None and self.hub.cuts in self.path
            self.wfile.write(body[: len(body) // 2] if is_cut else body)
            self.close_connection = self.close_connection or is_cut

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        self.hub.requests.append(f"{self.command} {self.path}")
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if self.hub.status is not None:
            self.reply(self.hub.status)
        elif self.hub.body is not None:
            self.reply(200, self.hub.body)
        elif (answer := next((each for part, each in self.hub.answers.items() if part in self.path), None)) is not None:
            self.reply(answer[0], answer[1], **answer[2])
        elif parts[:2] == ["api", "models"]:
            self.serve_api("/".join(parts[2:4]), parts[4:])
        elif parts[0] == "cdn":
            assert "Authorization" not in self.headers  # the token is the hub's alone
            self.serve_weights(next(body for body in self.all_files() if hashlib.sha256(body).hexdigest() == parts[1]))
        elif parts[2:3] == ["resolve"]:
            self.serve_file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self.reply(404)

    def all_files(self) -> Iterator[bytes]:
        for commits in self.hub.repos.values():
            for files in commits.values():
                yield from files.values()

    def allowed(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def find(self, repo_id: str, revision: str) -> str | None:
        """The commit, or None after an error has been sent."""
        if repo_id not in self.hub.repos or (repo_id in self.hub.private and not self.allowed()):
            self.reply(401 if not self.allowed() else 404, X_Error_Code="RepoNotFound")
            return None
        commit = self.hub.commit(repo_id, revision)
        if commit is None:
            self.reply(404, X_Error_Code="RevisionNotFound")
        return commit

    def serve_api(self, repo_id: str, rest: list[str]) -> None:
        commit = self.find(repo_id, rest[1] if len(rest) > 1 else "main")
        if commit is None:
            return
        files = self.hub.repos[repo_id][commit]
        if rest[:1] == ["tree"]:
            answer: object = [
                {"type": "file", "path": name, "size": len(body), "oid": hashlib.sha1(body).hexdigest()}
                for name, body in files.items()
            ]
        else:  # public even for gated repositories, as on the hub
            answer = {"id": repo_id, "sha": commit, "siblings": [{"rfilename": name} for name in files]}
            answer["tags"] = self.hub.tags.get(repo_id, [])
        self.reply(200, json.dumps(answer).encode(), Content_Type="application/json")

    def serve_file(self, repo_id: str, revision: str, name: str) -> None:
        commit = self.find(repo_id, revision)
        if commit is None:
            return
        if repo_id in self.hub.gated and not self.allowed():
            self.reply(403, X_Error_Code="GatedRepo")
            return
        body = self.hub.repos[repo_id][commit].get(name)
        if body is None:
            self.reply(404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        elif name.endswith((".safetensors", ".gguf")):  # as for large files: a redirect to the content's own address
            digest = hashlib.sha256(body).hexdigest()
            self.reply(
                302,
                X_Repo_Commit=commit,
                X_Linked_Etag=f'"{digest}"',
                X_Linked_Size=str(len(body)),
                Location=f"{self.hub.url.replace('127.0.0.1', 'localhost')}/cdn/{digest}",  # another host
            )
        else:
            self.reply(200, body, X_Repo_Commit=commit, ETag=f'"{hashlib.sha1(body).hexdigest()}"')

    def serve_weights(self, body: bytes) -> None:
        """Send the bytes that were asked for, or all of them."""
        asked, status, headers = self.headers.get("Range"), 200, {}
        if asked is not None:
            first, last = (int(each or len(body)) for each in asked.removeprefix("bytes=").split("-"))
            headers["Content-Range"] = f"bytes {first}-{min(last, len(body) - 1)}/{len(body)}"
            body, status = body[first : last + 1], 206
        self.hub.weight_bytes += len(body) * (self.command == "GET")
        self.reply(status, body, **headers)


@contextmanager
def serving() -> Iterator[FakeHub]:
    """A hub on the loopback interface, as long as it lasts."""
    hub = FakeHub()
    handler = type("BoundHandler", (Handler,), {"hub": hub})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        server.daemon_threads = True
        hub.url = f"http://127.0.0.1:{server.server_address[1]}"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        thread.start()
        yield hub
        server.shutdown()


def point_to(monkeypatch, url: str, cache: Path) -> None:
    """huggingface_hub reads its environment at import, so its constants are set instead."""
    monkeypatch.setattr(constants, "ENDPOINT", url)
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url + "/{repo_id}/resolve/{revision}/{filename}")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(cache.parent / "token"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    close_session()


@contextmanager
def serving_here(monkeypatch, cache: Path) -> Iterator[FakeHub]:
    """A hub that this process downloads from, into an empty cache."""
    with serving() as hub:
        point_to(monkeypatch, hub.url, cache)
        yield hub
    close_session()
