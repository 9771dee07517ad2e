"""Servers that are found by the files they leave, whoever has left others."""

from __future__ import annotations

import json
import os
import stat
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from sensorium.cli import servers
from sensorium.cli.main import main
from sensorium.cli.servers import Running, listed, models_text, only_url, running
from sensorium.errors import StartupError
from sensorium.system.processes import start_ticks


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.delenv("SENSORIUM_API_KEY", raising=False)
    return tmp_path / "sensorium"


def leave(folder: Path, pid: int, url: str, ticks: int | None = None) -> Running:
    folder.mkdir(mode=0o700, exist_ok=True)
    said = Running(pid, start_ticks(pid) or 0 if ticks is None else ticks, time.time() - 3725, url, ("m",))
    (folder / f"{pid}.json").write_bytes(msgspec.json.encode(said))
    return said


def test_a_server_is_listed_while_it_runs_for_its_user_alone(folder: Path) -> None:
    with listed(folder, "http://127.0.0.1:1234", ["a", "b"]):
        (file,) = folder.iterdir()
        assert stat.S_IMODE(file.stat().st_mode) == 0o600
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        (one,) = running(folder)
        assert (one.pid, one.url, one.models) == (os.getpid(), "http://127.0.0.1:1234", ("a", "b"))
        assert only_url(folder) == one.url
    assert running(folder) == []
    assert only_url(folder) == servers.DEFAULT_URL
    folder.chmod(0o755)
    with pytest.raises(PermissionError), listed(folder, "", []):
        pass
    leave(folder, os.getpid(), "http://127.0.0.1:1")
    assert running(folder) == []  # what others may have written is not believed


def test_a_model_is_shown_once_with_its_other_names() -> None:
    rows: list[dict[str, Any]] = [
        {"id": "talk", "root": "talk", "parent": None, "state": "ready"},
        {"id": "gpt-4o", "root": "talk", "parent": None, "state": "ready"},
        {"id": "gpt-4", "root": "talk", "parent": None, "state": "ready"},
        {"id": "french", "root": "/adapters/french", "parent": "talk", "state": "ready"},
        {"id": "embedder", "root": "embedder", "parent": None, "state": "unloaded"},
    ]
    assert models_text(rows) == "talk (gpt-4o, gpt-4) ready, embedder unloaded"


def test_what_a_killed_server_left_is_removed(folder: Path) -> None:
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    leave(folder, ended.pid, "http://127.0.0.1:1", ticks=5)
    leave(folder, os.getpid(), "http://127.0.0.1:2", ticks=5)  # another process had this id
    (folder / "x.json").write_text("{")
    assert running(folder) == []
    assert list(folder.iterdir()) == []


def test_commands_find_stop_and_tell(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def said(*argv: str, code: int = 0) -> str:
        assert main(argv) == code
        found = capsys.readouterr()
        return (found.err if code else found.out).strip()

    assert said("ps") == "no server runs"
    assert said("stop", code=2) == "sensorium: no server runs"
    processes = [subprocess.Popen(["sleep", "100"]) for _ in range(3)]
    try:
        for number, one in enumerate(processes):
            leave(folder, one.pid, f"http://127.0.0.1:{number + 1}")
        lines = said("ps").splitlines()
        assert [line.split()[1] for line in lines] == ["ADDRESS", *(f"http://127.0.0.1:{n}" for n in (1, 2, 3))]
        assert "1 h 2 min" in lines[1]
        assert "m (cannot connect to 127.0.0.1:1" in lines[1]
        with pytest.raises(StartupError, match="--base-url says which server"):
            only_url(folder)
        assert "say which: a process id, a port" in said("stop", code=2)
        assert "77 is no server's" in said("stop", "77", code=2)
        assert said("stop", "2") == f"stopped http://127.0.0.1:2 (process {processes[1].pid})"
        assert processes[1].wait(60) == -15
        assert len(said("stop", "--all").splitlines()) == 2
    finally:
        for one in processes:
            one.kill()
            one.wait()
    assert running(folder) == []


def test_a_server_that_takes_its_time_is_told_of(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = "trap '' TERM; echo ready; while true; do sleep 1; done"
    with subprocess.Popen(["sh", "-c", command], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        process.stdout.readline()
        leave(folder, process.pid, "unix:/tmp/s")
        assert main(["stop", "--timeout-s", "0.2"]) == 2
        assert "is still finishing requests: stop it again" in capsys.readouterr().err
        assert json.loads((folder / f"{process.pid}.json").read_text())["pid"] == process.pid
        process.kill()
