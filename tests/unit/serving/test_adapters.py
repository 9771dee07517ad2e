"""Adapters as clients and operators see them: names, routes, replacement while requests are in flight."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from support.api_support import FakeEngine, Reply, Served, chat, complete, get, post, serving, speak
from support.pooling_engine import engine_of

from sensorium.cli.main import parser, serve_options
from sensorium.config import ServePlan
from sensorium.errors import StartupError
from sensorium.startup.catalog import prepare
from sensorium.startup.model import adapters_of
from sensorium.types import EngineOutput, EngineRequest


@pytest.fixture
def folders(tmp_path: Path) -> Path:
    for name in ("one", "two", "broken"):
        (tmp_path / name).mkdir()
    return tmp_path


async def load(served: Served, name: str, path: Path, **fields: Any) -> Reply:
    return await post(served.port, "/v1/load_lora_adapter", {"lora_name": name, "lora_path": str(path), **fields})


async def unload(served: Served, name: str) -> Reply:
    return await post(served.port, "/v1/unload_lora_adapter", {"lora_name": name})


def number_of(served: Served, folder: Path) -> int:
    return next(number for number, path in served.engine.adapters.items() if path == str(folder))


async def test_requests_name_an_adapter_as_their_model(folders: Path) -> None:
    async with serving() as served:
        reply = await load(served, "french", folders / "one")
        assert (reply.status, reply.body) == (200, b"Success: LoRA adapter 'french' added successfully.")
        assert (await load(served, "german", folders / "two", base_model_name="tiny")).status == 200
        rows = {row["id"]: row for row in (await get(served.port, "/v1/models")).json["data"]}
        assert list(rows) == ["tiny", "french", "german"]
        assert (rows["tiny"]["parent"], rows["tiny"]["adapters"]) == (None, ["french", "german"])
        assert (rows["french"]["parent"], rows["french"]["root"]) == ("tiny", str(folders / "one"))
        assert (await get(served.port, "/v1/models/german")).json["parent"] == "tiny"
        for name, folder in (("french", "one"), ("french:latest", "one"), ("german", "two")):
            reply = await chat(served.port, model=name)
            assert (reply.status, reply.json["model"]) == (200, name)
            assert served.engine.requests[-1].adapter == number_of(served, folders / folder)
        for fields in ({}, {"model": "tiny"}):
            await complete(served.port, **fields)
            assert served.engine.requests[-1].adapter == 0
        assert (await unload(served, "french")).status == 200
        assert (await chat(served.port, model="french")).error["code"] == "model_not_found"
        assert list(served.engine.adapters.values()) == [str(folders / "two")]


async def test_vectors_with_an_adapter(folders: Path) -> None:
    async with serving(engine_of("embed")) as served:
        await load(served, "mine", folders / "one")
        await post(served.port, "/v1/embeddings", {"input": "a", "model": "mine"})
        await post(served.port, "/v1/embeddings", {"input": "a"})
        assert [one.adapter for one in served.engine.requests] == [number_of(served, folders / "one"), 0]


async def test_an_adapter_replaced_while_it_is_used(folders: Path) -> None:
    """Who has the old one ends with it; only then the engine forgets it."""
    begun, may_end = asyncio.Event(), asyncio.Event()

    async def slow(request: EngineRequest) -> AsyncIterator[EngineOutput]:
        begun.set()
        await may_end.wait()
        async for output in speak(request):
            yield output

    async with serving(FakeEngine(script=slow)) as served:
        await load(served, "mine", folders / "one")
        old = number_of(served, folders / "one")
        first = asyncio.create_task(chat(served.port, model="mine"))
        await asyncio.wait_for(begun.wait(), 120)
        page = (await get(served.port, "/metrics")).body.decode()
        assert 'running_lora_adapters="mine"' in page
        assert (await load(served, "mine", folders / "two")).error["param"] == "lora_name"
        assert (await load(served, "mine", folders / "two", load_inplace=True)).status == 200
        new = number_of(served, folders / "two")
        second = asyncio.create_task(chat(served.port, model="mine"))
        while len(served.engine.requests) < 2:
            await asyncio.sleep(0.01)
        assert set(served.engine.adapters) == {old, new}
        may_end.set()
        assert [(await one).status for one in (first, second)] == [200, 200]
        assert [one.adapter for one in served.engine.requests] == [old, new]
        assert set(served.engine.adapters) == {new}


async def test_what_cannot_be_loaded_changes_nothing(folders: Path) -> None:
    async with serving() as served:
        await load(served, "mine", folders / "one")
        reply = await load(served, "mine", folders / "broken", load_inplace=True)
        assert (reply.error["param"], reply.error["message"]) == ("lora_path", "adapter mine: it is broken")
        assert (await load(served, "other", folders / "no such folder")).error["param"] == "lora_path"
        assert (await load(served, "tiny", folders / "one")).error["param"] == "lora_name"
        assert (await load(served, "x", folders / "one", base_model_name="none")).status == 404
        assert (await unload(served, "tiny")).status == 404
        assert (await chat(served.port, model="mine")).status == 200


async def test_only_operators_change_adapters(folders: Path) -> None:
    async with serving(api_key=("user",)) as served:
        for path in ("/v1/load_lora_adapter", "/v1/unload_lora_adapter"):
            body = {"lora_name": "a", "lora_path": str(folders / "one")}
            assert (await post(served.port, path, body, headers={"Authorization": "Bearer user"})).status == 403


def options(*argv: str) -> Any:
    return serve_options(parser().read(["serve", "m", *argv]), {})


def test_flags_of_adapters(folders: Path) -> None:
    own = options("--lora", "a=/x", "b=y/z", "--lora", "c=d=e")
    assert adapters_of(own.load) == [("a", "/x"), ("b", "y/z"), ("c", "d=e")]
    said = '{"name": "a", "path": "/x", "base_model_name": "m"}'
    theirs = options("--enable-lora", "--max-loras", "4", "--max-lora-rank", "64", "--lora-modules", said, "b=y")
    assert adapters_of(theirs.load) == [("a", "/x"), ("b", "y")]
    assert len(theirs.notes) == 3
    for bad in ("a", "=x", "a=", "{}"):
        with pytest.raises(SystemExit):
            options("--lora", bad)


def test_adapters_are_looked_at_before_the_model_is_loaded(folders: Path) -> None:
    demo = serve_options(parser().read(["serve", "--lora", f"a={folders / 'one'}"]), {})
    with pytest.raises(StartupError, match=r"--lora a: .*adapter_config.json"):
        prepare(ServePlan(demo, (demo,)), lambda phase, fraction: None)
    twice = serve_options(parser().read(["serve", "--lora", "a=x", "a=y"]), {})
    with pytest.raises(StartupError, match="the adapter x and the adapter y have one name, a: "):
        prepare(ServePlan(twice, (twice,)), lambda phase, fraction: None)
