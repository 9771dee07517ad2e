"""Servers that run on this machine: the file that each leaves while it runs, and the commands that look for them.

A file is its owner's alone, in a folder that is its owner's alone. It says which process it is about by id and start,
so that one that a killed server left is told from one of a server that runs, whoever has the id by now.
"""

from __future__ import annotations

import asyncio
import os
import signal
import stat
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import msgspec

from sensorium.cli.client import Endpoint, Remote, RemoteError
from sensorium.errors import StartupError
from sensorium.system.processes import family, resident_bytes, start_ticks
from sensorium.units import decimal_text

DEFAULT_URL = "http://127.0.0.1:8000"
ASK_TIMEOUT_S = 5.0
WATCH_S = 0.1


class Running(msgspec.Struct, frozen=True):
    """What a server says of itself. `url` is unix:PATH of one that listens on a socket."""

    pid: int
    start_ticks: int  # of the process, by the kernel's clock
    since_s: float  # Unix time
    url: str
    models: tuple[str, ...]

    @property
    def is_there(self) -> bool:
        return start_ticks(self.pid) == self.start_ticks

    def __str__(self) -> str:
        return f"{self.url} (process {self.pid})"


_RUNNING = msgspec.json.Decoder(Running)


def runtime_folder(environment: Mapping[str, str]) -> Path:
    """Where the files are: one folder for each user of the machine."""
    own = Path(environment.get("XDG_RUNTIME_DIR") or "")
    if own.is_absolute() and own.is_dir():
        return own / "sensorium"
    return Path(tempfile.gettempdir()) / f"sensorium-{os.getuid()}"


@contextmanager
def listed(folder: Path, url: str, models: Sequence[str]) -> Iterator[None]:
    """This process is found as a server while the block runs. OSError if that cannot be."""
    folder.mkdir(mode=0o700, exist_ok=True)
    _check_own(folder)
    pid = os.getpid()
    said = Running(pid, start_ticks(pid) or 0, time.time(), url, tuple(models))
    path, beside = folder / f"{pid}.json", folder / f"{pid}.new"
    beside.unlink(missing_ok=True)
    with os.fdopen(os.open(beside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(msgspec.json.encode(said))
    beside.replace(path)
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _check_own(folder: Path) -> None:
    found = folder.lstat()
    if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o077:
        raise PermissionError(f"{folder} is not a folder of this user alone")


def running(folder: Path) -> list[Running]:
    """The servers that run, oldest first. Files of others are removed."""
    found = []
    with suppress(OSError):
        _check_own(folder)
        for path in folder.glob("*.json"):
            said = _read(path)
            if said is not None and said.is_there:
                found.append(said)
            else:
                path.unlink(missing_ok=True)
    return sorted(found, key=lambda one: one.since_s)


def _read(path: Path) -> Running | None:
    try:
        return _RUNNING.decode(path.read_bytes())
    except (OSError, msgspec.DecodeError):
        return None


def only_url(folder: Path) -> str:
    """The address of the only server that runs; where none does, the default one. StartupError if there are several."""
    found = [one for one in running(folder) if not one.url.startswith("unix:")]
    if len(found) > 1:
        raise StartupError(f"--base-url says which server; there are {', '.join(map(str, found))}")
    return found[0].url if found else DEFAULT_URL


def ps(folder: Path, api_key: str | None) -> int:
    """The command: a line for each server, its models with their states."""
    found = running(folder)
    if not found:
        print("no server runs")
        return 0
    states = asyncio.run(_states(found, api_key))
    rows = [("PID", "ADDRESS", "UP", "MEMORY", "MODELS")]
    for one, models in zip(found, states, strict=True):
        memory = decimal_text(resident_bytes(family(one.pid)))
        rows.append((str(one.pid), one.url, duration_text(time.time() - one.since_s), memory, models))
    widths = [max(len(row[column]) for row in rows) for column in range(4)]
    for *cells, last in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(cells, widths, strict=True)), last, sep="  ")
    return 0


async def _states(found: Sequence[Running], api_key: str | None) -> list[str]:
    return list(await asyncio.gather(*(_state(one, api_key) for one in found)))


async def _state(one: Running, api_key: str | None) -> str:
    """Its models with their states, or what it says instead."""
    if one.url.startswith("unix:"):
        return ", ".join(one.models)
    try:
        async with Remote(Endpoint.parse(one.url, api_key), timeout_s=ASK_TIMEOUT_S) as remote:
            rows = (await remote.get("/models"))["data"]
    except RemoteError as error:
        return f"{', '.join(one.models)} ({_WHY.get(error.remote_status, error.message)})"
    return models_text(rows)


def models_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """Of what GET /v1/models lists each model once, with its other names in brackets and without its adapters."""
    names: dict[str, list[str]] = {}
    states: dict[str, str] = {}
    for row in rows:
        if not row.get("parent"):
            model = row.get("root") or row["id"]
            names.setdefault(model, []).append(row["id"])
            states[model] = row["state"]
    shown = {model: first + (f" ({', '.join(more)})" if more else "") for model, (first, *more) in names.items()}
    return ", ".join(f"{shown[model]} {state}" for model, state in states.items())


_WHY = {401: "an API key is needed to know more", 503: "loading"}


def duration_text(seconds: float) -> str:
    """3725 -> "1 h 2 min" """
    minutes, hours = int(seconds // 60), int(seconds // 3600)
    if not minutes:
        return f"{max(int(seconds), 0)} s"
    if not hours:
        return f"{minutes} min"
    return f"{hours} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"


def stop(folder: Path, which: Sequence[str], *, all_of_them: bool, timeout_s: float) -> int:
    """The command: SIGTERM, and wait until they have drained. StartupError if it is not clear which, or one stays."""
    for one in _meant(running(folder), which, all_of_them=all_of_them):
        if one.is_there:
            os.kill(one.pid, signal.SIGTERM)
        end_s = time.monotonic() + timeout_s
        while one.is_there:
            if time.monotonic() > end_s:
                raise StartupError(f"{one} is still finishing requests: stop it again to end them at once")
            time.sleep(WATCH_S)
        print(f"stopped {one}")
    return 0


def _meant(found: Sequence[Running], which: Sequence[str], *, all_of_them: bool) -> list[Running]:
    if all_of_them or (not which and len(found) == 1):
        return list(found)
    if not found:
        raise StartupError("no server runs")
    if not which:
        raise StartupError(
            f"say which: a process id, a port, an address, or --all; there are {', '.join(map(str, found))}"
        )
    meant = []
    for word in which:
        fitting = [one for one in found if word in (str(one.pid), one.url, one.url.rpartition(":")[2])]
        if len(fitting) != 1:
            raise StartupError(
                f"{word} is no server's process id, port or address; there are {', '.join(map(str, found))}"
            )
        meant += fitting
    return meant
