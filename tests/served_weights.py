"""A server on this machine that plays the Hugging Face hub, and a host of files."""

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit


def commit_of(files: dict[str, bytes]) -> str:
    """40 hex digits, as git names a commit."""
    return hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()


@dataclass
class Repo:
    """A repository: the files of each of its branches."""

    branches: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"main": {}})
    private: bool = False
    gated: bool = False


@dataclass
class Served:
    """What the server has, and what it was asked.

    `cuts`: bytes after which a connection ends, used up one download each.
    `goes_on`: whether a request for the rest of a file gets it.
    `says_length`: whether an answer has the length of a file; a connection that ends is then all that tells its end.
    `says_version`: whether an answer has the ETag of a file.
    `answers`: (status, headers, body) for a path below /files/, in place of a file.
    """

    address: str = ""
    repos: dict[str, Repo] = field(default_factory=dict)
    files: dict[str, bytes] = field(default_factory=dict)
    answers: dict[str, tuple[int, dict[str, str], bytes]] = field(default_factory=dict)
    cuts: list[int] = field(default_factory=list)
    goes_on: bool = True
    says_length: bool = True
    says_version: bool = True
    token: str = "hf_right"
    is_down: bool = False
    requests: list[str] = field(default_factory=list)  # "GET /path", with the first byte where it was asked for a rest
    cards: list[str] = field(default_factory=list)  # README.md that the hub was to check

    def asked(self, method: str, part: str) -> list[str]:
        return [request for request in self.requests if request.startswith(f"{method} ") and part in request]


@contextlib.contextmanager
def serve() -> Iterator[Served]:
    served = Served()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"served": served}))
    served.address = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    served: Served
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._get(with_body=False)

    def do_GET(self) -> None:
        self._get(with_body=True)

    def _get(self, *, with_body: bool) -> None:
        path = unquote(urlsplit(self.path).path)
        first = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        self.served.requests.append(f"{self.command} {path}" + (f" from {first[1]}" if first else ""))
        if self.served.is_down:
            return self._send(503, {}, b"")
        if path.startswith("/files/"):
            name = path.removeprefix("/files/")
            if name in self.served.answers:
                return self._send(*self.served.answers[name])
            if name not in self.served.files:
                return self._send(404, {}, b"")
            return self._send_file(self.served.files[name], {}, with_body)
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
            return self._repo_info(found[1], found[2] or "main")
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            return self._repo_file(found[1], found[2], found[3], with_body)
        return self._send(404, {}, b"")

    def _repo(self, name: str) -> Repo | None:
        """The repository, if it may be read; otherwise the answer has been sent."""
        repo = self.served.repos.get(name)
        is_known = self.headers.get("authorization") == f"Bearer {self.served.token}"
        if repo is None or (repo.private and not is_known):
            self._error(404 if is_known else 401, "RepoNotFound")
        elif repo.gated and not is_known:
            self._error(403, "GatedRepo")
        else:
            return repo
        return None

    def _repo_info(self, name: str, revision: str) -> None:
        if (repo := self._repo(name)) is None:
            return
        if (files := self._files(repo, revision)) is None:
            return self._error(404, "RevisionNotFound")
        siblings = [{"rfilename": file, "size": len(content)} for file, content in files.items()]
        info = {"id": name, "modelId": name, "sha": commit_of(files), "private": repo.private, "siblings": siblings}
        return self._json(info)

    def _repo_file(self, name: str, revision: str, file: str, with_body: bool) -> None:
        if (repo := self._repo(name)) is None:
            return
        if (files := self._files(repo, revision)) is None:
            return self._error(404, "RevisionNotFound")
        if file not in files:
            return self._error(404, "EntryNotFound")
        return self._send_file(files[file], {"X-Repo-Commit": commit_of(files)}, with_body)

    def _files(self, repo: Repo, revision: str) -> dict[str, bytes] | None:
        by_commit = {commit_of(files): files for files in repo.branches.values()}
        return repo.branches.get(revision, by_commit.get(revision))

    def _send_file(self, content: bytes, headers: dict[str, str], with_body: bool) -> None:
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        headers = headers | ({"ETag": etag} if self.served.says_version else {})
        headers |= {"Accept-Ranges": "bytes", "Content-Type": "application/octet-stream"}
        first = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        is_same = self.served.goes_on and self.headers.get("If-Range", etag) == etag
        start = int(first[1]) if first and is_same else 0
        if start >= len(content) > 0:
            return self._send(416, headers | {"Content-Range": f"bytes */{len(content)}"}, b"")
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        return self._send(206 if start else 200, headers, content[start:], with_body)

    def _send(self, status: int, headers: dict[str, str], body: bytes, with_body: bool = True) -> None:
        self.send_response(status)
        length = {"Content-Length": str(len(body))}
        if "Accept-Ranges" in headers and not self.served.says_length:
            length = {"Connection": "close"}  # and so does the server: the header tells it to
        for name, value in (length | headers).items():
            self.send_header(name, value)
        self.end_headers()
        if not with_body:
            return
        most = self.served.cuts.pop(0) if self.served.cuts and "Accept-Ranges" in headers else len(body)
        self.wfile.write(body[:most])
        if most < len(body):
            self.close_connection = True

    def _error(self, status: int, code: str) -> None:
        self._send(status, {"X-Error-Code": code, "X-Error-Message": code}, b"")

    def _json(self, content: Any, status: int = 200) -> None:
        self._send(status, {"Content-Type": "application/json"}, json.dumps(content).encode())

    def do_POST(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.served.requests.append(f"POST {path}")
        sent = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("authorization") != f"Bearer {self.served.token}":
            return self._error(401, "Unauthorized")
        if path == "/api/repos/create":
            return self._create(json.loads(sent))
        if path == "/api/validate-yaml":
            self.served.cards.append(json.loads(sent)["content"])
            return self._json({"errors": [], "warnings": []})
        if found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/(preupload|branch|commit)/(.+)", path):
            return {"preupload": self._preupload, "branch": self._branch, "commit": self._commit}[found[2]](
                found[1], found[3], sent
            )
        return self._send(404, {}, b"")

    def _create(self, wish: dict[str, Any]) -> None:
        name = f"{wish['organization']}/{wish['name']}"
        if name in self.served.repos:
            return self._json(
                {"error": "You already created this model repo", "url": f"{self.served.address}/{name}"}, 409
            )
        is_private = wish.get("private") is True or wish.get("visibility") == "private"
        self.served.repos[name] = Repo(private=is_private)
        return self._json({"url": f"{self.served.address}/{name}", "name": name})

    def _preupload(self, name: str, revision: str, sent: bytes) -> None:
        files = [
            {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False, "oid": None}
            for file in json.loads(sent)["files"]
        ]
        self._json({"files": files})

    def _branch(self, name: str, revision: str, sent: bytes) -> None:
        branches = self.served.repos[name].branches
        branches[revision] = dict(branches["main"])
        self._json({})

    def _commit(self, name: str, revision: str, sent: bytes) -> None:
        lines = [json.loads(line) for line in sent.splitlines()]
        files = self.served.repos[name].branches[revision]
        for line in lines:
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
        commit = commit_of(files)
        self._json({"commitUrl": f"{self.served.address}/{name}/commit/{commit}", "commitOid": commit})
