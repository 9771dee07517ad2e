"""The client and a real engine process: streams, aborts, loss and replacement, and nothing left behind."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Coroutine
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import uvloop
from support.adapters import make_adapter
from support.engine_harness import bench, image_request, random_prompt, request, tokens_of

from sensorium.config import EngineConfig
from sensorium.engine.faults import VARIABLE
from sensorium.engine.loop import NO_ADAPTER, STEP_FAILED
from sensorium.errors import StartupError, UnavailableError
from sensorium.ipc import client as client_module
from sensorium.ipc import messages
from sensorium.ipc.client import EngineClient, OutputStream
from sensorium.ipc.liveness import HUNG
from sensorium.models.base import Model
from sensorium.types import EngineOutput, EngineReady, EngineRequest, Vocabulary


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
    async with asyncio.timeout(200):
        async for output in stream:
            tokens += output.token_ids
            last = output
    assert last is not None
    return tokens, last


async def until(condition: Any, timeout_s: float = 120.0) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it does not happen"
        await asyncio.sleep(0.01)


async def is_idle(client: EngineClient) -> None:
    await until(
        lambda: (
            client.stats.running == client.stats.waiting == 0
            and client.stats.kv_blocks_free == client.stats.kv_blocks > 0
        )
    )


def endless(seed: int = 1) -> EngineRequest:
    return request(random_prompt(seed, 20), 1900)


async def test_life_of_an_engine(folder: Path, model: Model) -> None:
    """Start, serve text and pictures to many at once, abort, be killed, come back, stop."""
    phases: list[tuple[str, float]] = []
    client = EngineClient(
        EngineConfig(str(folder), dtype="float32", threads=1, kv_cache_memory=2**22, max_num_seqs=8),
        on_progress=lambda phase, part: phases.append((phase, part)),
    )
    with pytest.raises(UnavailableError):
        client.submit(endless())
    client.start()
    states = [client.state]
    ready = await client.wait_ready()
    states.append(client.state)
    assert states == ["loading", "ready"]
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
    requests = [
        *(request(random_prompt(i, 10 + 5 * i), 20, logprobs=i % 2 or None) for i in range(12)),
        image_request(1, 20, grid=(60, 60)),  # a frame larger than any buffer on its way
        image_request(2, 20, images=2),
    ]
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
    assert time.monotonic() - killed_s < 60
    assert {type(result) for result in results} == {UnavailableError}
    assert client.state == "restarting"
    with pytest.raises(UnavailableError):
        client.submit(endless())
    await until(lambda: client.state == "ready", 200)
    assert gone(pid)
    assert client.pid != pid
    tokens, _ = await collect(client.submit(replace(request(random_prompt(1, 9), 5), id=client.next_id())))
    assert len(tokens) == 5


async def test_a_failed_step_and_a_hanging_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """R1 over the wire; then a step that never ends, in a process that lives, ends the process."""
    monkeypatch.setenv(VARIABLE, "step:raise:10,step:sleep:30:60")
    async with running(folder, hang_after_s=1.0) as client:
        pid = client.pid
        results = await asyncio.gather(
            *(collect(client.submit(replace(endless(i), id=client.next_id()))) for i in range(8))
        )
        assert {(last.finish_reason, last.error) for _, last in results} == {("error", STEP_FAILED)}
        tokens, last = await collect(client.submit(replace(request(random_prompt(1, 9), 6), id=client.next_id())))
        assert (len(tokens), last.finish_reason, client.pid) == (6, "length", pid)
        monkeypatch.delenv(VARIABLE)
        await is_replaced(client, collect(client.submit(replace(endless(), id=client.next_id()))))


async def is_replaced(client: EngineClient, *waiting: Coroutine[Any, Any, Any]) -> None:
    """Another process answers, what was in flight has failed, and that was one restart."""
    pid, before = client.pid, len(client._restarts)
    for result in await asyncio.gather(*waiting, return_exceptions=True):
        assert isinstance(result, UnavailableError)
    await until(lambda: client.state == "restarting", 120)
    with pytest.raises(UnavailableError):
        client.submit(endless())
    await until(lambda: client.state == "ready", 200)
    assert client.pid != pid
    assert pid is None or gone(pid)
    assert len(client._restarts) == before + 1
    tokens, _ = await collect(client.submit(replace(request(random_prompt(1, 9), 5), id=client.next_id())))
    assert len(tokens) == 5


def stop(client: EngineClient) -> None:
    assert client.pid is not None
    os.kill(client.pid, signal.SIGSTOP)


async def test_a_stopped_engine_is_replaced(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Without requests, with one that comes afterwards, and while it computes: always, once, with a line in the log."""
    async with running(folder, hang_after_s=1.0) as client:
        stop(client)
        await is_replaced(client)
        stop(client)
        await is_replaced(client, collect(client.submit(replace(endless(), id=client.next_id()))))
        stream = client.submit(replace(endless(), id=client.next_id()))
        await anext(stream)
        stop(client)
        await is_replaced(client, collect(stream))
    assert sum("no sign of life" in record.message for record in caplog.records) == 3


async def test_a_short_stop_is_forgiven(folder: Path) -> None:
    async with running(folder, hang_after_s=3.0) as client:
        pid = client.pid
        stream = client.submit(replace(request(random_prompt(1, 9), 300), id=client.next_id()))
        await anext(stream)
        for _ in range(3):  # together longer than it may be silent at a time
            stop(client)
            await asyncio.sleep(1.2)
            assert pid is not None
            os.kill(pid, signal.SIGCONT)
            await asyncio.sleep(0.4)
        _, last = await collect(stream)
        assert (last.finish_reason, client.pid, client.state) == ("length", pid, "ready")


async def test_an_engine_that_is_stopped_while_it_loads_is_replaced(folder: Path) -> None:
    client = EngineClient(EngineConfig(str(folder), threads=1, kv_cache_memory=2**22, hang_after_s=1.0))
    client.start()
    first = client.pid
    stop(client)
    try:
        await client.wait_ready()
        assert client.pid != first
        stop(client)
        await until(lambda: client.state == "restarting", 120)
        await until(lambda: client.pid is not None and client._link is not None)
        stop(client)  # the one that comes instead, while it loads
        await until(lambda: client.state == "ready", 200)
        assert len(client._restarts) == 3
    finally:
        await client.aclose()


async def test_a_start_that_hangs_ends(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process lives and beats, but its main loop does not come back from loading."""
    monkeypatch.setenv(VARIABLE, "load:sleep:1:600")
    client = EngineClient(EngineConfig(str(folder), threads=1, kv_cache_memory=2**22, hang_after_s=0.3))
    client.start()
    try:
        with pytest.raises(StartupError, match=f"exit code {HUNG}"):
            await client.wait_ready()
    finally:
        await client.aclose()


async def test_an_engine_that_says_that_it_is_ready_while_it_is_ended_is_not_started_again(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    async with running(folder) as client:
        ready = client.ready
        assert ready is not None
        closing = asyncio.ensure_future(client.aclose())
        await until(lambda: client.state == "closed")
        client._receive(messages.Kind.READY, memoryview(messages.encode_ready(ready))[5:])
        await closing
        assert (client.state, list(client._restarts), caplog.text) == ("closed", [], "")


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
        await until(lambda: client.state == "failed", 200)
        assert len(starts) == client_module.MAX_RESTARTS
        with pytest.raises(UnavailableError):
            client.submit(endless())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"model": "nowhere"}, "nowhere has no config.json"), ({"kv_cache_memory": 10}, "no memory for a KV cache")],
)
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
from sensorium.ipc.client import EngineClient
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


STREAMING = """
import asyncio, sys, time
sys.path.insert(0, sys.argv[2])
from dataclasses import replace
from sensorium.config import EngineConfig
from sensorium.ipc.client import EngineClient
from support.engine_harness import random_prompt, request
async def main():
    client = EngineClient(EngineConfig(sys.argv[1], kv_cache_memory=2**22, threads=1, hang_after_s=1.0))
    client.start()
    await client.wait_ready()
    pid = client.pid
    for _ in range(2):
        stream = client.submit(replace(request(random_prompt(1, 20), 300), id=client.next_id()))
        await anext(stream)
        print(pid, flush=True)
        async for output in stream:
            last = output
    await asyncio.sleep(1.5)
    print(last.finish_reason, client.pid == pid, client.state, len(client._restarts), flush=True)
    await client.aclose()
asyncio.run(main())
"""


@pytest.mark.parametrize("with_engine", [False, True])
def test_whoever_was_stopped_itself_kills_no_engine(folder: Path, with_engine: bool) -> None:
    """The HTTP process is stopped for longer than an engine may be silent, or the whole machine is."""
    parent = subprocess.Popen(
        [sys.executable, "-c", STREAMING, str(folder), str(Path(__file__).parents[2])],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    stopped = [parent.pid, int(parent.stdout.readline())][: 1 + with_engine]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    time.sleep(3)
    for pid in stopped:
        os.kill(pid, signal.SIGCONT)
    out, _ = parent.communicate(timeout=100)
    assert out.splitlines()[-1] == "length True ready 0"


async def test_adapters_of_an_engine_and_of_the_one_after_it(folder: Path, model: Model, tmp_path: Path) -> None:
    """Loaded while it computes, refused in one line, there again after the engine was lost."""
    one, broken = (make_adapter(tmp_path / name, folder, within="model.layers.") for name in ("one", "broken"))
    (broken / "adapter_config.json").write_text("{}")
    made = bench(model)
    assert made.engine.adapters.load(7, str(one)) == ""
    asked = [replace(request(random_prompt(1, 20), 8), adapter=adapter) for adapter in (7, 0)]
    expected = tokens_of(made.run(*asked))
    assert expected[0] != expected[1]
    async with running(folder) as client:
        busy = client.submit(endless())
        assert await client.load_adapter(7, str(one)) == made.engine.adapters.find(7).nbytes > 0  # type: ignore[union-attr]
        with pytest.raises(StartupError, match="r must be a positive whole number"):
            await client.load_adapter(8, str(broken))
        given_up = asyncio.create_task(client.load_adapter(9, str(one)))
        await asyncio.sleep(0)
        given_up.cancel()
        await asyncio.wait([given_up])
        _, lost = await collect(client.submit(replace(request(random_prompt(1, 20), 8), adapter=9)))
        assert (lost.error, given_up.cancelled()) == (NO_ADAPTER, True)
        assert [(await collect(client.submit(again)))[0] for again in asked] == expected
        assert client.pid is not None
        os.kill(client.pid, signal.SIGKILL)
        with pytest.raises(UnavailableError):
            await collect(busy)
        await until(lambda: client.state == "ready")
        assert [(await collect(client.submit(again)))[0] for again in asked] == expected
        client.unload_adapter(7)
        _, last = await collect(client.submit(asked[0]))
        assert (last.finish_reason, last.error) == ("error", NO_ADAPTER)


def test_an_engine_that_is_ready_before_it_is_heard_gets_the_vocabulary() -> None:
    """In uvloop, where what has been sent already is read before the connection's maker goes on."""
    ours, theirs = socket.socketpair()
    ready = EngineReady(512, 512, 16, 1, 1, 0.1, "cpu", "float32")

    async def attach() -> bytes:
        client = EngineClient(EngineConfig(""))
        client.vocabulary = Vocabulary("tokenizer.json", (), ())
        ours.setblocking(False)
        client._socket = ours
        theirs.sendall(messages.encode_ready(ready))
        await client.wait_ready()
        theirs.settimeout(60)
        sent = await asyncio.to_thread(theirs.recv, 4096)
        await client.aclose()
        return sent

    with theirs, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        assert runner.run(attach()).startswith(messages.encode_vocabulary(Vocabulary("tokenizer.json", (), ())))
