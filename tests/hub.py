"""A Hugging Face hub on this machine: as much of one as making a repository, committing and downloading need.

Small files come in the commit, large ones (``.safetensors``, ``.png``, chunks) by LFS, as on the real one.
"""

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import PurePosixPath
from threading import Thread
from typing import Any
from urllib.parse import unquote, urlsplit

REGULAR = (".json", ".md", ".jsonl", ".yaml", ".gitattributes")
TOKEN = "hf_known"


class Hub:
    """What is on it: files by repository (``models/owner/name``), and the settings of each."""

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {}
        self.private: dict[str, bool] = {}
        self.commits: list[str] = []
        self.large: dict[str, bytes] = {}
        self.read: list[tuple[str, str | None]] = []  # files that were asked for, and which range of each
        self.url = ""

    def add(self, repository: str, files: dict[str, bytes]) -> None:
        self.files.setdefault(f"models/{repository}", {}).update(files)

    def sha(self, repository: str) -> str:
        told = json.dumps({name: hashlib.sha256(data).hexdigest() for name, data in self.files[repository].items()})
        return hashlib.sha1(told.encode()).hexdigest()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16  # head and body in one packet

    def log_message(self, *_: Any) -> None:
        pass

    def answer(self, body: Any = None, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        if found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)(/revision/.*)?", path):
            repository = f"{found[1]}/{found[2]}"
            if repository not in self.hub.files:
                self.answer({"error": "Repository not found"}, 404, {"X-Error-Code": "RepoNotFound"})
                return
            siblings = [{"rfilename": name} for name in sorted(self.hub.files[repository])]
            told = {"id": found[2], "sha": self.hub.sha(repository), "siblings": siblings, "private": False}
            self.answer({**told, "tags": [], "downloads": 0, "likes": 0})
        elif found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/tree/[^/]+(/.*)?", path):
            files, inside = self.hub.files.get(f"{found[1]}/{found[2]}", {}), (found[3] or "/").strip("/")
            told = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in sorted(files.items())
                if name.startswith(inside)
            ]
            folders = {str(above) for name in files for above in PurePosixPath(name).parents} - {"."}
            self.answer([*({"type": "directory", "path": one, "oid": "0"} for one in sorted(folders)), *told])
        elif found := re.fullmatch(r"/(datasets/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
            repository = f"{'datasets' if found[1] else 'models'}/{found[2]}"
            data = self.hub.files.get(repository, {}).get(found[4])
            if data is None:
                self.answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
                return
            tag = f'"{hashlib.sha256(data).hexdigest()}"'
            told = {"X-Repo-Commit": self.hub.sha(repository), "ETag": tag}
            self.hub.read.append((found[4], self.headers.get("Range")))
            if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
                start, end = int(wanted[1]), min(int(wanted[2] or len(data)) + 1, len(data))
                told["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
                self.answer(data[start:end], 206 if start < len(data) else 416, told)
                return
            self.answer(data, headers=told)
        else:
            self.answer({"error": f"no {path}"}, 404)

    do_HEAD = do_GET

    def do_POST(self) -> None:
        path, data = unquote(urlsplit(self.path).path), self.body()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid username or password."}, 401)
        elif path == "/api/validate-yaml":  # of a card's head
            self.answer({"errors": [], "warnings": []})
        elif path == "/api/repos/create":
            asked = json.loads(data)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            repository = f"{asked.get('type') or 'model'}s/{name}"
            if repository in self.hub.files:
                self.answer({"error": "exists", "url": f"{self.hub.url}/{name}"}, 409)
                return
            self.hub.files[repository] = {}
            self.hub.private[repository] = bool(asked.get("private") or asked.get("visibility") == "private")
            self.answer({"url": f"{self.hub.url}/{name}", "name": name, "id": name})
        elif re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/preupload/.*", path):
            asked = json.loads(data)["files"]
            modes = [(one["path"], "regular" if one["path"].endswith(REGULAR) else "lfs") for one in asked]
            self.answer({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes]})
        elif path.endswith("/info/lfs/objects/batch"):
            put = [
                {**one, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}}
                for one in json.loads(data)["objects"]
            ]
            self.answer({"transfer": "basic", "objects": put})
        elif found := re.fullmatch(r"/api/(models|datasets)/([^/]+/[^/]+)/commit/.*", path):
            repository = f"{found[1]}/{found[2]}"
            for line in map(json.loads, data.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    self.hub.files[repository][value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    self.hub.files[repository][value["path"]] = self.hub.large[value["oid"]]
                elif line["key"] == "deletedFolder":
                    gone = [one for one in self.hub.files[repository] if one.startswith(value["path"])]
                    for one in gone:
                        del self.hub.files[repository][one]
                else:
                    self.hub.commits.append(value["summary"])
            self.answer(
                {
                    "commitUrl": f"{self.hub.url}/{found[2]}/commit/{self.hub.sha(repository)}",
                    "commitOid": self.hub.sha(repository),
                }
            )
        else:
            self.answer({"error": f"no {path}"}, 404)

    def do_PUT(self) -> None:
        data = self.body()
        self.hub.large[self.path.rpartition("/")[2]] = data
        self.answer({})


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub, at ``hub.url``."""
    hub = Hub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
