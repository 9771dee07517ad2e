"""Engines that one process forks: the same answers as of one of its own, and each lives and dies alone."""

from __future__ import annotations

import asyncio
import fcntl
import os
import resource
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from support.engine_harness import bench, random_prompt, request, tokens_of
from support.live import until

from sensorium.config import EngineConfig
from sensorium.ipc.client import EngineClient
from sensorium.ipc.nursery import engine_nursery
from sensorium.models.base import Model
from sensorium.system.nursery import ForkedProcess, Nursery
from sensorium.system.processes import family

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="engines are forked on Linux only")


@pytest.fixture(autouse=True)
def quick_child(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")


@pytest.fixture
def theirs() -> Iterator[socket.socket]:
    """An engine's end of a connection that says nothing; the other end stays open."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield theirs


async def opened(stack: AsyncExitStack, folder: Path, nursery: Nursery) -> EngineClient:
    config = EngineConfig(str(folder), dtype="float32", threads=1, kv_cache_memory=2**22)
    client = EngineClient(config, nursery=nursery)
    stack.push_async_callback(client.aclose)
    client.start()
    await client.wait_ready()
    return client


async def answer(client: EngineClient) -> list[int]:
    async with asyncio.timeout(120):
        return [token async for output in client.submit(request(random_prompt(1, 20), 8)) for token in output.token_ids]


async def lose(client: EngineClient) -> None:
    """Until it has another engine."""
    lost = client.pid
    assert lost is not None
    os.kill(lost, signal.SIGKILL)
    async with asyncio.timeout(120):
        while client.pid == lost or client.state != "ready":
            await asyncio.sleep(0.01)


def parent(pid: int | None) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


async def test_engines_of_one_nursery_answer_alike_and_die_alone(folder: Path, model: Model) -> None:
    expected = tokens_of(bench(model).run(request(random_prompt(1, 20), 8)))[0]
    before = set(family(os.getpid()))
    async with AsyncExitStack() as stack:
        nursery = engine_nursery()
        first, second = [await opened(stack, folder, nursery) for _ in range(2)]
        assert [await answer(first), await answer(second)] == [expected, expected]
        maker, other = parent(first.pid), second.pid
        assert maker == parent(other) != os.getpid()
        assert len(list(Path(f"/proc/{maker}/task").iterdir())) == 1
        await lose(first)
        assert (await answer(first), second.pid, parent(first.pid)) == (expected, other, maker)
        os.kill(maker, signal.SIGKILL)  # the next one has another
        assert await answer(second) == expected
        await lose(first)
        assert [await answer(first), await answer(second)] == [expected, expected]
        assert parent(first.pid) != maker
    await asyncio.to_thread(until, lambda: set(family(os.getpid())) <= before)


def test_how_an_engine_ended_is_known(theirs: socket.socket) -> None:
    nursery = engine_nursery()
    engine = nursery.spawn(theirs)
    maker = engine.pid
    until(lambda: engine.pid != maker)
    assert engine.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        engine.wait(0.01)
    engine.kill()
    assert (engine.wait(120), engine.poll()) == (-signal.SIGKILL, -signal.SIGKILL)
    engine.kill()  # nothing happens to whoever has its number now
    until(lambda: not Path(f"/proc/{maker}").exists())  # it had no other


def test_one_that_is_not_forked_yet_can_be_killed(theirs: socket.socket) -> None:
    """Whoever would fork it is stopped: it goes, and the next engine has another one."""
    nursery = engine_nursery()
    stuck = nursery.spawn(theirs)
    os.kill(stuck.pid, signal.SIGSTOP)
    stuck.kill()
    assert stuck.wait(120) == -signal.SIGKILL
    following: ForkedProcess = nursery.spawn(theirs)
    assert following.pid != stuck.pid
    following.kill()
    following.wait(120)


@pytest.fixture
def many_files() -> Iterator[int]:
    """A number that descriptors may have beyond those that `select` knows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard != resource.RLIM_INFINITY and hard < 2048:
        pytest.skip("this process may not have so many files open")
    resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, 2048), hard))
    yield 1500
    resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))


def test_a_server_with_a_thousand_connections_hears_of_its_engines(theirs: socket.socket, many_files: int) -> None:
    engine = engine_nursery().spawn(theirs)
    with engine._news as low:
        engine._news = socket.socket(fileno=fcntl.fcntl(low, fcntl.F_DUPFD, many_files))
    engine.kill()
    assert engine.wait(120) == -signal.SIGKILL
