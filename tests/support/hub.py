"""A hub on loopback with one repository, which writes down what it is asked for."""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "c" * 40


@dataclass
class Hub:
    """Repository org/model. `breaks_at` is a byte of large files at which the connection ends, once."""

    files: dict[str, bytes]
    asked: list[str] = field(default_factory=list)
    ranges: list[str] = field(default_factory=list)
    breaks_at: int | None = None
    sizes: dict[str, int] = field(default_factory=dict)

    def entries(self) -> list[dict[str, object]]:
        return [
            {
                "type": "file",
                "path": name,
                "size": self.sizes.get(name, len(data)),
                "oid": hashlib.sha1(data, usedforsecurity=False).hexdigest(),
            }
            for name, data in self.files.items()
        ]


def handler_of(hub: Hub) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(is_head=True)

        def do_GET(self) -> None:
            self.answer(is_head=False)

        def answer(self, *, is_head: bool) -> None:
            path = self.path.partition("?")[0]
            hub.asked.append(f"{self.command} {path}")
            if path.startswith("/api/models/org/model/tree/"):
                self.send(json.dumps(hub.entries()).encode(), is_head)
            elif path.startswith("/api/models/org/model"):
                info = {"id": "org/model", "sha": COMMIT, "siblings": [{"rfilename": name} for name in hub.files]}
                self.send(json.dumps(info).encode(), is_head)
            else:
                name = path.rpartition("/")[2]
                self.send_file(name, hub.files[name], is_head)

        def send(self, body: bytes, is_head: bool) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(b"" if is_head else body)

        def send_file(self, name: str, data: bytes, is_head: bool) -> None:
            begin, wanted = 0, self.headers.get("Range")
            if wanted is not None and not is_head:
                hub.ranges.append(wanted)
                begin = int(wanted.removeprefix("bytes=").partition("-")[0])
            self.send_response(206 if begin else 200)
            self.send_header("ETag", f'"{hashlib.sha256(data).hexdigest()}"')
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("Content-Length", str(hub.sizes.get(name, len(data)) - begin))
            self.end_headers()
            if is_head:
                return
            if hub.breaks_at is not None and len(data) > hub.breaks_at:
                self.wfile.write(data[begin : hub.breaks_at])
                self.close_connection = True
                return
            self.wfile.write(data[begin:])

    return Handler


@contextmanager
def serving_hub(hub: Hub) -> Iterator[dict[str, str]]:
    """The environment of a program that asks this hub."""
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{httpd.server_port}"
    yield {"HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "5"}
    httpd.shutdown()
    httpd.server_close()
