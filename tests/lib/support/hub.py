"""A small hub on loopback, the ways in which its downloads go wrong, uploads to it, and pins on what it serves."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from gptoss_convert.convert.official import SCHEMA, Table, table_from
from gptoss_convert.formats.safetensors import build_header

PAGE = 2  # entries per page of a listing: small, so that every listing has several


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Hub:
    """One repository. A file in `corrupt` is sent with one bit changed; in `short`, without its last bytes; the server
    cuts the connection, and answers nothing more, once `dies_after` bytes of file contents were sent."""

    repo: str
    commit: str
    files: dict[str, bytes]
    lfs: tuple[str, ...] = (".safetensors", ".bin", "tokenizer.json")
    branches: dict[str, str] = field(default_factory=dict)
    corrupt: set[str] = field(default_factory=set)
    short: set[str] = field(default_factory=set)
    listed_otherwise: dict[str, bytes] = field(default_factory=dict)
    dies_after: int | None = None
    private: bool = False
    token: str | None = None  # what may write; None: nothing may
    made_private: bool | None = None  # how the repository was asked for, once it was
    spoils: set[str] = field(default_factory=set)  # files that arrive with one bit changed
    stored: dict[str, bytes] = field(default_factory=dict)  # LFS objects by their SHA-256
    requests: list[str] = field(default_factory=list)
    url: str = ""
    sent: int = 0
    dead: bool = False

    def content(self, name: str) -> bytes:
        content = self.files[name]
        if name in self.corrupt:
            content = content[:-1] + bytes([content[-1] ^ 1])
        return content[:-5] if name in self.short else content

    def is_lfs(self, name: str) -> bool:
        return name.endswith(self.lfs) or len(self.files.get(name, b"")) > 1 << 20

    def tree(self) -> list[dict[str, object]]:
        folders = sorted({name.rpartition("/")[0] for name in self.files if "/" in name})
        entries: list[dict[str, object]] = [{"type": "directory", "path": path, "oid": "0" * 40} for path in folders]
        for name, served in sorted(self.files.items()):
            content = self.listed_otherwise.get(name, served)
            entry: dict[str, object] = {"type": "file", "path": name, "size": len(content), "oid": git_sha1(content)}
            if self.is_lfs(name):
                entry["lfs"] = {"oid": sha256(content), "size": len(content), "pointerSize": 134}
            entries.append(entry)
        return entries

    def downloads(self, name: str) -> int:
        return sum(
            request in (f"GET /{self.repo}/resolve/{self.commit}/{name}", f"GET /cdn/{name}")
            for request in self.requests
        )


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        self._write(self.rfile.read(int(self.headers.get("Content-Length", 0))))

    def do_PUT(self) -> None:
        self.do_POST()

    def _write(self, body: bytes) -> None:
        """An upload's steps: repository, which files are large, where those go, the bytes, the commit."""
        hub, path = self.hub, unquote(urlsplit(self.path).path)
        hub.requests.append(f"{self.command} {path}")
        api = f"/api/models/{hub.repo}"
        if path.startswith("/objects/"):  # the store takes signed addresses, no tokens
            hub.stored[path.removeprefix("/objects/")] = body
            self._send(200, b"", {})
        elif path == "/api/validate-yaml":
            self._json({"errors": [], "warnings": []})
        elif hub.token is None or self.headers.get("Authorization") != f"Bearer {hub.token}":
            self._error(401, "Unauthorized")
        elif path == "/api/repos/create":
            self._create(json.loads(body))
        elif path == f"{api}/preupload/main":
            modes = ((file["path"], file["size"]) for file in json.loads(body)["files"])
            listed = [
                {
                    "path": p,
                    "uploadMode": "lfs" if hub.is_lfs(p) or size > 1 << 20 else "regular",
                    "shouldIgnore": False,
                }
                for p, size in modes
            ]
            self._json({"files": listed})
        elif path == f"/{hub.repo}.git/info/lfs/objects/batch":
            wanted = json.loads(body)["objects"]
            self._json({"transfer": "basic", "objects": [self._object(o["oid"], o["size"]) for o in wanted]})
        elif path == f"{api}/commit/main":
            self._commit([json.loads(line) for line in body.splitlines()])
        else:
            self._error(404, "RepoNotFound")

    def _create(self, asked: dict[str, Any]) -> None:
        hub = self.hub
        if "/".join(filter(None, (asked.get("organization"), asked["name"]))) != hub.repo:
            self._error(403, "Forbidden")
        elif hub.made_private is not None:
            self._send(409, json.dumps({"url": f"{hub.url}/{hub.repo}"}).encode(), {"X-Error-Message": "exists"})
        else:
            hub.made_private = asked.get("private", asked.get("visibility") == "private")
            self._json({"url": f"{hub.url}/{hub.repo}"})

    def _object(self, oid: str, size: int) -> dict[str, Any]:
        upload = {"upload": {"href": f"{self.hub.url}/objects/{oid}", "header": {}}}
        return {"oid": oid, "size": size} | ({} if oid in self.hub.stored else {"actions": upload})

    def _commit(self, lines: list[dict[str, Any]]) -> None:
        hub = self.hub
        files = dict(hub.files)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = hub.stored.get(value["oid"])
                if content is None or sha256(content) != value["oid"] or len(content) != value["size"]:
                    self._error(400, "LfsObjectMissing")
                    return
                files[value["path"]] = content
        for name in hub.spoils & files.keys():
            files[name] = files[name][:-1] + bytes([files[name][-1] ^ 1])
        hub.files, hub.commit = files, sha256(repr(sorted(files.items())).encode())[:40]
        hub.branches["main"] = hub.commit
        self._json({"commitUrl": f"{hub.url}/{hub.repo}/commit/{hub.commit}", "commitOid": hub.commit})

    def do_HEAD(self) -> None:
        self._answer(body=False)

    def do_GET(self) -> None:
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        hub = self.hub
        if hub.dead:
            self.close_connection = True
            return
        parts = urlsplit(self.path)
        path = unquote(parts.path)
        hub.requests.append(f"{self.command} {path}")
        api, resolve = f"/api/models/{hub.repo}", f"/{hub.repo}/resolve/{hub.commit}/"
        if hub.private:
            self._error(401, "RepoNotFound")
        elif path.startswith(f"{api}/revision/"):
            commit = hub.branches.get(path.removeprefix(f"{api}/revision/"), "")
            self._json({"id": hub.repo, "sha": commit, "siblings": []}) if commit else self._error(
                404, "RevisionNotFound"
            )
        elif path == f"{api}/tree/{hub.commit}":
            self._tree(int(parse_qs(parts.query).get("cursor", ["0"])[0]), path)
        elif path.startswith(f"{api}/tree/"):
            self._error(404, "RevisionNotFound")
        elif path.startswith(resolve) and path.removeprefix(resolve) in hub.files:
            self._file(path.removeprefix(resolve), body)
        elif path.startswith("/cdn/"):
            self._contents(path.removeprefix("/cdn/"), body)
        else:
            self._error(404, "RepoNotFound")

    def _json(self, value: object, headers: dict[str, str] | None = None) -> None:
        self._send(200, json.dumps(value).encode(), {"Content-Type": "application/json", **(headers or {})})

    def _error(self, status: int, code: str) -> None:
        self._send(status, b"{}", {"X-Error-Code": code, "X-Error-Message": code})

    def _send(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _tree(self, cursor: int, path: str) -> None:
        entries = self.hub.tree()
        more = cursor + PAGE < len(entries)
        link = {"Link": f'<{self.hub.url}{path}?recursive=true&cursor={cursor + PAGE}>; rel="next"'} if more else {}
        self._json(entries[cursor : cursor + PAGE], link)

    def _file(self, name: str, body: bool) -> None:
        """Large files are redirected to another host, as the hub does, and small ones sent at once."""
        listed = self.hub.listed_otherwise.get(name, self.hub.files[name])
        headers = {"X-Repo-Commit": self.hub.commit}
        if not self.hub.is_lfs(name):
            self._contents(name, body, {**headers, "ETag": f'"{git_sha1(listed)}"'})
            return
        headers |= {"X-Linked-Etag": f'"{sha256(listed)}"', "X-Linked-Size": str(len(listed))}
        self._send(302, b"", {**headers, "Location": f"{self.hub.url.replace('127.0.0.1', 'localhost')}/cdn/{name}"})

    def _contents(self, name: str, body: bool, headers: dict[str, str] | None = None) -> None:
        content = self.hub.content(name)
        start = 0
        asked = self.headers.get("Range")
        self.send_response(206 if asked else 200)
        if asked:
            start = int(asked.removeprefix("bytes=").partition("-")[0])
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        for key, value in (headers or {}).items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        if body:
            self._stream(content[start:])

    def _stream(self, content: bytes) -> None:
        hub = self.hub
        for offset in range(0, len(content), 4096):
            part = content[offset : offset + 4096]
            if hub.dies_after is not None and hub.sent + len(part) > hub.dies_after:
                hub.dead = True
                self.close_connection = True
                return
            hub.sent += len(part)
            self.wfile.write(part)


@contextmanager
def serve(hub: Hub) -> Iterator[Hub]:
    """The hub at `hub.url`, on a free port of loopback."""
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_address[1]}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def pinned(
    repo: str,
    commit: str,
    files: dict[str, bytes],
    *,
    older: dict[str, tuple[str, bytes]] | None = None,
    prefixes: list[dict[str, object]] | None = None,
    without_digest: tuple[str, ...] = (),
    publisher: str = "OpenAI",
    header_grade: str = "derived",
) -> dict[str, Any]:
    """One repository's entry in a table of official digests, made from contents; `older`: name -> (seen, contents)."""
    entries: dict[str, dict[str, object]] = {}
    for name, content in files.items():
        digest = None if name in without_digest else sha256(content)
        entries[name] = {"size": len(content), "sha256": digest, "grade": "A", "evidence": "made for a test"}
        if name.endswith(".safetensors"):
            length = int.from_bytes(content[:8], "little")
            entries[name] |= {"header_sha256": sha256(content[8 : 8 + length]), "header_grade": header_grade}
    old = [
        {"name": name, "size": len(content), "sha256": sha256(content), "seen": seen, "grade": "C", "evidence": "test"}
        for name, (seen, content) in (older or {}).items()
    ]
    return {
        repo: {
            "publisher": publisher,
            "revision": commit,
            "earlier_revisions": [],
            "files": entries,
            "older": old,
            "prefixes": prefixes or [],
        }
    }


def table(*repos: dict[str, Any]) -> Table:
    """A table of official digests from entries of `pinned`."""
    merged = {name: fields for repo in repos for name, fields in repo.items()}
    return table_from({"schema": SCHEMA, "repos": merged, "other": []})


def small_safetensors(seed: int, size: int = 3000) -> bytes:
    """A sound safetensors file of one tensor; files of one size have the same header and, by seed, other data."""
    header, _ = build_header([("model.weight", "U8", (size,))], {"format": "pt"})
    return header + hashlib.shake_128(bytes([seed])).digest(size)
