"""Models by name, each with its own state: what one is in concerns nobody who names another."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass

import pytest
from support.api_support import READY, FakeEngine, chat, complete, get, make_model, post

from sensorium.api.transport.server import HttpServer, build_app, listen
from sensorium.config import Limits, ServerConfig
from sensorium.errors import ModelNotFoundError, UnavailableError
from sensorium.serving.catalog import Catalog


@dataclass
class Two:
    """A server of two models; the first has two names."""

    catalog: Catalog
    engines: tuple[FakeEngine, FakeEngine]
    http: HttpServer

    @property
    def port(self) -> int:
        return self.http.address[1]


@asynccontextmanager
async def two_models() -> AsyncIterator[Two]:
    config, limits = ServerConfig(port=0), Limits()
    engines = FakeEngine(), FakeEngine()
    models = [
        make_model(engine, config, limits, names=names)
        for engine, names in zip(engines, (("one", "uno"), ("two",)), strict=True)
    ]
    app = build_app(Catalog.of({"one": models[0], "uno": models[0], "two": models[1]}), config, limits)
    http = HttpServer(app, limits, listen(config))
    async with AsyncExitStack() as stack:
        for model in models:
            stack.push_async_callback(model.aclose)
        await http.start()
        stack.push_async_callback(http.close)
        yield Two(app.context.catalog, engines, http)


async def test_names_lead_to_models() -> None:
    async with two_models() as served:
        catalog = served.catalog
        assert [entry.names for entry in catalog.entries] == [("one", "uno"), ("two",)]
        assert catalog.find("uno") is catalog.find("one") is catalog.find(None) is catalog.find("one:latest")
        with pytest.raises(ModelNotFoundError, match="'three' does not exist"):
            catalog.find("three")


async def test_a_model_is_in_use_while_it_is_acquired() -> None:
    async with two_models() as served:
        entry = served.catalog.find("one")
        async with served.catalog.acquire("uno") as found, served.catalog.acquire("one"):
            assert (found, entry.users, served.catalog.find("two").users) == (entry, 2, 0)
        with pytest.raises(ZeroDivisionError):
            async with served.catalog.acquire("one"):
                raise ZeroDivisionError
        assert entry.users == 0
        served.catalog.drain()
        with pytest.raises(UnavailableError, match="shutting down"):
            async with served.catalog.acquire("one"):
                raise AssertionError
        assert (entry.state, entry.users) == ("draining", 0)


@pytest.mark.parametrize("state", ["loading", "restarting", "failed"])
async def test_what_one_model_is_in_concerns_nobody_who_names_the_other(state: str) -> None:
    async with two_models() as served:
        served.engines[0].state = state
        served.engines[0].ready = None if state == "loading" else READY
        away = await chat(served.port, model="one")
        assert (away.status, away.error["code"], "retry-after" in away.headers) == (503, "unavailable", True)
        assert (await complete(served.port, prompt="a")).status == 503  # the default is the first
        for path, body in (
            ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a"}]}),
            ("/v1/embeddings", {"input": "a"}),
            ("/tokenize", {"prompt": "a"}),
            ("/detokenize", {"tokens": [1]}),
        ):
            assert (await post(served.port, path, {"model": "uno", **body})).status == 503, path
            assert (await post(served.port, path, {"model": "two", **body})).status != 503, path
        page = (await get(served.port, "/metrics")).body.decode()
        assert f'sensorium:model_state{{engine="0",model_name="one",state="{state}"}} 1.0' in page
        assert 'sensorium:model_state{engine="0",model_name="two",state="ready"} 1.0' in page
        assert (await get(served.port, "/readyz")).status == 503
        served.engines[0].state, served.engines[0].ready = "ready", READY
        assert (await get(served.port, "/readyz")).status == 200
        assert (await chat(served.port, model="one")).status == 200


async def test_users_are_counted_for_each_model() -> None:
    async with two_models() as served:
        hold = asyncio.Event()
        entry = served.catalog.find("two")
        model = entry.model
        prepare = model.prompts.prepare_chat

        async def held(*args: object, **options: object) -> object:
            await hold.wait()
            return await prepare(*args, **options)  # type: ignore[arg-type]

        model.prompts.prepare_chat = held  # type: ignore[assignment,method-assign]
        asked = asyncio.create_task(chat(served.port, model="two"))
        while entry.users != 1:
            await asyncio.sleep(0.01)
        page = (await get(served.port, "/metrics")).body.decode()
        assert 'sensorium:model_users{engine="0",model_name="two"} 1.0' in page
        assert 'sensorium:model_users{engine="0",model_name="one"} 0.0' in page
        hold.set()
        assert (await asked).status == 200
        assert entry.users == 0
