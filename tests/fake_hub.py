"""A Hugging Face hub on this machine: as much of its API as sending and fetching a folder takes."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TOKEN = "hf_of_the_tests"


class FakeHub:
    """Repositories in memory, behind HTTP on loopback.

    Attributes:
      endpoint: its address.
      repos: by OWNER/REPO, whether it is private, and its commits: an id, and the bytes by path.
      refuses: the status and words with which all writing is refused; None for none.
      bad_yaml: what is wrong with every card; empty for nothing.
      asked: what was asked for, "METHOD PATH".
    """

    def __init__(self, endpoint: str):
        self.endpoint = endpoint
        self.repos: dict[str, dict[str, Any]] = {}
        self.refuses: tuple[int, str] | None = None
        self.bad_yaml = ""
        self.asked: list[str] = []
        self.objects: dict[str, bytes] = {}

    def commit(self, repo: str, files: dict[str, bytes]) -> str:
        """Adds a commit of these files beside those that are there; returns its id."""
        commits = self.repos.setdefault(repo, {"private": False, "commits": []})["commits"]
        files = (commits[-1][1] if commits else {}) | files
        oid = hashlib.sha1(repr((len(commits), sorted(files))).encode()).hexdigest()
        commits.append((oid, files))
        return oid

    def files(self, repo: str, revision: str = "main") -> tuple[str, dict[str, bytes]]:
        """The id and the files of a revision."""
        commits = self.repos[repo]["commits"] or [("0" * 40, {})]
        return commits[-1] if revision == "main" else {c[0]: c for c in commits}[revision]


@contextlib.contextmanager
def serving() -> Iterator[FakeHub]:
    """A hub that answers while the context is open."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.hub = hub = FakeHub(f"http://127.0.0.1:{server.server_address[1]}")
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: Any) -> None:
        pass

    def _answer(self, method: str) -> None:
        hub, path = self.server.hub, self.path.partition("?")[0]
        hub.asked.append(f"{method} {path}")
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            self._file(*found.groups())
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)(/revision/[^/]+)?", path):
            self._info(found[1])
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/.+", path):
            files = hub.files(found[1])[1]
            entries = [{"type": "file", "path": p, "size": len(b)} for p, b in files.items()]
            self._json([entry | {"oid": "0" * 40} for entry in entries])
        elif path == "/api/validate-yaml":
            errors = [{"message": hub.bad_yaml}] if hub.bad_yaml else []
            self._json({"errors": errors, "warnings": []}, 400 if errors else 200)
        elif method in ("POST", "PUT"):
            self._write(path, body)
        else:
            self._refuse(404, "EntryNotFound", "nothing there")

    def _write(self, path: str, body: bytes) -> None:
        hub = self.server.hub
        token = self.headers.get("Authorization")
        if not path.startswith("/objects/") and token != f"Bearer {TOKEN}":
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif hub.refuses:
            self._refuse(hub.refuses[0], "", hub.refuses[1])
        elif path == "/api/repos/create":
            asked = json.loads(body)
            repo = f"{asked.get('organization')}/{asked['name']}"
            there = repo in hub.repos
            private = bool(asked.get("private")) or asked.get("visibility") == "private"
            hub.repos.setdefault(repo, {"private": private, "commits": []})
            url = {"url": f"{hub.endpoint}/{repo}", "name": repo}
            self._json(url, 409 if there else 200)
        elif re.fullmatch(r"/api/models/[^/]+/[^/]+/preupload/main", path):
            files = json.loads(body)["files"]
            mode = {True: "lfs", False: "regular"}
            self._json(
                {
                    "files": [
                        {
                            "path": file["path"],
                            "uploadMode": mode[file["path"].endswith((".safetensors", ".png"))],
                            "shouldIgnore": False,
                        }
                        for file in files
                    ]
                }
            )
        elif path.endswith("/info/lfs/objects/batch"):
            asked = json.loads(body)["objects"]
            objects = [
                o | {"actions": {"upload": {"href": f"{hub.endpoint}/objects/{o['oid']}"}}}
                for o in asked
            ]
            self._json({"transfer": "basic", "objects": objects})
        elif path.startswith("/objects/"):
            assert hashlib.sha256(body).hexdigest() == path.rpartition("/")[2]
            hub.objects[path.rpartition("/")[2]] = body
            self._json({})
        elif found := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/main", path):
            self._commit(found[1], body)
        else:
            self._refuse(404, "", f"no such place: {path}")

    def _commit(self, repo: str, body: bytes) -> None:
        hub, files = self.server.hub, {}
        gone = []
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = hub.objects[value["oid"]]
            elif line["key"] == "deletedFile":
                gone.append(value["path"])
        oid = hub.commit(repo, files)
        for name in gone:
            hub.files(repo)[1].pop(name, None)
        url = f"{hub.endpoint}/{repo}/commit/{oid}"
        self._json({"success": True, "commitOid": oid, "commitUrl": url, "hookOutput": ""})

    def _info(self, repo: str) -> None:
        hub = self.server.hub
        if repo not in hub.repos:
            self._refuse(404, "RepoNotFound", "Repository not found")
            return
        oid, files = hub.files(repo)
        siblings = [{"rfilename": name} for name in files]
        about = {"id": repo, "sha": oid, "siblings": siblings, "tags": []}
        self._json(about | {"private": hub.repos[repo]["private"], "downloads": 0, "likes": 0})

    def _file(self, repo: str, revision: str, path: str) -> None:
        hub = self.server.hub
        if repo not in hub.repos:
            self._refuse(404, "RepoNotFound", "Repository not found")
            return
        try:
            oid, files = hub.files(repo, revision)
        except KeyError:
            self._refuse(404, "RevisionNotFound", "Revision not found")
            return
        if path not in files:
            self._refuse(404, "EntryNotFound", "Entry not found")
            return
        data = files[path]
        digest = hashlib.sha256(data).hexdigest()
        self._send(200, data, {"X-Repo-Commit": oid, "ETag": f'"{digest}"'})

    def _json(self, values: Any, status: int = 200) -> None:
        self._send(status, json.dumps(values).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, words: str) -> None:
        headers = {"X-Error-Code": code} if code else {}
        headers |= {"X-Error-Message": words, "Content-Type": "application/json"}
        self._send(status, json.dumps({"error": words}).encode(), headers)

    def _send(self, status: int, data: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def do_GET(self) -> None:
        self._answer("GET")

    def do_HEAD(self) -> None:
        self._answer("HEAD")

    def do_POST(self) -> None:
        self._answer("POST")

    def do_PUT(self) -> None:
        self._answer("PUT")
