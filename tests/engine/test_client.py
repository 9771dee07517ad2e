"""The client and a real engine process: streams, aborts, loss and replacement, and nothing left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from harness import bench, image_request, random_prompt, request, tokens_of

from sensorium.config import EngineConfig
from sensorium.engine import client as client_module
from sensorium.engine.client import EngineClient, OutputStream
from sensorium.engine.core import STEP_FAILED
from sensorium.engine.faults import VARIABLE
from sensorium.errors import StartupError, UnavailableError
from sensorium.models.base import Model
from sensorium.types import EngineOutput, EngineRequest


@pytest.fixture(autouse=True)
def quick_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@contextlib.asynccontextmanager
async def running(folder: Path, **options: Any) -> AsyncIterator[EngineClient]:
    client = EngineClient(EngineConfig(str(folder), dtype="float32", threads=1, kv_cache_memory=2**22, **options))
    client.start()
    try:
        await client.wait_ready()
        yield client
    finally:
        pid = client.pid
        await client.aclose()
        assert pid is None or gone(pid)


def gone(pid: int) -> bool:
    """No such process, not even a zombie."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    return False


def ended(pid: int) -> bool:
    """The same for an orphan, which nobody may collect in a container."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


async def collect(stream: OutputStream) -> tuple[list[int], EngineOutput]:
    tokens: list[int] = []
    last = None
    async with asyncio.timeout(50):
        async for output in stream:
            tokens += output.token_ids
            last = output
    assert last is not None
    return tokens, last


async def until(condition: Any, timeout_s: float = 10.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        await asyncio.sleep(0.01)


async def is_idle(client: EngineClient) -> None:
    await until(lambda: client.stats.running == client.stats.waiting == 0
                and client.stats.kv_blocks_free == client.stats.kv_blocks > 0)


def endless(seed: int = 1) -> EngineRequest:
    return request(random_prompt(seed, 20), 1900)


async def test_life_of_an_engine(folder: Path, model: Model) -> None:
    """Start, serve text and pictures to many at once, abort, be killed, come back, stop."""
    phases: list[tuple[str, float]] = []
    client = EngineClient(EngineConfig(str(folder), dtype="float32", threads=1, kv_cache_memory=2**22, max_num_seqs=8),
                          on_progress=lambda phase, part: phases.append((phase, part)))
    with pytest.raises(UnavailableError):
        client.submit(endless())
    client.start()
    assert client.state == "loading"
    ready = await client.wait_ready()
    assert client.state == "ready"
    assert client.ready == ready
    assert (ready.device, ready.dtype, ready.max_model_len) == ("cpu", "float32", 2048)
    assert "generate" in ready.tasks
    assert [phase for phase, part in phases if part == 1.0] == ["weights", "cache"]
    try:
        await same_as_without_processes(client, model)
        await aborted_requests_are_gone(client)
        await a_lost_engine_is_replaced(client)
    finally:
        pid = client.pid
        await client.aclose()
    assert client.state == "closed"
    assert pid is not None
    assert gone(pid)
    with pytest.raises(UnavailableError):
        client.submit(endless())
    await client.aclose()


async def same_as_without_processes(client: EngineClient, model: Model) -> None:
    requests = [*(request(random_prompt(i, 10 + 5 * i), 20, logprobs=i % 2 or None) for i in range(12)),
                image_request(1, 20, grid=(60, 60)),  # a frame larger than any buffer on its way
                image_request(2, 20, images=2)]
    expected = tokens_of(bench(model, max_model_len=1024, max_num_seqs=8).run(*requests))
    got = await asyncio.gather(*(collect(client.submit(replace(one, id=client.next_id()))) for one in requests))
    assert [tokens for tokens, _ in got] == expected
    assert {last.finish_reason for _, last in got} == {"length"}
    await is_idle(client)


async def aborted_requests_are_gone(client: EngineClient) -> None:
    """R8, from the engine's side: before the first token, later, twice, by leaving the block, and of many at once."""
    early = client.submit(replace(endless(), id=client.next_id()))
    early.abort()
    early.abort()
    assert [output.finish_reason async for output in early] == ["abort"]
    async with client.submit(replace(endless(), id=client.next_id())) as stream:
        count = 0
        async for output in stream:
            count += len(output.token_ids)
            if count >= 3:
                break
    many = [client.submit(replace(endless(i), id=client.next_id())) for i in range(30)]
    await anext(many[0])
    await until(lambda: client.stats.running == 8 and client.stats.waiting > 10)
    for stream in many:
        stream.abort()
    await is_idle(client)
    waiting = asyncio.create_task(collect(client.submit(replace(endless(), id=client.next_id()))))
    await asyncio.sleep(0.05)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    for stream in list(client._streams.values()):
        stream.abort()
    await is_idle(client)
    assert not client._streams


async def a_lost_engine_is_replaced(client: EngineClient) -> None:
    """R4: everybody hears of it at once, and soon there is another one."""
    streams = [client.submit(replace(endless(i), id=client.next_id())) for i in range(8)]
    for stream in streams:
        await anext(stream)
    pid = client.pid
    assert pid is not None
    killed_s = time.monotonic()
    os.kill(pid, signal.SIGKILL)
    results = await asyncio.gather(*(collect(stream) for stream in streams), return_exceptions=True)
    assert time.monotonic() - killed_s < 5
    assert {type(result) for result in results} == {UnavailableError}
    assert client.state == "restarting"
    with pytest.raises(UnavailableError):
        client.submit(endless())
    await until(lambda: client.state == "ready", 60)
    assert gone(pid)
    assert client.pid != pid
    tokens, _ = await collect(client.submit(replace(request(random_prompt(1, 9), 5), id=client.next_id())))
    assert len(tokens) == 5


async def test_a_failed_step_and_a_hanging_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R1 over the wire; then the watchdog replaces an engine that no longer answers."""
    monkeypatch.setattr(client_module, "WATCH_INTERVAL_S", 0.05)
    monkeypatch.setattr(client_module, "CPU_SILENCE_S", 1.0)
    monkeypatch.setattr(client_module, "SILENCE_STEPS", 0)
    monkeypatch.setenv(VARIABLE, "step:raise:10,step:sleep:30:60")
    async with running(folder) as client:
        pid = client.pid
        results = await asyncio.gather(*(collect(client.submit(replace(endless(i), id=client.next_id())))
                                         for i in range(8)))
        assert {(last.finish_reason, last.error) for _, last in results} == {("error", STEP_FAILED)}
        tokens, last = await collect(client.submit(replace(request(random_prompt(1, 9), 6), id=client.next_id())))
        assert (len(tokens), last.finish_reason, client.pid) == (6, "length", pid)
        monkeypatch.delenv(VARIABLE)
        with pytest.raises(UnavailableError):
            await collect(client.submit(replace(endless(), id=client.next_id())))
        await until(lambda: client.state == "ready", 60)
        assert client.pid != pid


async def test_three_losses_are_enough(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engine that is lost again and again is not started for ever; the fourth loss is the last."""
    starts: list[float] = []
    start = EngineClient.start

    def counted(self: EngineClient) -> None:
        starts.append(time.monotonic())
        start(self)

    async with running(folder) as client:
        monkeypatch.setattr(EngineClient, "start", counted)
        # The ones that follow find no model: they are lost while they load.
        client.config = replace(client.config, model=str(folder / "nothing"))
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        await until(lambda: client.state == "failed", 60)
        assert len(starts) == client_module.MAX_RESTARTS
        with pytest.raises(UnavailableError):
            client.submit(endless())


@pytest.mark.parametrize(("options", "message"), [
    ({"model": "nowhere"}, "nowhere has no config.json"), ({"kv_cache_memory": 10}, "no memory for a KV cache")])
async def test_what_is_wrong_at_the_start_is_said_in_one_line(
    folder: Path, options: dict[str, Any], message: str
) -> None:
    client = EngineClient(EngineConfig(**{"model": str(folder), **options}))
    client.start()
    with pytest.raises(StartupError, match=message) as caught:
        await client.wait_ready()
    assert "\n" not in caught.value.message
    assert client.state == "failed"
    pid = client.pid
    await client.aclose()
    assert pid is not None
    assert gone(pid)


PARENT = """
import asyncio, sys
from sensorium.config import EngineConfig
from sensorium.engine.client import EngineClient
async def main():
    client = EngineClient(EngineConfig(sys.argv[1], kv_cache_memory=2**22, threads=1))
    client.start()
    print(client.pid, flush=True)
    if sys.argv[2] == "ready":
        await client.wait_ready()
    print("now", flush=True)
    await asyncio.sleep(600)
assert "torch" not in sys.modules
asyncio.run(main())
"""


@pytest.mark.parametrize("when", ["loading", "ready"])
def test_the_engine_dies_with_its_parent(folder: Path, when: str) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT, str(folder), when], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert parent.stdout.readline() == "now\n"
    assert not gone(pid)
    os.kill(pid, signal.SIGINT)  # not its business
    parent.kill()
    parent.wait()
    parent.stdout.close()
    deadline = time.monotonic() + 10
    while not ended(pid) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert ended(pid)
