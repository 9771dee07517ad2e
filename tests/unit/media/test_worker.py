"""Decode workers: what they cannot do, and what happens when a file kills, stalls or fills one."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.media_support import PARAM, load
from support.pictures import data_url, encoded, exif, photo

from sensorium.errors import MediaError, ServerError, UnavailableError
from sensorium.media import pool
from sensorium.media.decoders import decoders_for
from sensorium.media.loader import MediaLoader
from sensorium.media.pool import Bounds, WorkerPool
from sensorium.media.source import RawMedia, Refusal

BOUNDS = Bounds(cpu_s=5.0, deadline_s=30.0, memory_bytes=256 << 20, result_bytes=1 << 20, max_jobs=3)
PICTURE = encoded(photo(16, 16), "JPEG")
IMAGE_JOB = {"op": "image", "max_pixels": 10_000}

# A worker with decoders that misbehave; its payload is the name of what to do.
ROGUE = """
import os, socket, sys, time
import numpy as np
from sensorium.media import worker
from sensorium.media.source import Refusal
from sensorium.media.decoders import Decoded

def rogue(payload, job):
    deed = payload.decode()
    if deed == "crash":
        os.abort()
    if deed == "raise":
        raise RuntimeError("not foreseen")
    if deed == "hang":
        time.sleep(600)
    if deed == "spin":
        while True: pass
    if deed == "fill":
        data = [bytearray(1 << 24) for _ in range(1000)]
    if deed == "liar":
        return Decoded(shape=(1 << 30,))
    if deed == "shape":
        return Decoded(record={"shape": ["x"], "dtype": "object"})
    if deed == "short":
        return Decoded(shape=(10,), pieces=(np.zeros(11, np.uint8),))
    if deed == "words":
        raise Refusal("nonsense", "x")
    if deed == "late refusal":
        def pieces():
            yield np.zeros(5, np.uint8)
            raise Refusal("long", "too long")
        return Decoded(shape=(10,), pieces=pieces())
    done = []
    for attempt in (lambda: open("/etc/passwd"), lambda: socket.create_connection(("127.0.0.1", int(deed))),
                    lambda: socket.socketpair(), lambda: os.pipe(), lambda: os.open("/dev/null", os.O_RDONLY)):
        try:
            attempt()
        except OSError:
            done.append(1)
    return Decoded(record={"refused": len(done)})

worker.decoders_for = lambda role: {"rogue": rogue}
worker.main(sys.argv[1:])
"""


@pytest.fixture
async def rogue(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> AsyncIterator[WorkerPool]:
    script = tmp_path / "rogue.py"
    script.write_text(ROGUE)
    real = subprocess.Popen

    def popen(command: list[str], **options: object) -> subprocess.Popen[bytes]:
        at = command.index("-m")
        return real([*command[:at], str(script), *command[at + 2 :]], stderr=subprocess.DEVNULL, **options)  # type: ignore[call-overload]

    monkeypatch.setattr("sensorium.workers.process.subprocess.Popen", popen)
    rogue = WorkerPool("rogue", 1, Bounds(cpu_s=1.0, deadline_s=40.0, memory_bytes=64 << 20, result_bytes=1 << 20))
    yield rogue
    await rogue.aclose()


async def do(pool: WorkerPool, deed: str) -> pool.Result:
    return await pool.run({"op": "rogue"}, deed.encode())


@pytest.mark.parametrize("deed", ["crash", "spin", "liar", "shape", "short", "words"])
async def test_a_bad_job_costs_itself_and_its_worker(deed: str, rogue: WorkerPool) -> None:
    await rogue.warm()
    (pid,) = rogue.pids
    with pytest.raises(Refusal) as caught:
        await do(rogue, deed)
    assert caught.value.problem == "parse"
    assert pid not in rogue.pids
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)
    with pytest.raises(Refusal) as caught:
        await do(rogue, "late refusal")
    assert caught.value.problem == "long"


@pytest.mark.parametrize("deed", ["late refusal", "raise", "fill"])
async def test_a_refusal_keeps_the_worker(deed: str, rogue: WorkerPool) -> None:
    """So does whatever a library raises, want of memory included."""
    await rogue.warm()
    (pid,) = rogue.pids
    with pytest.raises(Refusal) as caught:
        await do(rogue, deed)
    assert caught.value.problem == ("long" if deed == "late refusal" else "parse")
    assert pid in rogue.pids


async def test_a_worker_that_only_waits_is_ended_and_not_the_files_fault(rogue: WorkerPool) -> None:
    rogue.bounds = replace(rogue.bounds, deadline_s=1.0)
    await rogue.warm()
    with pytest.raises(UnavailableError):
        await do(rogue, "hang")
    rogue.bounds = replace(rogue.bounds, deadline_s=30.0)
    with pytest.raises(Refusal):
        await do(rogue, "late refusal")


async def busy_pid(workers: WorkerPool, job: asyncio.Future[Any]) -> int | None:
    """The first worker that has a job, once the job has begun; None if it was over before anybody looked."""
    while not job.done():
        worker = next(iter(workers._busy), None)
        if worker is not None and worker.jobs:
            return worker.process.pid
        await asyncio.sleep(0.001)
    return None


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP, signal.SIGSEGV, signal.SIGHUP])
@pytest.mark.parametrize("when", ["idle", "busy", "starting"])
async def test_a_worker_ended_from_outside_is_not_the_files_fault(when: str, number: int) -> None:
    """The job is done by another one."""
    workers = WorkerPool("image", 1, replace(BOUNDS, cpu_s=20.0, deadline_s=60.0, result_bytes=1 << 26))
    large = encoded(photo(4000, 3000), "PNG", compress_level=1)
    if when != "starting":
        await workers.warm()
    if when == "idle":
        os.kill(workers.pids[0], number)
        await asyncio.sleep(0.05)
    job = asyncio.ensure_future(workers.run({"op": "image", "max_pixels": 1 << 24}, large))
    if when == "busy":
        while (pid := await busy_pid(workers, job)) is None:  # on a loaded machine it may end unseen
            job = asyncio.ensure_future(workers.run({"op": "image", "max_pixels": 1 << 24}, large))
        os.kill(pid, number)
    elif when == "starting":
        while not workers._busy and not job.done():
            await asyncio.sleep(0.001)
        os.kill(next(iter(workers._busy)).process.pid, number)
    result = await asyncio.wait_for(job, 200)
    assert result.data is not None and result.data.shape == (3000, 4000, 3)
    await workers.aclose()


async def test_a_second_end_from_outside_is_unavailable(rogue: WorkerPool) -> None:
    job = asyncio.ensure_future(do(rogue, "spin"))
    first = await busy_pid(rogue, job)
    assert first is not None
    os.kill(first, signal.SIGKILL)
    while (second := await busy_pid(rogue, job)) == first:
        await asyncio.sleep(0.001)
    assert second is not None
    os.kill(second, signal.SIGKILL)
    with pytest.raises(UnavailableError):
        await asyncio.wait_for(job, 200)


async def test_no_file_and_no_connection(rogue: WorkerPool, canary: object) -> None:
    """S12's second half: whatever a codec tries, it gets no descriptor."""
    result = await do(rogue, str(canary.port))  # type: ignore[attr-defined]
    assert result.record["refused"] == 5
    assert canary.connections == 0  # type: ignore[attr-defined]


async def test_inherits_nothing() -> None:
    """A listening socket of ours is not open in the worker, nor a secret in its environment."""
    os.environ["SENSORIUM_API_KEY"] = "secret"
    server = await asyncio.start_server(lambda r, w: None, "127.0.0.1", 0)
    workers = WorkerPool("image", 1, BOUNDS)
    await workers.warm()
    (pid,) = workers.pids
    assert sorted(link.name for link in Path(f"/proc/{pid}/fd").iterdir()) == ["0", "1", "2"]
    assert b"secret" not in Path(f"/proc/{pid}/environ").read_bytes()
    limits = Path(f"/proc/{pid}/limits").read_text()
    assert any(line.split()[3:5] == ["3", "3"] for line in limits.splitlines() if line.startswith("Max open files"))
    del os.environ["SENSORIUM_API_KEY"]
    server.close()
    await workers.aclose()
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


async def test_workers_are_started_when_needed_and_used_up() -> None:
    workers = WorkerPool("image", 2, BOUNDS)
    assert workers.pids == []
    seen = set()
    for _ in range(4):
        await workers.run(IMAGE_JOB, PICTURE)
        seen.add(workers.pids[0])
    assert len(seen) == 2  # three jobs each
    assert len(workers.pids) == 1
    await asyncio.gather(*(workers.run(IMAGE_JOB, PICTURE) for _ in range(8)))
    assert len(workers.pids) == 3  # one tenant's two, and one for others
    await workers.aclose()
    with pytest.raises(ServerError):
        await workers.run(IMAGE_JOB, PICTURE)


async def test_closing_does_not_wait_for_a_stuck_job(rogue: WorkerPool) -> None:
    await rogue.warm()
    job = asyncio.ensure_future(do(rogue, "hang"))
    await asyncio.sleep(0.1)
    start = time.monotonic()
    await rogue.aclose()
    assert time.monotonic() - start < 120
    with pytest.raises(UnavailableError):
        await job


async def test_a_worker_that_cannot_start_is_our_fault() -> None:
    workers = WorkerPool("no such role", 1, BOUNDS)
    with pytest.raises(ServerError):
        await workers.run(IMAGE_JOB, PICTURE)
    await workers.aclose()


async def test_a_killed_idle_worker_is_replaced(loader: MediaLoader) -> None:
    await loader.warm()
    for pid in loader._images.pids:
        os.kill(pid, signal.SIGKILL)
    assert (await load(loader, data_url(PICTURE))).data.shape == (16, 16, 3)


async def test_signals_to_the_whole_group_leave_workers_alone(loader: MediaLoader) -> None:
    """While the server drains, pictures are still decoded."""
    await load(loader, data_url(PICTURE))  # from here on there is one in reserve, too
    before = set(loader._images.pids)
    for pid in before:
        os.kill(pid, signal.SIGTERM)
        os.kill(pid, signal.SIGINT)
    assert (await load(loader, data_url(PICTURE))).data.shape == (16, 16, 3)
    assert set(loader._images.pids) == before


async def test_a_wrong_size_from_a_worker_is_not_believed(loader: MediaLoader, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run(job: object, payload: bytes) -> pool.Result:
        return pool.Result({}, np.zeros((8, 8, 3), np.uint8))

    monkeypatch.setattr(WorkerPool, "run", lambda self, job, payload, tenant: run(job, payload))
    with pytest.raises(MediaError):
        await loader.decode(RawMedia("image", PARAM, PICTURE))


async def test_latency(loader: MediaLoader) -> None:
    """The way through a process is no reason to avoid it: a 448x448 JPEG takes a few milliseconds at best."""
    payload = encoded(photo(448, 448), "JPEG")
    times = []
    for _ in range(10):
        start = time.monotonic()
        await loader.decode(RawMedia("image", PARAM, payload))
        times.append(time.monotonic() - start)
    assert min(times) < 1


def test_nothing_is_imported_after_the_door_is_closed(tmp_path: Path) -> None:
    """Pillow likes to import late, which would fail in a locked worker: every kind of picture, in one fresh process."""
    pictures = [encoded(photo(16, 16), format) for format in ("JPEG", "PNG", "WEBP", "GIF", "BMP")]
    pictures += [encoded(photo(16, 16).convert(mode)) for mode in ("1", "L", "LA", "P", "RGBA", "I;16")]
    pictures += [encoded(photo(16, 16).convert("CMYK"), "JPEG")]
    pictures += [encoded(photo(16, 16), "JPEG", exif=b"Exif\0\0" + exif(6))]
    pictures += [encoded(photo(16, 16).convert("P"), format, transparency=3) for format in ("PNG", "GIF")]
    pictures += [encoded(photo(16, 16), "JPEG", dpi=(72, 72), icc_profile=bytes(200), comment=b"x", progressive=True)]
    pictures += [encoded(photo(16, 16), dpi=(72, 72), icc_profile=bytes(200), interlace=1), PICTURE[:400]]
    for number, picture in enumerate(pictures):
        (tmp_path / str(number)).write_bytes(picture)
    script = (
        "import sys\nfrom pathlib import Path\nfrom sensorium.media.worker import decoders_for\n"
        "from sensorium.media.source import Refusal\n"
        "decode, files = decoders_for('image')['image'], [p.read_bytes() for p in Path(sys.argv[1]).iterdir()]\n"
        "before = set(sys.modules)\n"
        "for file in files:\n"
        "    try: decode(file, {'max_pixels': 10**6})\n"
        "    except Refusal: pass\n"
        "print(len(files), set(sys.modules) - before)"
    )
    done = subprocess.run([sys.executable, "-c", script, str(tmp_path)], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"{len(pictures)} set()"


def test_worker_imports_only_what_it_needs() -> None:
    script = (
        "import sys\nimport sensorium.media.worker as w\nw.decoders_for('image')\n"
        "print([m for m in ('httpx', 'ssl', 'asyncio', 'torch', 'av', 'pydantic') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_unknown_role() -> None:
    with pytest.raises(ValueError):
        decoders_for("nonsense")


@pytest.mark.skipif(sys.platform != "linux", reason="prctl")
async def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    """However it ends, and whatever they are doing."""
    script = (
        "import asyncio, sys, time\nfrom pathlib import Path\n"
        "from sensorium.media.pool import Bounds, WorkerPool\n"
        "async def main():\n"
        "    workers = WorkerPool('image', 1, Bounds(100.0, 100.0, 1 << 30, 1 << 28))\n"
        "    job = asyncio.ensure_future(workers.run({'op': 'image', 'max_pixels': 1 << 26},"
        " Path(sys.argv[1]).read_bytes()))\n"
        "    while not any(worker.jobs for worker in workers._busy): await asyncio.sleep(0.01)\n"
        "    print(*workers.pids, flush=True)\n"
        "    await asyncio.sleep(100)\n"
        "asyncio.run(main())\n"
    )
    (tmp_path / "large.png").write_bytes(encoded(photo(6000, 6000), "PNG", compress_level=1))
    parent = subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "large.png")], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    pids = [int(pid) for pid in parent.stdout.readline().split()]
    assert len(pids) == 2
    os.kill(pids[0], signal.SIGSTOP)  # busy for ever: it can look at nothing
    parent.kill()
    parent.wait()
    end = time.monotonic() + 30
    while any(Path(f"/proc/{pid}").exists() and " Z " not in Path(f"/proc/{pid}/stat").read_text() for pid in pids):
        assert time.monotonic() < end
        await asyncio.sleep(0.05)


async def test_a_heavy_tenant_leaves_a_worker_to_others(rogue: WorkerPool) -> None:
    """And takes turns with itself only."""
    heavy = [asyncio.ensure_future(rogue.run({"op": "rogue"}, b"spin", b"heavy")) for _ in range(4)]
    assert await busy_pid(rogue, heavy[0]) is not None
    with pytest.raises(Refusal) as caught:
        await rogue.run({"op": "rogue"}, b"late refusal", b"other")
    assert caught.value.problem == "long"
    assert not any(job.done() for job in heavy[1:])
    for job in heavy:
        job.cancel()
    await asyncio.gather(*heavy, return_exceptions=True)
