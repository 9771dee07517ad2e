"""Several models behind one port, each with an engine process of its own: what fits is loaded, and nothing is left."""

from __future__ import annotations

import asyncio
import os
import signal
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support import bert, checkpoints, server
from support.live import until
from transformers import BertConfig, BertForSequenceClassification, BertModel

from sensorium.system.processes import family

SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 64,
    "max_position_embeddings": 512,
}
MEMORY = "840MiB"  # of three engines two


def make_bert(folder: Path, kind: type[Any], **options: Any) -> None:
    folder.mkdir()
    tokenizer = bert.write_tokenizer(folder)
    kind(BertConfig(vocab_size=len(tokenizer), **SMALL, **options)).save_pretrained(folder)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[server.Server]:
    folder = tmp_path_factory.mktemp("models")
    checkpoints.make_llama(folder / "chat")
    make_bert(folder / "embedder", BertModel)
    make_bert(folder / "reranker", BertForSequenceClassification, num_labels=1)
    broken = folder / "truncated"
    make_bert(broken, BertModel)
    (broken / "model.safetensors").write_bytes(b"none")
    log = tmp_path_factory.mktemp("log")
    with server.running(log, "--models-dir", str(folder), "--memory", MEMORY) as found:
        yield found


async def ask(client: httpx.AsyncClient, number: int) -> int:
    text = f"number {number}"
    match number % 3:
        case 0:
            body: dict[str, Any] = {"messages": [{"role": "user", "content": text}], "max_tokens": 3}
            return (await client.post("/v1/chat/completions", json=body)).status_code
        case 1:
            return (await client.post("/v1/embeddings", json={"input": text})).status_code
        case _:
            body = {"query": text, "documents": ["one", "two"]}
            return (await client.post("/v1/rerank", json=body)).status_code


async def mixed(url: str, count: int) -> Counter[int]:
    async with httpx.AsyncClient(base_url=url, timeout=120) as client:
        return Counter(await asyncio.gather(*(ask(client, number) for number in range(count))))


def count_descriptors(pid: int) -> int:
    return len(list(Path(f"/proc/{pid}/fd").iterdir()))


def states(url: str) -> dict[str, str]:
    return {row["id"]: row["state"] for row in httpx.get(f"{url}/v1/models", timeout=120).json()["data"]}


def do(url: str, what: str, model: str) -> httpx.Response:
    return httpx.post(f"{url}/v1/models/{what}", json={"model": model}, timeout=120)


def test_models_take_turns_under_a_budget_and_leave_nothing(served: server.Server) -> None:
    url, pid = served.url, served.process.pid
    assert states(url) == dict.fromkeys(("chat", "embedder", "reranker", "truncated"), "unloaded")
    assert asyncio.run(mixed(url, 30)) == {200: 30}
    assert sorted(states(url).values()) == ["ready", "ready", "unloaded", "unloaded"]
    failed = httpx.post(f"{url}/v1/embeddings", json={"model": "truncated", "input": "a"}, timeout=120)
    assert (failed.status_code, states(url)["truncated"]) == (503, "failed")
    assert "cannot be loaded" in failed.json()["error"]["message"] and "retry-after" in failed.headers
    assert asyncio.run(mixed(url, 6)) == {200: 6}  # the others were touched only to make room
    for model in ("chat", "embedder", "reranker"):
        assert do(url, "unload", model).json()["state"] == "unloaded"
    until(lambda: len(family(pid)) == 1)
    descriptors = count_descriptors(pid)
    assert do(url, "load", "embedder").json()["memory"]["resident"] > 0
    do(url, "unload", "embedder")
    until(lambda: count_descriptors(pid) <= descriptors)  # the last connections are being closed


def held(pid: int) -> tuple[list[int], int]:
    """The processes of a server, and the descriptors of all of them."""
    pids = sorted(family(pid))
    return pids, sum(map(count_descriptors, pids))


def test_ten_loads_and_unloads_leave_no_process_and_no_descriptor(served: server.Server) -> None:
    """Beside a model that stays, with whose engine the others share what they import."""
    url, pid = served.url, served.process.pid
    do(url, "load", "embedder")
    before: tuple[list[int], int] = ([], 0)
    for cycle in range(6):
        for model, path, body in (
            ("chat", "completions", {"prompt": "a", "max_tokens": 2}),
            ("reranker", "rerank", {"query": "a", "documents": ["b"]}),
        ):
            assert do(url, "load", model).json()["state"] == "ready"
            assert httpx.post(f"{url}/v1/{path}", json={"model": model, **body}, timeout=120).status_code == 200
            assert do(url, "unload", model).json()["state"] == "unloaded"
        if cycle == 0:
            before = held(pid)
    forked = [one for one in before[0] if b"sensorium.engine.nursery" in Path(f"/proc/{one}/cmdline").read_bytes()]
    assert len(forked) == 2  # the engine that stays, and who forks
    until(lambda: held(pid)[0] == before[0] and held(pid)[1] <= before[1])


def test_an_engine_that_dies_touches_no_other(served: server.Server) -> None:
    url, pid = served.url, served.process.pid
    do(url, "load", "embedder")
    before = set(family(pid))
    do(url, "load", "chat")
    (engine,) = (
        one for one in set(family(pid)) - before if b"sensorium.engine" in Path(f"/proc/{one}/cmdline").read_bytes()
    )
    os.kill(engine, signal.SIGKILL)
    until(lambda: not Path(f"/proc/{engine}").exists())
    assert httpx.post(f"{url}/v1/embeddings", json={"input": "a"}, timeout=120).status_code == 200
    assert httpx.get(f"{url}/readyz").status_code == 200
    until(lambda: states(url)["chat"] == "ready")
