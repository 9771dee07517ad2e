"""A model of the hub: the first start fetches it, the second one calls nobody."""

from __future__ import annotations

from pathlib import Path

import httpx
from support import checkpoints, server
from support.hub import Hub, serving_hub

RECORDER = """
import os, sys
def record(event, arguments):
    address = arguments[1] if event == "socket.connect" else arguments[:2] if event == "socket.getaddrinfo" else None
    if isinstance(address, tuple):
        with open(os.environ["CALLS"], "a") as file:
            print(event, address, file=file)
sys.addaudithook(record)
"""
"""For every Python of the server: whom it connects to, and whose address it looks up."""


def answer(url: str) -> str:
    body = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 0}
    reply = httpx.post(f"{url}/v1/chat/completions", json=body, timeout=120)
    return str(reply.json()["choices"][0]["message"]["content"])


def test_the_second_start_of_a_hub_model_calls_nobody(tmp_path: Path) -> None:
    checkpoints.make_llama(tmp_path / "model")
    hub = Hub({file.name: file.read_bytes() for file in (tmp_path / "model").iterdir()})
    (tmp_path / "sitecustomize.py").write_text(RECORDER)
    calls = tmp_path / "calls"
    more = {"PYTHONPATH": str(tmp_path), "CALLS": str(calls)}
    argv = ("org/model", "--download-dir", str(tmp_path / "cache"))
    with serving_hub(hub) as asking:
        with server.running(tmp_path, *argv, environment=asking | more) as first:
            said = answer(first.url)
        assert (
            any("/resolve/" in one for one in hub.asked)
            and asking["HF_ENDPOINT"].rpartition(":")[2] in calls.read_text()
        )
        calls.write_text("")
        hub.asked.clear()
        with server.running(tmp_path, *argv, environment=asking | more) as second:
            assert answer(second.url) == said
    assert (hub.asked, calls.read_text()) == ([], "")
