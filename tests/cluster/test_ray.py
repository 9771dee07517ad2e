"""Replicas on Ray Serve: clients see one server, whatever happens to a replica behind it."""

from __future__ import annotations

import asyncio
import json
from pathlib import Path
from typing import Any

import httpx
from cluster.conftest import Load, RayCluster, kill, until
from openai import AsyncOpenAI, NotFoundError

from sensorium.startup.model import DEMO_FOLDER

CHAT: Any = [{"role": "user", "content": "hello"}]


def client(cluster: RayCluster) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{cluster.url}/v1", api_key="none", timeout=240, max_retries=0)


async def test_openais_client_plain_and_streamed(pair: RayCluster) -> None:
    openai = client(pair)
    whole = await openai.chat.completions.create(model="sensorium-demo", messages=CHAT, temperature=0)
    stream = await openai.chat.completions.create(model="sensorium-demo", messages=CHAT, temperature=0, stream=True)
    pieces = [chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices]
    assert whole.choices[0].message.content == "".join(pieces) != ""
    assert len(pieces) > 3
    assert [model.id async for model in openai.models.list()] == ["sensorium-demo"]


async def test_a_client_that_leaves_frees_its_sequence(pair: RayCluster) -> None:
    before = await pair.total("vllm:request_success_total", finished_reason="abort")
    body = {"messages": CHAT, "max_tokens": 4000, "ignore_eos": True, "stream": True}
    async with (
        httpx.AsyncClient(timeout=240) as http,
        http.stream("POST", f"{pair.url}/v1/chat/completions", json=body) as reply,
    ):
        async for _ in reply.aiter_lines():
            break

    async def is_freed() -> bool:
        aborted = await pair.total("vllm:request_success_total", finished_reason="abort")
        return aborted == before + 1 and not await pair.total("vllm:num_requests_running")

    await until(is_freed)


async def test_a_session_stays_on_one_replica(pair: RayCluster) -> None:
    async with httpx.AsyncClient(timeout=240) as http:
        for session in range(4):
            words = f"conversation {session} about a red circle and a blue square and a green triangle " * 4
            cached = []
            for _ in range(5):
                reply = await http.post(
                    f"{pair.url}/v1/completions",
                    json={"prompt": words, "max_tokens": 1},
                    headers={"x-session-id": f"session-{session}"},
                )
                cached.append(reply.json()["usage"]["prompt_tokens_details"]["cached_tokens"])
            assert not cached[0]
            assert all(cached[1:]), cached


async def test_a_killed_replica_costs_only_what_it_worked_on(pair: RayCluster) -> None:
    load = Load(pair.url)
    clients = 8
    async with load.running(clients):
        await until(lambda: _true(load.whole > clients))
        doomed = pair.replicas()[0]
        kill(doomed)
        done = load.whole
        await until(lambda: _true(load.whole > done + 4 * clients))
        await until(lambda: _true(len(pair.replicas()) == 2 and doomed not in pair.replicas()))
        done = load.whole
        await until(lambda: _true(load.whole > done + 2 * clients))
    assert len(load.failed) <= clients, load.failed


async def _true(value: bool) -> bool:
    return value


async def test_scaling_up_and_down_loses_nothing(cluster: RayCluster) -> None:
    await asyncio.to_thread(
        cluster.deploy, *"--replicas 1..3 --target-requests 2 --scale-up-s 1 --scale-down-s 3".split()
    )
    load = Load(cluster.url)
    async with load.running(12):
        await until(lambda: _true(len(cluster.replicas()) == 3))
        done = load.whole
        await until(lambda: _true(load.whole > done + 36))
    async with load.running(1):
        await until(lambda: _true(len(cluster.replicas()) == 1))
    assert not load.failed, load.failed


async def test_answers_under_way_end_when_the_application_does(pair: RayCluster) -> None:
    load = Load(pair.url, tokens=600)
    async with httpx.AsyncClient(timeout=240) as http:
        streams = [asyncio.create_task(load.one(http, number)) for number in range(6)]

        async def all_run() -> bool:
            return await pair.total("vllm:num_requests_running") == 6 or load.whole + len(load.failed) > 0

        await until(all_run)
        await asyncio.to_thread(pair.delete)
        await asyncio.gather(*streams)
    assert not load.failed, load.failed
    assert load.whole == 6


async def test_several_models_behind_one_address(cluster: RayCluster, tmp_path: Path) -> None:
    file = tmp_path / "models.toml"
    file.write_text("".join(f'[models.{name}]\nmodel = "{DEMO_FOLDER}"\n' for name in ("one", "two")))
    await asyncio.to_thread(cluster.deploy, "--config", str(file))
    openai = client(cluster)
    assert [model.id async for model in openai.models.list()] == ["one", "two"]
    for name in ("one", "two"):
        answer = await openai.chat.completions.create(model=name, messages=CHAT)
        assert answer.model == name
        stream = await openai.chat.completions.create(model=name, messages=CHAT, stream=True)
        assert {chunk.model async for chunk in stream} == {name}
    try:
        await openai.chat.completions.create(model="three", messages=CHAT)
        raise AssertionError("three is served")
    except NotFoundError as error:
        assert "there are one, two" in str(error)
    async with httpx.AsyncClient(timeout=240) as http:
        body = {"model": "two", "messages": CHAT, "max_tokens": 4000, "ignore_eos": True, "stream": True}
        async with http.stream("POST", f"{cluster.url}/v1/chat/completions", json=body) as reply:
            async for _ in reply.aiter_lines():
                break
        assert (await http.get(f"{cluster.url}/readyz")).status_code == 200

    async def is_freed() -> bool:
        aborted = await cluster.total("vllm:request_success_total", finished_reason="abort", deployment="two")
        return aborted == 1 and not await cluster.total("vllm:num_requests_running")

    await until(is_freed)


async def test_a_model_that_cannot_be_loaded_is_told_in_one_line(cluster: RayCluster, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"architectures": ["NoSuchModel"]}))
    done = await asyncio.to_thread(
        cluster.run, "deploy", "ray", str(tmp_path), "--app", "broken", "--port", str(cluster.port), "--root-path", "/b"
    )
    assert done.returncode == 2
    assert "NoSuchModel" in done.stderr.splitlines()[-1]
    cluster.run("deploy", "ray", "--delete", "--app", "broken")
