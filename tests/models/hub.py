"""A hub of one repository on the loopback, with what huggingface_hub asks of it."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub:
    """`files` of the repository `id`; what was asked of it is in `asked`, what was fetched in `fetched`.

    Args:
        status: refuses with this instead; "gated" refuses the files alone.
    """

    def __init__(self, id: str, directory: Path, status: int | str | None = None) -> None:
        self.id, self.status = id, status
        self.files = {
            path.relative_to(directory).as_posix(): path.read_bytes() for path in directory.rglob("*") if path.is_file()
        }
        self.asked: list[str] = []
        self.fetched: set[str] = set()
        self.address = ""
        self.cut: set[str] = set()  # files of which half comes before the line is dead

    @contextmanager
    def serving(self) -> Iterator["Hub"]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                hub._answer(self)

            do_HEAD = do_POST = do_GET

            def log_message(self, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        self.address = f"http://127.0.0.1:{server.server_port}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def _answer(self, request: BaseHTTPRequestHandler) -> None:
        path = unquote(request.path.partition("?")[0])
        self.asked.append(f"{request.command} {path}")
        api = f"/api/models/{self.id}"
        if self.status in (404, 401):
            send(request, int(self.status), b"{}", {"X-Error-Code": "RepoNotFound"})
        elif isinstance(self.status, int):
            send(request, self.status, b"")
        elif path.startswith(f"{api}/tree/"):
            entries = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in self.files.items()
            ]
            send(request, 200, json.dumps(entries).encode(), {"Content-Type": "application/json"})
        elif path.startswith(api):
            siblings = [{"rfilename": name} for name in self.files]
            about = {"id": self.id, "sha": COMMIT, "siblings": siblings, "tags": []}
            send(request, 200, json.dumps(about).encode(), {"Content-Type": "application/json"})
        elif path.startswith(f"/{self.id}/resolve/"):
            self._send_file(request, path.split("/resolve/", 1)[1].split("/", 1)[1])
        else:
            send(request, 404, b"{}", {"X-Error-Code": "RepoNotFound"})

    def _send_file(self, request: BaseHTTPRequestHandler, name: str) -> None:
        if self.status == "gated":
            send(request, 403, b"", {"X-Error-Code": "GatedRepo"})
        elif name not in self.files:
            send(request, 404, b"", {"X-Error-Code": "EntryNotFound"})
        else:
            data = self.files[name]
            if request.command == "GET":
                self.fetched.add(name)
            if name in self.cut and request.command == "GET":
                request.send_response(200)
                request.send_header("Content-Length", str(len(data)))
                request.end_headers()
                request.wfile.write(data[: len(data) // 2])
                request.close_connection = True
                return
            about = {"ETag": f'"{hashlib.sha256(data).hexdigest()}"', "X-Repo-Commit": COMMIT}
            send(request, 200, data, about)


def send(request: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, Any] | None = None) -> None:
    request.send_response(status)
    for key, value in {**(headers or {}), "Content-Length": len(body)}.items():
        request.send_header(key, str(value))
    request.end_headers()
    if request.command != "HEAD":
        request.wfile.write(body)
