"""Repositories from a hub on loopback: fetched with progress, gone on with, checked for room, asked once."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.hub import COMMIT, Hub, serving_hub

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
class Served:
    hub: Hub
    asking: dict[str, str]  # environment
    cache: Path

    def resolve(self, **environment: str) -> dict[str, object]:
        """In a process of its own: the library reads the hub's address when it is imported."""
        found = subprocess.run(
            [sys.executable, "-c", PROGRAM, str(self.cache)],
            env=os.environ | self.asking | environment,
            capture_output=True,
            check=False,
            timeout=120,
        )
        assert found.returncode == 0, found.stderr.decode()
        return dict(json.loads(found.stdout.decode().splitlines()[-1]))


@pytest.fixture
def served(tmp_path: Path) -> Iterator[Served]:
    hub = Hub({"config.json": b"{}", "model.safetensors": os.urandom(20_000_000), "README.md": b"no"})
    with serving_hub(hub) as asking:
        yield Served(hub, asking, tmp_path / "cache")


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
