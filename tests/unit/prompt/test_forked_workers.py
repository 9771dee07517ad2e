"""Workers that one process forks: what they import is shared, what they may and how they end is not."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from PIL import Image
from support.live import until
from support.pictures import encoded

from sensorium.config import Limits
from sensorium.media.loader import MediaLoader
from sensorium.media.pool import Bounds, Worker, WorkerPool
from sensorium.media.source import MediaSource
from sensorium.prompt.inspection import TemplateExhausted
from sensorium.prompt.renderer import RenderPool
from sensorium.system.nursery import Nursery
from sensorium.system.processes import family
from sensorium.workers.crew import Size
from sensorium.workers.process import WorkerProcess, worker_nursery

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux only")
SECRET = "SENSORIUM_TEST_SECRET"
ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"


@pytest.fixture
def nursery(monkeypatch: pytest.MonkeyPatch) -> Nursery:
    monkeypatch.setenv(SECRET, "x")
    return worker_nursery()


@pytest.fixture
async def pool(nursery: Nursery) -> AsyncIterator[RenderPool]:
    pool = RenderPool(cpu_s=0.2, own=Size(2, 8, turn_s=90, total_s=90), nursery=nursery)
    before = set(family(os.getpid()))
    yield pool
    await pool.aclose()
    await asyncio.to_thread(until, lambda: set(family(os.getpid())) <= before)  # who forks them is gone, too


def parent(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def open_files(pid: int) -> set[int]:
    return {int(one.name) for one in Path(f"/proc/{pid}/fd").iterdir()}


async def greet(pool: RenderPool, count: int = 4) -> None:
    async with asyncio.timeout(120):
        said = [pool.render("hi {{ a }}", b'{"a": "x"}', b"%d" % number) for number in range(count)]
        assert await asyncio.gather(*said) == ["hi x"] * count


async def test_forked_workers_are_as_others_and_share_their_imports(pool: RenderPool) -> None:
    await greet(pool)
    await asyncio.to_thread(until, lambda: len({parent(pid) for pid in pool.pids}) == 1)  # all are there
    first, maker = pool.pids[0], parent(pool.pids[0])
    assert maker != os.getpid() and len(list(Path(f"/proc/{maker}/task").iterdir())) == 1
    await asyncio.to_thread(until, lambda: open_files(first) == {0, 1, 2})  # it may still be starting
    assert SECRET.encode() not in Path(f"/proc/{first}/environ").read_bytes()
    os.kill(maker, signal.SIGTERM)  # as whoever ends a service sends it to all of its processes
    os.kill(first, signal.SIGKILL)
    await greet(pool)
    with pytest.raises(TemplateExhausted):
        await pool.render(ENDLESS, b"{}", b"t")
    os.kill(maker, signal.SIGKILL)
    await greet(pool)


def test_one_that_is_ended_before_it_was_forked_ends_no_other(nursery: Nursery) -> None:
    nursery.patience_s = 1000.0  # else whoever forks is given up, which a loaded machine may take long to resume
    arguments = ("sensorium.prompt.render_worker", "operators", 1 << 28, 1.0)
    first = WorkerProcess.start(*arguments, nursery=nursery)
    first.wait_ready()
    maker = parent(first.process.pid)
    os.kill(maker, signal.SIGSTOP)
    second = WorkerProcess.start(*arguments, nursery=nursery)
    second.kill()
    os.kill(maker, signal.SIGCONT)
    third = WorkerProcess.start(*arguments, nursery=nursery)
    third.wait_ready()
    until(lambda: set(family(maker)) == {maker, first.process.pid, third.process.pid})
    first.kill()
    third.kill()
    until(lambda: not Path(f"/proc/{maker}").exists())


async def test_media_are_decoded_by_forked_workers(nursery: Nursery) -> None:
    loader = MediaLoader(Limits(), workers=1, nursery=nursery)
    raw = await loader.fetch(MediaSource("image", "", payload=encoded(Image.new("RGB", (40, 30)))))
    assert (await loader.decode(raw)).data.shape == (30, 40, 3)
    assert {parent(pid) for pid in loader._images.pids} != {os.getpid()}
    await loader.aclose()


async def test_workers_without_a_job_end_but_for_one(pool: RenderPool) -> None:
    await greet(pool)
    await asyncio.to_thread(until, lambda: all(one.worker.is_ready for one in pool._own._all))
    assert len(pool.pids) >= 2
    await asyncio.to_thread(until, lambda: len({parent(pid) for pid in pool.pids}) == 1)
    maker = parent(pool.pids[0])
    pool._own.rest()
    await greet(pool)  # those that end are not asked, and others come in their place
    assert len(pool.pids) >= 2
    await asyncio.to_thread(until, lambda: pool._own._rest is not None)
    pool._own.rest()
    while len(pool.pids) > 1:
        await asyncio.sleep(0.01)
    await greet(pool)
    await asyncio.to_thread(until, lambda: {parent(pid) for pid in pool.pids} == {maker})


def test_pools_that_rest_at_once_leave_one(nursery: Nursery) -> None:
    """While one of two workers is being ended, the other is the last."""
    pools = [WorkerPool(role, 1, Bounds(5, 20, 1 << 28, 1 << 20), nursery) for role in ("image", "stream")]
    loop = asyncio.new_event_loop()
    for pool in pools:
        pool._idle.append(Worker.spawn(pool.role, pool.bounds, nursery))
    try:
        for pool in pools:
            pool._idle[0].wait_ready()
        resting = [threading.Thread(target=pool.rest) for pool in pools]
        with nursery.ending:
            for thread in resting:
                thread.start()
        for thread in resting:
            thread.join()
        assert nursery.count == sum(len(pool.pids) for pool in pools) == 1
    finally:
        for pool in pools:
            loop.run_until_complete(pool.aclose())
        loop.close()


async def test_decoders_without_a_job_end_and_come_back(nursery: Nursery, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sensorium.media.pool.REST_S", 0.0)
    loader = MediaLoader(Limits(), workers=1, nursery=nursery)
    raw = await loader.fetch(MediaSource("image", "", payload=encoded(Image.new("RGB", (40, 30)))))
    for _ in range(8):  # some come while another one's worker ends
        assert (await loader.decode(raw)).data.shape == (30, 40, 3)
    await asyncio.to_thread(
        until, lambda: len(loader._images.pids) == nursery.count == 1
    )  # with it ends who forks them
    render = WorkerProcess.start("sensorium.prompt.render_worker", "operators", 1 << 28, 1.0, nursery=nursery)
    for _ in range(4):
        assert (await loader.decode(raw)).data.shape == (30, 40, 3)
    while loader._images.pids:
        await asyncio.sleep(0.01)
    await loader.aclose()
    assert nursery.count == 1
    await asyncio.to_thread(render.kill)
