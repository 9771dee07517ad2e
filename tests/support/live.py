"""A real server under attack: what it was before, and whether it is that still (the catalogue's 'postlude')."""

from __future__ import annotations

import json
import re
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families

from sensorium.kernels.cpu import native
from sensorium.system.processes import family, resident_bytes
from support import server

LEAKS = re.compile(r"0x[0-9a-f]{6,}|/usr|/home|/tmp|site-packages|Traceback|File \"|<[\w.]+ object at|pydantic|\.py\b")
ERROR_KEYS = {"message", "type", "param", "code"}
ERROR_TYPES = {
    "invalid_request_error",
    "authentication_error",
    "permission_error",
    "not_found_error",
    "rate_limit_error",
    "server_error",
}
MAX_GROWTH_BYTES = (96 + (64 if native.available() else 192)) * 2**20
"""96 MiB are the KV cache's, whose pages count once they are used. Without the native kernels torch keeps more, of
products in bfloat16 and of attention: 110 MiB, then no more."""
NORMAL = {"messages": [{"role": "user", "content": "hello"}], "max_tokens": 4, "temperature": 0, "ignore_eos": True}


@dataclass(slots=True)
class Live:
    """`rss_bytes` is that of the HTTP process and the engine; decode workers come and go."""

    server: server.Server
    http: httpx.Client
    engine_pid: int
    rss_bytes: int = 0
    answer: str = ""
    key: str = ""
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def url(self) -> str:
        return self.server.url

    @property
    def port(self) -> int:
        return int(self.url.rsplit(":", 1)[1])

    def post(self, path: str, body: Any = None, **options: Any) -> httpx.Response:
        if isinstance(body, bytes):
            options.setdefault("headers", {"Content-Type": "application/json"})
            return self.http.post(path, content=body, **options)
        return self.http.post(path, json=body, **options)

    def chat(self, content: Any = "hello", **fields: Any) -> httpx.Response:
        """A short greedy chat of one user message."""
        return self.post(
            "/v1/chat/completions",
            {
                "messages": [{"role": "user", "content": content}],
                "max_tokens": 4,
                "temperature": 0,
                "ignore_eos": True,
                **fields,
            },
        )

    def complete(self, prompt: Any = "hello", **fields: Any) -> httpx.Response:
        return self.post("/v1/completions", {"prompt": prompt, "max_tokens": 4, "temperature": 0, **fields})

    def resident(self) -> int:
        return resident_bytes([self.server.process.pid, self.engine_pid])

    def metric(self, name: str, **labels: str) -> float:
        """The sum of a metric's samples that carry these labels."""
        return sum(
            sample.value
            for family in text_string_to_metric_families(self.http.get("/metrics").text)
            for sample in family.samples
            if sample.name == name and all(sample.labels.get(key) == value for key, value in labels.items())
        )

    def check_unharmed(self) -> None:
        """The postlude: a normal request is answered as ever, by the same engine, and nothing was kept."""
        reply = self.post("/v1/chat/completions", NORMAL)
        assert reply.status_code == 200, reply.text
        assert reply.json()["choices"][0]["message"]["content"] == self.answer
        assert self.engine_pid == engine_of(self.server.process.pid)
        assert self.server.process.poll() is None
        until(lambda: self.metric("vllm:num_requests_running") + self.metric("vllm:num_requests_waiting") == 0)
        until(lambda: self.metric("vllm:kv_cache_usage_perc") == 0)
        assert self.resident() - self.rss_bytes < MAX_GROWTH_BYTES


def engine_of(pid: int) -> int:
    """The engine is the process of the family that computes."""
    found = [one for one in family(pid) if b"sensorium.engine.loop" in Path(f"/proc/{one}/cmdline").read_bytes()]
    assert len(found) == 1, found
    return found[0]


def until(happens: Any, timeout_s: float = 120.0) -> None:
    end_s = time.monotonic() + timeout_s
    while not happens():
        assert time.monotonic() < end_s, "it did not happen in time"
        time.sleep(0.05)


@contextmanager
def live(
    folder: Path, *argv: str, key: str = "", warm: bool = True, tracebacks: bool = False, **options: Any
) -> Iterator[Live]:
    """A server that has answered its first requests, so that what it grows by is someone's doing.

    `tracebacks`: its log may have some, as faults are part of the test. `options` are those of `server.running`.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    with (
        server.running(folder, *argv, **options) as started,
        httpx.Client(base_url=started.url, headers=headers, timeout=120) as http,
    ):
        found = Live(started, http, engine_of(started.process.pid), key=key)
        if warm:
            for _ in range(2):
                reply = found.post("/v1/chat/completions", NORMAL)
                assert reply.status_code == 200, reply.text
            found.answer = reply.json()["choices"][0]["message"]["content"]
        found.rss_bytes = found.resident()
        yield found
        assert tracebacks or "Traceback" not in started.text(), started.text()


def check_error(
    reply: httpx.Response, *, status: int | tuple[int, ...] = 400, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """One of our error bodies: four keys, nothing of a library, a path or an address in it."""
    allowed = (status,) if isinstance(status, int) else status
    assert reply.status_code in allowed, (reply.status_code, reply.text[:500])
    assert reply.headers["content-type"] == "application/json"
    body = reply.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == ERROR_KEYS
    assert error["type"] in ERROR_TYPES
    assert error["message"] and isinstance(error["message"], str)
    assert not LEAKS.search(reply.text), reply.text
    if code is not None:
        assert error["code"] == code, error
    if param is not None:
        assert error["param"] == param, error
    return error


class Canary:
    """Listens where nobody may call, and counts who does."""

    def __init__(self, family: int = socket.AF_INET) -> None:
        self._socket = socket.create_server(("127.0.0.1" if family == socket.AF_INET else "::1", 0), family=family)
        self.port: int = self._socket.getsockname()[1]
        self.calls = 0
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            self.calls += 1
            connection.close()

    def close(self) -> None:
        self._socket.close()


def raw(port: int, data: bytes, *, timeout_s: float = 120.0) -> bytes:
    """Send bytes as they are; one whole answer, or what came of it before the other side closed."""
    with socket.create_connection(("127.0.0.1", port), timeout=timeout_s) as connection:
        with suppress(OSError):  # refused before all of it was sent
            connection.sendall(data)
        answer = b""
        with suppress(OSError):
            while not is_whole(answer) and (piece := connection.recv(65536)):
                answer += piece
        return answer


def is_whole(answer: bytes) -> bool:
    head, end, body = answer.partition(b"\r\n\r\n")
    length = re.search(rb"content-length: (\d+)", head, re.IGNORECASE)
    return bool(end) and length is not None and len(body) >= int(length[1])


def status_of(answer: bytes) -> int:
    match = re.match(rb"HTTP/1\.1 (\d{3}) ", answer)
    return int(match[1]) if match else 0


def events(text: str) -> list[dict[str, Any]]:
    """The objects of an event stream, which must end as one."""
    lines = [line for line in text.split("\n\n") if line and not line.startswith(":")]
    assert lines[-1] == "data: [DONE]", lines[-1:]
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]
