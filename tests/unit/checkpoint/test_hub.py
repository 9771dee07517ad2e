"""Repositories from a hub on loopback: fetched with progress, gone on with, checked for room, asked once."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

COMMIT = "c" * 40
PROGRAM = """
import json, sys
from sensorium.checkpoint.hub import resolve
from sensorium.errors import StartupError
seen = []
try:
    folder = resolve("org/model", None, sys.argv[1], on_progress=seen.append)
    print(json.dumps({"folder": str(folder), "files": sorted(file.name for file in folder.iterdir()), "seen": seen}))
except StartupError as error:
    print(json.dumps({"error": error.message, "seen": seen}))
"""


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


@dataclass
class Served:
    hub: Hub
    url: str
    cache: Path

    def resolve(self, **environment: str) -> dict[str, object]:
        """In a process of its own: the library reads the hub's address when it is imported."""
        found = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(self.cache)],
            env={**os.environ, "HF_ENDPOINT": self.url, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DOWNLOAD_TIMEOUT": "5"}
            | environment,
            capture_output=True,
            check=False,
            timeout=120,
        )
        assert found.returncode == 0, found.stderr.decode()
        return dict(json.loads(found.stdout.decode().splitlines()[-1]))


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    hub = Hub({"config.json": b"{}", "model.safetensors": os.urandom(20_000_000), "README.md": b"no"})
    httpd = ThreadingHTTPServer(("127.0.0.1", 0), handler_of(hub))
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield Served(hub, f"http://127.0.0.1:{httpd.server_port}", tmp_path / "cache")
    httpd.shutdown()
    httpd.server_close()


def test_a_repository_is_fetched_once_and_then_the_hub_is_not_asked(served: Served) -> None:
    first = served.resolve()
    assert first["files"] == ["config.json", "model.safetensors"] and Path(str(first["folder"])).name == COMMIT
    assert first["seen"] and list(first["seen"])[-1] == 1.0  # type: ignore[call-overload]
    served.hub.asked.clear()
    assert served.resolve()["folder"] == first["folder"]
    assert served.hub.asked == []


def test_a_download_that_broke_is_gone_on_with(served: Served) -> None:
    served.hub.breaks_at = 12_000_000
    assert "cannot be downloaded" in str(served.resolve()["error"])
    served.hub.breaks_at = None
    served.hub.ranges.clear()
    again = served.resolve()
    assert again["files"] == ["config.json", "model.safetensors"]
    kept = Path(str(again["folder"]), "model.safetensors").read_bytes()
    assert kept == served.hub.files["model.safetensors"]
    assert any(int(one.removeprefix("bytes=").partition("-")[0]) > 0 for one in served.hub.ranges)


def test_room_is_checked_before_anything_is_fetched(served: Served) -> None:
    served.hub.sizes["model.safetensors"] = shutil.disk_usage(served.cache.parent).total + 1
    found = served.resolve()
    assert "are to be fetched" in str(found["error"]) and "--download-dir" in str(found["error"])
    assert not [line for line in served.hub.asked if line.startswith("GET") and "/resolve/" in line]


def test_a_snapshot_without_all_its_weights_is_no_copy(served: Served) -> None:
    """As a program leaves it that kept no list of what belongs to it."""
    snapshot = served.cache / "models--org--model" / "snapshots" / COMMIT
    snapshot.mkdir(parents=True)
    (snapshot.parents[1] / "refs").mkdir()
    (snapshot.parents[1] / "refs" / "main").write_text(COMMIT)
    (snapshot / "config.json").write_text("{}")
    assert served.resolve()["files"] == ["config.json", "model.safetensors"]
