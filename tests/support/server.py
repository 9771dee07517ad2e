"""A real `sensorium serve` for tests: the command, its processes, its log."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

READY = re.compile(r"ready\b.* at (http://[^\s,]+):\s")


@dataclass(frozen=True, slots=True)
class Server:
    process: subprocess.Popen[bytes]
    log: Path
    url: str

    def text(self) -> str:
        return self.log.read_text()


def start(
    log: Path, *argv: str, environment: dict[str, str] | None = None, prefix: tuple[str, ...] = ()
) -> subprocess.Popen[bytes]:
    """`prefix` is a command that runs the one behind it."""
    with log.open("wb") as output:
        return subprocess.Popen(
            [*prefix, sys.executable, "-m", "sensorium", "serve", *argv],
            stdout=output,
            stderr=output,
            env={**os.environ, **(environment or {})},
        )


@contextmanager
def running(
    folder: Path,
    *argv: str,
    timeout_s: float = 240.0,
    kv_cache_memory: str = "96MiB",
    environment: dict[str, str] | None = None,
) -> Iterator[Server]:
    """A server on a free port, with a small KV cache; stopped at the end."""
    log = folder / "server.log"
    process = start(
        log, *argv, "--port", "0", "--kv-cache-memory", kv_cache_memory, "--threads", "1", environment=environment
    )
    try:
        yield Server(process, log, until_ready(process, log, timeout_s))
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
        try:
            process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def until_ready(process: subprocess.Popen[bytes], log: Path, timeout_s: float) -> str:
    end_s = time.monotonic() + timeout_s
    while time.monotonic() < end_s:
        if match := READY.search(log.read_text()):
            return match[1]
        if process.poll() is not None:
            break
        time.sleep(0.02)
    raise RuntimeError(f"the server is not ready:\n{log.read_text()}")
