"""A stand-in for the Hub: what its client asks for when it fetches a snapshot, on localhost."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit


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
    """

    endpoint: str = ""
    repositories: dict[str, dict[str, dict[str, bytes]]] = field(default_factory=dict)
    refuse_listing: tuple[int, str] | None = None
    refuse_files: tuple[int, str] | None = None
    fetched: list[str] = field(default_factory=list)
    requests: int = 0

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
        """`owner/name/revision/R`, what it is, or `owner/name/tree/R`, its files."""
        if self.hub.refuse_listing:
            return self._refuse(*self.hub.refuse_listing)
        name, (what, revision) = "/".join(parts[:2]), parts[2:4]
        if name not in self.hub.repositories:
            return self._refuse(HTTPStatus.NOT_FOUND, "RepoNotFound")
        files = self._files(name, revision)
        if files is None:
            return self._refuse(HTTPStatus.NOT_FOUND, "RevisionNotFound")
        commit = revision if len(revision) == 40 else self.hub.commit(revision)
        if what == "revision":
            return self._send(HTTPStatus.OK, _json({"id": name, "sha": commit, "siblings": []}))
        tree = [
            {"type": "file", "path": path, "size": len(content), "oid": _etag(content)}
            for path, content in files.items()
        ]
        return self._send(HTTPStatus.OK, _json(tree))

    def _file(self, name: str, revision: str, path: str) -> None:
        if self.hub.refuse_files:
            return self._refuse(*self.hub.refuse_files)
        content = (self._files(name, revision) or {}).get(path)
        if content is None:
            return self._refuse(HTTPStatus.NOT_FOUND, "EntryNotFound")
        if self.command == "GET":
            self.hub.fetched.append(path)
        headers = {"ETag": f'"{_etag(content)}"', "X-Repo-Commit": revision}
        return self._send(HTTPStatus.OK, content, headers)

    def _files(self, name: str, revision: str) -> dict[str, bytes] | None:
        for branch, files in self.hub.repositories.get(name, {}).items():
            if revision in (branch, self.hub.commit(branch)):
                return files
        return None

    def _refuse(self, status: int, code: str) -> None:
        self._send(status, headers={"X-Error-Code": code, "X-Error-Message": "refused"})

    def _send(
        self, status: int, content: bytes = b"", headers: dict[str, str] | None = None
    ) -> None:
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)


def _etag(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def _json(value: object) -> bytes:
    return json.dumps(value).encode()
