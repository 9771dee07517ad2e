"""Starts the server in its own environment; the clients live in this one."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

HERE = Path(__file__).parent
ROOT = HERE.parents[1]


@pytest.fixture(scope="session")
def url() -> Iterator[str]:
    """The base URL of a server, with /v1."""
    python = os.environ.get("SERVER_PYTHON", str(ROOT / ".venv/bin/python"))
    process = subprocess.Popen(
        [python, str(HERE / "server.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdin is not None and process.stdout is not None
    port = process.stdout.readline().strip()
    assert port, "the server did not start"
    yield f"http://127.0.0.1:{port}/v1"
    process.stdin.close()
    assert process.wait(20) == 0


@pytest.fixture(autouse=True)
def quiet(monkeypatch: pytest.MonkeyPatch, url: str) -> None:
    """No client reports anywhere or looks for another server; those that read the environment find ours."""
    for name, value in {
        "OPENAI_API_KEY": "none",
        "OPENAI_BASE_URL": url,
        "OPENAI_AGENTS_DISABLE_TRACING": "1",
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "LANGSMITH_TRACING": "false",
    }.items():
        monkeypatch.setenv(name, value)
