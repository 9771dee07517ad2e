"""Models that are loaded when they are asked for: what room they get, who waits, and what clients and operators see."""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from support.api_support import READY, FakeEngine, Reply, chat, get, make_model, post

from sensorium.api.protocol.ollama import kept_s
from sensorium.api.transport.server import HttpServer, build_app, listen
from sensorium.checkpoint.adapters import WEIGHTS_FILE
from sensorium.config import Limits, ServerConfig
from sensorium.errors import RequestError, StartupError, UnavailableError
from sensorium.serving import entry as entry_module
from sensorium.serving.catalog import Catalog, CatalogEntry
from sensorium.serving.entry import Keeping, Outline, Progress
from sensorium.serving.model import ServedModel

CONFIG, LIMITS = ServerConfig(port=0), Limits()
LAZY = Keeping(lazy=True)


@dataclass
class FakeSource:
    """Opens a model on a scripted engine. `gate` holds a load, `failure` ends it."""

    name: str
    size: int = 1
    failure: str = ""
    engines: list[FakeEngine] = field(default_factory=list)
    gate: asyncio.Event = field(default_factory=asyncio.Event)
    is_open: int = 0
    max_num_seqs: int = 4

    def __post_init__(self) -> None:
        self.gate.set()

    @property
    def outline(self) -> Outline | None:
        return Outline(
            make_model(FakeEngine(), CONFIG, LIMITS).checkpoint, ("generate", "embed"), (), 512, 7, self.size
        )

    async def find(self, on_progress: Progress) -> Outline:
        on_progress("weights", 0.25)
        await self.gate.wait()
        if self.failure:
            raise StartupError(self.failure)
        found = self.outline
        assert found is not None
        return found

    @asynccontextmanager
    async def open(self, on_progress: Progress) -> AsyncIterator[ServedModel]:
        engine = FakeEngine(ready=READY)
        self.engines.append(engine)
        model = make_model(engine, CONFIG, LIMITS, names=(self.name,))
        self.is_open += 1
        try:
            yield model
        finally:
            await asyncio.sleep(0.01)  # as ending a process takes
            self.is_open -= 1
            await model.aclose()


def catalog_of(
    names: str, *, budget: int | None = None, keeping: Keeping = LAZY, wait_s: float = 120.0
) -> tuple[Catalog, list[FakeSource]]:
    sources = [FakeSource(name) for name in names]
    entries = [CatalogEntry((source.name,), source, keeping) for source in sources]
    return Catalog(entries, budget_bytes=budget, load_wait_s=wait_s), sources


async def use(catalog: Catalog, name: str) -> None:
    async with catalog.acquire(name) as entry:
        assert entry.model.names == (name,)


async def until(holds: Callable[[], bool]) -> None:
    async with asyncio.timeout(120):
        while not holds():
            await asyncio.sleep(0.005)


def states(catalog: Catalog) -> str:
    return " ".join(entry.state for entry in catalog.entries)


async def test_the_first_requests_load_a_model_once() -> None:
    catalog, (source,) = catalog_of("a")
    await catalog.start()
    assert states(catalog) == "unloaded"
    await asyncio.gather(*(use(catalog, "a") for _ in range(8)))
    assert (len(source.engines), states(catalog)) == (1, "ready")
    await catalog.aclose()
    assert source.is_open == 0


async def test_a_server_that_ends_while_it_loads_gives_back_what_the_load_took(monkeypatch: pytest.MonkeyPatch) -> None:
    """The signal ends the start, and the end of the server must not interrupt what that gives back."""
    monkeypatch.setattr(FakeEngine, "wait_ready", lambda self: asyncio.Event().wait())
    catalog, (source,) = catalog_of("a", keeping=Keeping())
    start = asyncio.ensure_future(catalog.start())
    await until(lambda: source.is_open == 1)
    start.cancel()
    await asyncio.sleep(0)
    await catalog.aclose()
    assert source.is_open == 0


async def test_the_one_that_was_used_longest_ago_makes_room() -> None:
    catalog, sources = catalog_of("abc", budget=2)
    await catalog.start()
    for name in "abacbc":
        await use(catalog, name)
        assert sum(source.is_open for source in sources) <= 2
    assert [len(source.engines) for source in sources] == [1, 2, 1]
    assert states(catalog) == "unloaded ready ready"
    await catalog.aclose()


async def test_a_model_in_use_is_not_unloaded_and_nobody_starves() -> None:
    """It takes nobody in while another one waits for its memory; who asks for it then gets it afterwards."""
    catalog, (first, second) = catalog_of("ab", budget=1)
    await catalog.start()
    async with catalog.acquire("a"):
        other = asyncio.create_task(use(catalog, "b"))
        await until(lambda: catalog.find("a").is_leaving)
        again = asyncio.create_task(use(catalog, "a"))
        await asyncio.sleep(0.05)
        assert (first.is_open, second.is_open, other.done(), again.done()) == (1, 0, False, False)
    await asyncio.gather(other, again)
    assert (len(first.engines), len(second.engines)) == (2, 1)
    await catalog.aclose()


async def test_two_thousand_mixed_uses_under_a_budget_for_two() -> None:
    catalog, sources = catalog_of("abcd", budget=2)
    await catalog.start()

    async def client(names: Sequence[str]) -> None:
        for name in names:
            async with catalog.acquire(name) as entry:
                assert entry.state == "ready" and entry.served is not None
                await asyncio.sleep(0)
                assert entry.served.client.state == "ready" and sum(source.is_open for source in sources) <= 2

    await asyncio.gather(*(client([("abcd" * 63)[(7 * i + k * k) % 251] for k in range(125)]) for i in range(16)))
    assert catalog.residents.taken_bytes == sum(source.is_open for source in sources) <= 2
    assert all(entry.users == entry.waiting == 0 for entry in catalog.entries)
    await catalog.aclose()


async def test_what_can_never_fit_is_told() -> None:
    catalog, (first, second) = catalog_of("ab", budget=3)
    first.size, pinned = 4, CatalogEntry(("p",), FakeSource("p", 2), Keeping(pinned=True))
    catalog = Catalog([*catalog.entries, pinned], budget_bytes=3)
    await catalog.start()
    with pytest.raises(UnavailableError, match="--memory"):
        await use(catalog, "a")
    second.size = 2
    with pytest.raises(UnavailableError, match="pinned"):
        await use(catalog, "b")
    assert states(catalog) == "failed failed ready"
    await use(catalog, "p")
    await catalog.aclose()


async def test_a_load_that_fails_is_tried_again_later(monkeypatch: pytest.MonkeyPatch) -> None:
    catalog, (broken, _) = catalog_of("ab")
    await catalog.start()
    broken.failure = "the file tiny/model.safetensors is truncated"
    for _ in range(2):
        with pytest.raises(UnavailableError, match=r"'a' cannot be loaded: the file a/model\.safetensors is truncated"):
            await use(catalog, "a")
    await use(catalog, "b")
    broken.failure = ""
    with pytest.raises(UnavailableError):
        await use(catalog, "a")
    monkeypatch.setattr(entry_module, "RETRY_S", 0.0)
    await use(catalog, "a")
    assert states(catalog) == "ready ready"
    await catalog.aclose()


async def test_requests_wait_for_a_load_as_long_as_they_may() -> None:
    catalog, (slow, _) = catalog_of("ab", wait_s=0.05)
    await catalog.start()
    slow.gate.clear()
    with pytest.raises(UnavailableError, match=r"still loading \(weights, 25%\)") as caught:
        await use(catalog, "a")
    assert caught.value.retry_after_s > 0
    await use(catalog, "b")
    slow.gate.set()
    await until(lambda: catalog.find("a").state == "ready")
    await use(catalog, "a")
    slow.gate.clear()
    waiting = asyncio.create_task(catalog.unload(catalog.find("a")))
    assert await waiting
    waiting = asyncio.create_task(use(catalog, "a"))  # type: ignore[arg-type]
    await asyncio.sleep(0.01)
    catalog.drain()
    with pytest.raises(UnavailableError, match="shutting down"):
        await waiting
    await catalog.aclose()


async def test_an_idle_model_is_unloaded() -> None:
    catalog, (source, stays) = catalog_of("ab", keeping=Keeping(lazy=True, idle_unload_s=0.05))
    stays_entry = CatalogEntry(("b",), stays, Keeping(lazy=True, pinned=True, idle_unload_s=0.05))
    catalog = Catalog([catalog.entries[0], stays_entry])
    await catalog.start()
    await use(catalog, "b")
    async with catalog.acquire("a"):
        await asyncio.sleep(0.15)
        assert source.is_open == 1
    await until(lambda: source.is_open == 0)
    assert states(catalog) == "unloaded ready"
    catalog.keep(catalog.find("a"), float("inf"))
    await use(catalog, "a")
    await asyncio.sleep(0.15)
    assert states(catalog) == "ready ready"
    assert catalog.forget(catalog.find("a")) and not catalog.forget(catalog.find("b"))
    await until(lambda: states(catalog) == "unloaded ready")
    await catalog.aclose()


async def test_an_engine_that_is_lost_for_good_is_started_again_when_it_is_asked_for() -> None:
    catalog, (source, _) = catalog_of("ab")
    await catalog.start()
    await use(catalog, "a")
    await use(catalog, "b")
    source.engines[0].state = "failed"
    assert states(catalog) == "failed ready"
    await use(catalog, "a")
    assert (len(source.engines), source.is_open) == (2, 1)
    await catalog.aclose()


async def test_a_server_starts_what_fits() -> None:
    catalog, sources = catalog_of("abc", budget=2, keeping=Keeping())
    with pytest.raises(UnavailableError):
        catalog.check_all_ready()
    await catalog.start()
    catalog.check_all_ready()
    assert sum(source.is_open for source in sources) == 2
    await catalog.aclose()
    alone, (broken,) = catalog_of("a", keeping=Keeping())
    broken.failure = "there is no such folder"
    with pytest.raises(StartupError, match="no such folder"):
        await alone.start()
    await alone.aclose()


@asynccontextmanager
async def server(catalog: Catalog, config: ServerConfig = CONFIG) -> AsyncIterator[int]:
    http = HttpServer(build_app(catalog, config, LIMITS), LIMITS, listen(config))
    await http.start()
    await catalog.start()
    try:
        yield http.address[1]
    finally:
        await http.close()
        await catalog.aclose()


def row_of(reply: Reply, name: str) -> dict[str, object]:
    return next(row for row in reply.json["data"] if row["id"] == name)


async def test_operators_load_and_unload() -> None:
    catalog, (first, _) = catalog_of("ab")
    config = ServerConfig(port=0, api_key=("user",), operator_key=("boss",))
    user, boss = ({"Authorization": f"Bearer {key}"} for key in ("user", "boss"))
    async with server(catalog, config) as port:
        for path in ("/v1/models/load", "/v1/models/unload"):
            assert (await post(port, path, {"model": "a"}, headers=user)).status == 403
            assert (await post(port, path, {"model": "z"}, headers=boss)).status == 404
        row = row_of(await get(port, "/v1/models", headers=user), "a")
        assert (row["state"], row["tasks"], row["memory"], row["max_model_len"]) == (
            "unloaded",
            ["generate", "embed"],
            None,
            512,
        )
        reply = await post(port, "/v1/models/load", {"model": "a"}, headers=boss)
        assert (reply.status, reply.json["state"], reply.json["memory"]["weights"]) == (200, "ready", 1)
        page = (await get(port, "/metrics", headers=user)).body.decode()
        assert 'sensorium:model_state{engine="0",model_name="b",state="unloaded"} 1.0' in page
        assert (await get(port, "/api/ps", headers=user)).json["models"][0]["name"] == "a:latest"
        reply = await post(port, "/v1/models/unload", {"model": "a"}, headers=boss)
        assert (reply.status, reply.json["state"], first.is_open) == (200, "unloaded", 0)
        assert (await get(port, "/api/ps", headers=user)).json["models"] == []
        assert (await post(port, "/api/show", {"model": "a"}, headers=user)).json["capabilities"] == ["completion"]
        first.failure = "no"
        reply = await post(port, "/v1/models/load", {"model": "a"}, headers=boss)
        assert (reply.status, "retry-after" in reply.headers) == (503, True)
        assert row_of(await get(port, "/v1/models", headers=user), "a")["error"] == "no"


def adapter_file(folder: Path, nbytes: int) -> Path:
    folder.mkdir()
    (folder / WEIGHTS_FILE).write_bytes(bytes(nbytes))
    return folder


async def load_adapter(port: int, path: Path) -> Reply:
    body = {"lora_name": path.name, "lora_path": str(path), "base_model_name": "a"}
    return await post(port, "/v1/load_lora_adapter", body)


async def test_adapters_take_of_the_memory_of_all_models(tmp_path: Path) -> None:
    """An idle model makes room for one, and one that goes gives it back. This engine holds a file's bytes twice."""
    catalog, sources = catalog_of("ab", budget=250)
    for source in sources:
        source.size = 100
    taken = lambda: catalog.residents.taken_bytes  # noqa: E731
    async with server(catalog) as port:
        await use(catalog, "b")
        assert (await load_adapter(port, adapter_file(tmp_path / "x", 20))).status == 200
        assert (taken(), states(catalog)) == (240, "ready ready")
        assert row_of(await get(port, "/v1/models"), "a")["memory"]["adapters"] == 40  # type: ignore[index]
        assert (await load_adapter(port, adapter_file(tmp_path / "y", 20))).status == 200
        assert (taken(), states(catalog)) == (180, "ready unloaded")
        assert (await post(port, "/v1/unload_lora_adapter", {"lora_name": "y"})).status == 200
        assert taken() == 140
        await catalog.unload(catalog.find("a"))
        assert taken() == 0
        assert (await chat(port, model="x")).status == 200  # it comes back with its base
        assert taken() == 140
    assert sources[0].engines[-1].adapters == {catalog.entries[0].adapters.listed[0].number: str(tmp_path / "x")}


async def test_an_adapter_whose_folder_is_gone_does_not_keep_its_model_away(tmp_path: Path) -> None:
    catalog, _ = catalog_of("ab")
    async with server(catalog) as port:
        await use(catalog, "a")
        for name in "xy":
            assert (await load_adapter(port, adapter_file(tmp_path / name, 20))).status == 200
        await catalog.unload(catalog.find("a"))
        shutil.rmtree(tmp_path / "x")
        assert (await chat(port, model="x")).error["code"] == "model_not_found"
        assert [(await chat(port, model=name)).status for name in "ay"] == [200, 200]
        assert catalog.entries[0].adapters.names == ("y",)


@pytest.mark.parametrize(("nbytes", "status"), [(200, 400), (60, 503), (40, 503)])
async def test_an_adapter_that_does_not_fit_changes_nothing(tmp_path: Path, nbytes: int, status: int) -> None:
    """One that never will, one for which a model in use would have to go, and for what one takes beyond its file."""
    catalog, (source, _) = catalog_of("ab", budget=250)
    for one in catalog.entries:
        one.source.size = 100  # type: ignore[union-attr]
    async with server(catalog) as port, catalog.acquire("b"):
        reply = await load_adapter(port, adapter_file(tmp_path / "x", nbytes))
        assert (reply.status, "--memory" in reply.error["message"]) == (status, True)
        assert ("retry-after" in reply.headers) == (status == 503)
        assert (catalog.residents.taken_bytes, states(catalog)) == (200, "ready ready")
        assert not catalog.entries[0].adapters.listed and not source.engines[0].adapters
        assert (await chat(port, model="x")).status == 404


@pytest.mark.parametrize(("name", "status"), [("fine", 400), ("broken", 200)])
async def test_the_name_of_an_adapter_that_is_being_loaded_is_taken(tmp_path: Path, name: str, status: int) -> None:
    """By one model's load no other model can take it, until the load has failed."""
    catalog, _ = catalog_of("ab")
    path, may_load = adapter_file(tmp_path / name, 20), asyncio.Event()
    body = {"lora_name": name, "lora_path": str(adapter_file(tmp_path / "other", 20)), "base_model_name": "b"}

    async def wait(nbytes: int) -> None:
        await may_load.wait()

    async with server(catalog) as port:
        table = catalog.entries[0].adapters
        add = table.add(FakeEngine(), name, str(path), replaces=False, make_room=wait)  # type: ignore[arg-type]
        first = asyncio.create_task(add)
        await until(lambda: table.has_claim(name))
        second = await post(port, "/v1/load_lora_adapter", body)
        assert second.status == 400 and "is called" in second.error["message"]
        assert (await chat(port, model=name)).status == 404
        may_load.set()
        await asyncio.wait((first,))
        assert (await post(port, "/v1/load_lora_adapter", body)).status == status
        assert [name in entry.adapters.names for entry in catalog.entries] == [status == 400, status == 200]
        if status == 200:
            assert isinstance(first.exception(), RequestError)


async def test_without_an_operators_key_this_machine_may_and_nobody_with_a_users_key() -> None:
    for keys, status in (((), 200), (("user",), 403)):
        catalog, _ = catalog_of("a")
        async with server(catalog, ServerConfig(port=0, api_key=keys)) as port:
            headers = {"Authorization": "Bearer user"} if keys else {}
            assert (await post(port, "/v1/models/load", {"model": "a"}, headers=headers)).status == status


async def test_a_request_without_a_name_gets_a_model_for_its_task() -> None:
    catalog, (first, second) = catalog_of("ab")
    catalog.entries[0].outline = Outline(catalog.entries[0].outline.checkpoint, ("embed",), (), 512)  # type: ignore[union-attr]
    async with server(catalog) as port:
        assert (await get(port, "/readyz")).status == 200
        assert (await chat(port, model=None)).status == 200
        assert (first.is_open, second.is_open) == (0, 1)
        assert catalog.find(None, "embed").name == "a" and catalog.find(None).name == "a"
        reply = await chat(port, model="zzz")
        assert reply.status == 404 and "there are a, b" in reply.error["message"]


async def test_ollamas_clients_say_how_long_a_model_stays() -> None:
    catalog, (first, _) = catalog_of("ab")
    said = {"model": "a", "messages": [{"role": "user", "content": "x"}], "stream": False}
    async with server(catalog) as port:
        assert (await post(port, "/api/chat", {**said, "keep_alive": "10m"})).status == 200
        (row,) = (await get(port, "/api/ps")).json["models"]
        left = datetime.fromisoformat(row["expires_at"]) - datetime.now(UTC)
        assert timedelta(minutes=8) < left <= timedelta(minutes=10)
        assert (await post(port, "/api/chat", {**said, "keep_alive": 0})).status == 200
        await until(lambda: first.is_open == 0)
        reply = await post(port, "/api/generate", {"model": "a", "keep_alive": 0})
        assert (reply.json["done_reason"], len(first.engines)) == ("unload", 1)
        assert (await post(port, "/api/generate", {"model": "a", "keep_alive": -1})).json["done_reason"] == "load"
        assert (len(first.engines), first.is_open) == (2, 1)
        await post(port, "/api/generate", {"model": "a", "keep_alive": "0s"})
        await until(lambda: first.is_open == 0)


NO_DURATIONS: list[Any] = [None, "", "soon", "1x", [], True, "1.2.3s"]


@pytest.mark.parametrize(
    ("said", "seconds"),
    [
        (0, 0),
        ("0", 0),
        ("0s", 0),
        (90, 90),
        ("90", 90),
        (1.5, 1.5),
        ("1h30m", 5400),
        ("250ms", 0.25),
        (-1, float("inf")),
    ]
    + [("-1m", float("inf"))]
    + [(bad, None) for bad in NO_DURATIONS],
)
def test_durations_as_ollama_writes_them(said: object, seconds: float | None) -> None:
    assert kept_s(said) == seconds
