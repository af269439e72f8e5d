"""A stand-in for the Hub, on localhost: what its client asks for as it fetches and uploads."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import huggingface_hub


def isolate(monkeypatch, directory: Path) -> None:
    """Keep the Hub's client from this machine's settings, cache, token and proxies."""
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.setenv(name, "127.0.0.1")
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(directory / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(directory / "no token"))
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    # The Hub's newer storage has a protocol of its own, which only its own servers speak.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)


def use_endpoint(monkeypatch, endpoint: str) -> None:
    """Let the Hub's client talk to the server at `endpoint`."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@dataclass
class FakeHub:
    """Repositories as `{id: {revision: {path: content}}}`, and how to refuse them.

    Attributes:
        endpoint: Where it listens.
        repositories: What there is.
        refuse_listing: Status and error code with which every listing is answered.
        refuse_files: The same for every file.
        fetched: Paths of the files that were sent, in order.
        requests: Number of requests of any kind.
        users: Who may write what: tokens, and the owner that each may write for.
        private: Ids of the repositories that are private.
        refuse_writing: Status and error code with which every change is answered.
        large: Files of at least so many bytes are stored by their hash, apart from the others.
        objects: Those, by their hash, and whether the client had them verified.
        commits: What was committed: repository, branch, message and paths.
    """

    endpoint: str = ""
    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    refuse_listing: tuple[int, str] | None = None
    refuse_files: tuple[int, str] | None = None
    fetched: list[str] = field(default_factory=list)
    requests: int = 0
    users: dict[str, str] = field(default_factory=dict)
    private: set[str] = field(default_factory=set)
    refuse_writing: tuple[int, str] | None = None
    large: int = 10_000
    objects: dict[str, bytes] = field(default_factory=dict)
    verified: set[str] = field(default_factory=set)
    commits: list[tuple[str, str, str, list[str]]] = field(default_factory=list)

    @staticmethod
    def commit(revision: str) -> str:
        """The commit that a branch or tag points to."""
        return hashlib.sha1(revision.encode()).hexdigest()

    @contextmanager
    def running(self) -> Iterator[FakeHub]:
        """Answer requests for as long as the block runs."""
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
            self.endpoint = f"http://127.0.0.1:{server.server_port}"
            thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
            thread.start()
            try:
                yield self
            finally:
                server.shutdown()
                thread.join()


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub

    def do_GET(self) -> None:
        self._answer()

    def do_HEAD(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._change()

    def do_PUT(self) -> None:
        self._change()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def _answer(self) -> None:
        self.hub.requests += 1
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            self._list(parts[2:])
        elif len(parts) > 4 and parts[2] == "resolve":
            self._file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self._send(HTTPStatus.NOT_FOUND)

    def _list(self, parts: list[str]) -> None:
        """`owner/name/revision/R`, what it is, or `owner/name/tree/R`, its files.

        Without a revision it is the main branch's.
        """
        if self.hub.refuse_listing:
            return self._refuse(*self.hub.refuse_listing)
        name, (what, revision) = "/".join(parts[:2]), parts[2:4] or ("revision", "main")
        if name not in self.hub.repositories:
            return self._refuse(HTTPStatus.NOT_FOUND, "RepoNotFound")
        files = self._files(name, revision)
        if files is None:
            return self._refuse(HTTPStatus.NOT_FOUND, "RevisionNotFound")
        commit = revision if len(revision) == 40 else self.hub.commit(revision)
        if what == "revision":
            info = {"id": name, "sha": commit, "siblings": [], "private": name in self.hub.private}
            return self._send(HTTPStatus.OK, _json(info))
        tree = [
            {"type": "file", "path": path, "size": len(content), "oid": _etag(content)}
            for path, content in files.items()
        ]
        return self._send(HTTPStatus.OK, _json(tree))

    def _file(self, name: str, revision: str, path: str) -> None:
        if self.hub.refuse_files:
            return self._refuse(*self.hub.refuse_files)
        if name not in self.hub.repositories:
            return self._refuse(HTTPStatus.NOT_FOUND, "RepoNotFound")
        files = self._files(name, revision)
        if files is None:
            return self._refuse(HTTPStatus.NOT_FOUND, "RevisionNotFound")
        content = files.get(path)
        if content is None:
            return self._refuse(HTTPStatus.NOT_FOUND, "EntryNotFound")
        if self.command == "GET":
            self.hub.fetched.append(path)
        commit = revision if len(revision) == 40 else self.hub.commit(revision)
        headers = {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": commit}
        return self._send(HTTPStatus.OK, content, headers)

    def _files(self, name: str, revision: str) -> dict[str, bytes] | None:
        for branch, files in self.hub.repositories.get(name, {}).items():
            if revision in (branch, self.hub.commit(branch)):
                return files
        return None

    def _change(self) -> None:
        """Whatever writes. Each method below answers one kind of request."""
        self.hub.requests += 1
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = unquote(urlsplit(self.path).path).strip("/").split("/")
        if parts[0] == "objects":
            # Its address is a secret of its own, as in the Hub's real storage.
            return self._store(parts[1], body)
        if self.hub.refuse_writing:
            return self._refuse(*self.hub.refuse_writing)
        user = self.hub.users.get((self.headers.get("Authorization") or "").removeprefix("Bearer "))
        if user is None:
            return self._refuse(
                HTTPStatus.UNAUTHORIZED, "", "Invalid credentials in Authorization header"
            )
        if parts == ["api", "repos", "create"]:
            return self._create(user, json.loads(body))
        if parts == ["api", "validate-yaml"]:
            return self._validate(json.loads(body))
        if parts[2:] == ["info", "lfs", "objects", "batch"]:
            return self._batch(json.loads(body))
        if parts[:2] == ["api", "verify"]:
            return self._verify(json.loads(body))
        if parts[:2] != ["api", "models"]:
            return self._send(HTTPStatus.NOT_FOUND)
        name, what, branch = "/".join(parts[2:4]), parts[4], "/".join(parts[5:])
        if parts[2] != user:
            return self._refuse(HTTPStatus.FORBIDDEN, "", f"you may not write to {name}")
        if name not in self.hub.repositories:
            return self._refuse(HTTPStatus.NOT_FOUND, "RepoNotFound")
        if what == "branch":
            branches = self.hub.repositories[name]
            branches[branch] = dict(branches["main"])
            return self._send(HTTPStatus.OK, _json({}))
        if branch not in self.hub.repositories[name]:
            return self._refuse(HTTPStatus.NOT_FOUND, "RevisionNotFound")
        if what == "preupload":
            return self._preupload(json.loads(body))
        return self._commit(name, branch, [json.loads(line) for line in body.splitlines()])

    def _create(self, user: str, asked: dict[str, str | None]) -> None:
        owner = asked["organization"] or user
        name = f"{owner}/{asked['name']}"
        if owner != user:
            return self._refuse(HTTPStatus.FORBIDDEN, "", f"you may not create {name}")
        answer = _json({"url": f"{self.hub.endpoint}/{name}"})
        if name in self.hub.repositories:
            return self._send(HTTPStatus.CONFLICT, answer)
        self.hub.repositories[name] = {"main": {".gitattributes": b"*.onnx filter=lfs\n"}}
        if asked.get("visibility") == "private":
            self.hub.private.add(name)
        return self._send(HTTPStatus.OK, answer)

    def _validate(self, asked: dict[str, str]) -> None:
        if "license: invalid" in asked["content"]:
            errors = [{"message": '"license" must be one of [apache-2.0, mit]'}]
            return self._send(HTTPStatus.BAD_REQUEST, _json({"errors": errors, "warnings": []}))
        return self._send(HTTPStatus.OK, _json({"errors": [], "warnings": []}))

    def _preupload(self, asked: dict[str, list[dict]]) -> None:
        files = [
            {
                "path": file["path"],
                "uploadMode": "lfs" if file["size"] >= self.hub.large else "regular",
                "shouldIgnore": False,
            }
            for file in asked["files"]
        ]
        self._send(HTTPStatus.OK, _json({"files": files}))

    def _batch(self, asked: dict[str, list[dict]]) -> None:
        objects = []
        for entry in asked["objects"]:
            if entry["oid"] not in self.hub.objects:
                upload = {"href": f"{self.hub.endpoint}/objects/{entry['oid']}"}
                verify = {"href": f"{self.hub.endpoint}/api/verify"}
                entry = {**entry, "actions": {"upload": upload, "verify": verify}}
            objects.append(entry)
        self._send(HTTPStatus.OK, _json({"transfer": "basic", "objects": objects}))

    def _store(self, oid: str, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != oid:
            return self._send(HTTPStatus.BAD_REQUEST)
        self.hub.objects[oid] = content
        return self._send(HTTPStatus.OK)

    def _verify(self, asked: dict) -> None:
        if len(self.hub.objects.get(asked["oid"], b"")) != asked["size"]:
            return self._send(HTTPStatus.NOT_FOUND)
        self.hub.verified.add(asked["oid"])
        return self._send(HTTPStatus.OK, _json({}))

    def _commit(self, name: str, branch: str, lines: list[dict]) -> None:
        files = self.hub.repositories[name][branch]
        paths = []
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                content = base64.b64decode(value["content"])
            else:
                content = self.hub.objects[value["oid"]]
            files[value["path"]] = content
            paths.append(value["path"])
        self.hub.commits.append((name, branch, lines[0]["value"]["summary"], paths))
        commit = self.hub.commit(branch)
        url = f"{self.hub.endpoint}/{name}/commit/{commit}"
        self._send(HTTPStatus.OK, _json({"commitUrl": url, "commitOid": commit}))

    def _refuse(self, status: int, code: str, message: str = "refused") -> None:
        self._send(status, headers={"X-Error-Code": code, "X-Error-Message": message})

    def _send(
        self, status: int, content: bytes = b"", headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _json(value: object) -> bytes:
    return json.dumps(value).encode()
