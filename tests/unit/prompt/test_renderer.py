"""Templates in processes of their own: the same text as in this one, bounded in time and memory, alone in failure."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import time
from collections import Counter
from collections.abc import AsyncIterator
from typing import Any

import pytest

from sensorium.errors import OverloadedError, RateLimitError, RequestError, ServerError, UnavailableError
from sensorium.prompt.inspection import TemplateExhausted, TemplateFailed, TemplateInvalid, TemplateRefused
from sensorium.prompt.local import LocalRenderer
from sensorium.prompt.renderer import OWN, RenderPool
from sensorium.units import MiB
from sensorium.workers import crew
from sensorium.workers.connection import Connection, Job
from sensorium.workers.crew import Crew, Size
from sensorium.workers.frames import FrameSocket
from sensorium.workers.process import WorkerProcess

GREETING = (
    "{{ messages[0].content }}, {{ name | default('you') | tojson }}{% if boom %}{{ raise_exception('no') }}{% endif %}"
)
LOOPS = (
    "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}{% endfor %}{% endfor %}"
    "{% endfor %}"
)
DOUBLED = (
    "{% set t = namespace(x='aaaaaaaa') %}{% for i in range(99) %}{% set t.x = t.x ~ t.x %}{% endfor %}"
    "{{ t.x | length }}"
)
HOSTILE = {
    "loops": LOOPS,
    "loop that calls": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "width": "{{ '%9999999999d'|format(1) }}",
    "doubled": DOUBLED,
    "doubled list": "{% set t = namespace(x=[1]) %}{% for i in range(99) %}{% set t.x = t.x + t.x %}{% endfor %}",
    "batch": "{{ range(9) | batch(9999999999, 0) | list }}",
    "indent": "{{ 'a\nb' | indent(9999999999) }}",
    "center": "{{ 'a' | center(9999999999) }}",
    "joined": "{{ range(99999)|join(range(99999)|join) }}",
    "replaced": "{{ ('a' * 99999) | replace('a', 'b' * 99999) }}",
    "slices": "{{ range(9) | slice(9999999999) | list }}",
    "wordwrap": "{{ ('a' * 99999) | wordwrap(1, wrapstring='b' * 99999) }}",
    "power": "{% set t = namespace(x=9) %}{% for i in range(99) %}{% set t.x = t.x * t.x %}{% endfor %}{{ t.x }}",
    "json": "{{ range(9) | list | tojson(indent=999999999) }}",
    "writes": "{% for a in range(99999) %}{% for b in range(99999) %}aaaaaaaaaaaaaaaa{% endfor %}{% endfor %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "sorted": "{% for i in range(99999) %}{% set t = range(99999) | sort | sum %}{% endfor %}",
}
BOMBS = {
    "brackets": "{{ " + "(" * 30_000 + "1" + ")" * 30_000 + " }}",
    "loops in loops": "{% for a in x %}" * 60 + "{% endfor %}" * 60,
    "ifs": "{% if a %}" * 20_000 + "{% endif %}" * 20_000,
    "minus": "{{ " + "-" * 50_000 + "1 }}",
    "not a template": "{% for %}",
    "unknown filter": "{{ 1 | nonsense }}",
    "folded": "{{ '%9999999999d'|format(1) }}",
}


@pytest.fixture
async def pool() -> AsyncIterator[RenderPool]:
    """With time enough for a loaded machine: loops end by their processor time."""
    pool = RenderPool(cpu_s=0.4, own=Size(2, 8, turn_s=90, total_s=90), foreign=Size(2, 4, turn_s=90, total_s=90))
    yield pool
    await pool.aclose()


def variables(**more: Any) -> bytes:
    return json.dumps({"messages": [{"role": "user", "content": "Grüße 🙂"}], **more}).encode()


def no_process(*_: Any, **__: Any) -> Any:
    raise OSError("no processes left")


async def hello(pool: RenderPool, tenant: bytes = b"") -> str:
    return await pool.render(GREETING, variables(), tenant)


async def test_the_same_text_as_in_this_process(pool: RenderPool) -> None:
    for more in ({}, {"name": "Ann"}, {"name": [1, 2.5, None, True, {"ä": "\u2028"}]}):
        ours = await LocalRenderer().render(GREETING, variables(**more), b"")
        assert await pool.render(GREETING, variables(**more), b"") == ours
    long = variables(name="é" * 3_000_000)
    assert len(await pool.render(GREETING, long, b"")) > 3_000_000
    with pytest.raises(TemplateRefused, match=r"^no$"):
        await pool.render(GREETING, variables(boom=1), b"")
    with pytest.raises(TemplateFailed):
        await pool.render("{{ 1 + 'a' }}", variables(), b"")
    with pytest.raises(TemplateFailed):
        await pool.render("{{ '\\ud800' }}", variables(), b"")
    probes = [json.loads(variables()), {"messages": [{"content": 1}]}, {}]
    assert await pool.inspect(GREETING, probes, b"") == LocalRenderer().inspect_now(GREETING, probes)


@pytest.mark.parametrize("name", HOSTILE)
async def test_hostile_templates_end_while_others_are_served(pool: RenderPool, name: str) -> None:
    await hello(pool)
    begin = time.monotonic()
    bad = asyncio.ensure_future(pool.render(HOSTILE[name], variables(), b""))
    await asyncio.sleep(0)
    assert await hello(pool) == 'Grüße 🙂, "you"'
    with pytest.raises(TemplateFailed):
        await bad
    assert time.monotonic() - begin < 120  # not by the clock
    assert await hello(pool) == 'Grüße 🙂, "you"'


@pytest.mark.parametrize("name", BOMBS)
async def test_sources_that_are_no_templates_or_too_deep(name: str) -> None:
    """Before serving and in a request, and the next one is none the worse."""
    pool = RenderPool(cpu_s=1.0)
    begin = time.monotonic()
    try:
        try:
            pool.inspect_now(BOMBS[name], [])
        except (TemplateInvalid, TemplateExhausted) as refused:
            with pytest.raises(type(refused)):
                await pool.inspect(BOMBS[name], [], b"")
        assert pool.inspect_now("{{ a }}", [{"a": 1}]).outputs == ("1",)
    finally:
        await pool.aclose()
    assert time.monotonic() - begin < 120


async def test_loops_that_fill_every_worker_do_not_stop_the_next_request() -> None:
    """More workers come when those that run are stuck. The loops run longer than a machine keeps this process waiting:
    one did so until loops of 100 s of processor time were over before the request came."""
    hour_s = 3600.0
    pool = RenderPool(cpu_s=hour_s, own=Size(2, 8, hour_s, hour_s), foreign=Size(2, 4, hour_s, hour_s))
    await hello(pool)
    bad = [asyncio.ensure_future(pool.render(LOOPS, variables(), b"")) for _ in range(4)]
    await asyncio.sleep(0.01)
    await hello(pool)
    early = [one.exception() for one in bad if one.done()]
    await pool.aclose()
    ends = await asyncio.gather(*bad, return_exceptions=True)
    # It waited for the end of none; a machine that is short of memory kills such workers first.
    assert all(isinstance(end, UnavailableError) for end in early) and len(early) < len(bad), early
    assert all(isinstance(end, ServerError | RequestError) for end in ends), ends


async def test_one_tenant_cannot_hold_all(pool: RenderPool) -> None:
    await hello(pool)
    bad = [asyncio.ensure_future(pool.render(LOOPS, variables(), b"greedy")) for _ in range(30)]
    await asyncio.sleep(0.01)
    await hello(pool, b"modest")
    assert sum(one.done() for one in bad) < 8  # it waited for none of the queue
    await pool.aclose()
    for one in bad:
        with pytest.raises((TemplateExhausted, ServerError)):
            await one


@pytest.mark.parametrize(
    ("memory", "fewest", "most", "each"),
    [(0, 1, 2, 24), (48, 1, 2, 24), (240, 2, 8, 30), (120, 2, 5, 24), (1 << 20, 2, 8, 256)],
)
def test_workers_follow_memory(memory: int, fewest: int, most: int, each: int) -> None:
    size, worker_bytes = OWN.within(memory * MiB, 256 * MiB, 24 * MiB)
    assert (size.fewest, size.most, worker_bytes) == (fewest, most, each * MiB)


async def test_requests_templates_have_processes_of_their_own(pool: RenderPool) -> None:
    await hello(pool)
    own = set(pool.pids)
    bad = [asyncio.ensure_future(pool.inspect(LOOPS, [json.loads(variables())], b"")) for _ in range(8)]
    await asyncio.sleep(0.1)
    assert await hello(pool)
    assert own <= set(pool.pids)
    assert await asyncio.gather(*bad, return_exceptions=True)
    for one in bad:
        assert isinstance(one.exception(), TemplateExhausted)


async def test_every_job_ends_in_its_turn_and_its_end_tells_whose_fault_it_is() -> None:
    """What ran and used its time is at fault, and what came beside too many of the same key. Nobody waits for those who
    wait: one key has three of four workers, and when they are free again everybody's turn is over."""
    pool = RenderPool(cpu_s=1.0, foreign=Size(2, 4, turn_s=0.5, total_s=60))
    bad = [pool.inspect(LOOPS, [json.loads(variables())], b"") for _ in range(60)]
    found = Counter(map(type, await asyncio.gather(*bad, return_exceptions=True)))
    assert set(found) == {TemplateExhausted, RateLimitError}
    assert found[TemplateExhausted] <= 3
    await pool.aclose()


async def test_a_job_that_computes_when_its_time_is_over_is_at_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(crew, "COMPUTING_S", 0.01)  # a loaded machine may give it no more
    pool = RenderPool(cpu_s=60, foreign=Size(2, 4, turn_s=2, total_s=3))
    with pytest.raises(TemplateExhausted):
        await pool.inspect(LOOPS, [json.loads(variables())], b"")
    await pool.aclose()


def never_ready() -> WorkerProcess:
    """One that hangs before its first frame, whatever the machine's load (a worker that is stopped may be ready)."""
    ours, theirs = socket.socketpair()
    with theirs:
        return WorkerProcess(subprocess.Popen(["sleep", "600"], stdin=theirs.fileno()), FrameSocket(ours))


async def test_workers_that_hang_while_they_start_are_not_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """One more is started beside them; with none to be had a job ends as our fault, not as its key's."""
    monkeypatch.setattr(crew, "SLOW_START_S", 0.2)
    start = WorkerProcess.start
    started: list[Any] = []

    def hang(*arguments: Any, **more: Any) -> WorkerProcess:
        started.append(never_ready() if len(started) < hanging else start(*arguments, **more))
        return started[-1]

    monkeypatch.setattr(WorkerProcess, "start", hang)
    monkeypatch.setattr(crew, "START_TIMEOUT_S", 300)  # more than any start takes on a loaded machine
    hanging, pool = 2, RenderPool(own=Size(2, 4, turn_s=300, total_s=300))
    assert await hello(pool) == 'Grüße 🙂, "you"'
    assert all(one.process.poll() is None for one in started[:2])  # it did not wait until they were given up
    await pool.aclose()
    monkeypatch.setattr(crew, "START_TIMEOUT_S", 0.5)
    started.clear()
    hanging, pool = 100, RenderPool(own=Size(2, 4, turn_s=0.1, total_s=0.2))
    found = await asyncio.gather(*(hello(pool) for _ in range(3)), return_exceptions=True)
    assert {type(one) for one in found} == {UnavailableError}
    await pool.aclose()


async def test_who_asks_once_is_not_told_to_ask_less(monkeypatch: pytest.MonkeyPatch) -> None:
    pool = RenderPool(cpu_s=60, own=Size(1, 3, turn_s=0.5, total_s=30))
    await hello(pool)
    monkeypatch.setattr(subprocess, "Popen", no_process)  # the one worker is all there is
    running, *waiting = [asyncio.ensure_future(pool.render(LOOPS, variables(), b"greedy")) for _ in range(3)]
    await asyncio.sleep(0)
    with pytest.raises(OverloadedError):
        await hello(pool, b"modest")
    found = await asyncio.gather(*waiting, return_exceptions=True)
    assert [type(one) for one in found] == [RateLimitError, RateLimitError]
    await pool.aclose()
    with pytest.raises(ServerError):
        await running


async def test_a_worker_that_is_killed_from_outside_costs_nobody_a_request(pool: RenderPool) -> None:
    await hello(pool)
    for _ in range(3):
        for pid in pool.pids:
            os.kill(pid, signal.SIGKILL)
        assert await hello(pool) == 'Grüße 🙂, "you"'


async def test_a_job_is_not_tried_again_with_a_worker_that_was_killed_too(
    pool: RenderPool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that was killed takes a moment to end, and may get a job meanwhile: here all of them do."""
    await hello(pool)
    while len(pool._own._free) < len(pool.pids):
        await asyncio.sleep(0.01)
    killed, send = set(pool.pids), Connection.send

    def send_late(one: Connection, job: Job) -> None:
        if one.worker.process.pid in killed:
            one.worker.process.kill()
        send(one, job)

    monkeypatch.setattr(Connection, "send", send_late)
    assert await hello(pool) == 'Grüße 🙂, "you"'


async def test_stopped_workers_are_replaced_before_a_jobs_time_is_over(pool: RenderPool) -> None:
    """All of them: the job's own, and those that would get it next. This pool gives a job 90 seconds."""
    await hello(pool)
    for _ in range(2):
        stopped = pool.pids
        for pid in stopped:
            os.kill(pid, signal.SIGSTOP)
        async with asyncio.timeout(80):
            assert await hello(pool) == 'Grüße 🙂, "you"'
        assert not set(stopped) & set(pool.pids)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSTOP])
async def test_a_template_is_looked_at_whatever_happens_to_the_first_worker(number: signal.Signals) -> None:
    pool = RenderPool()
    pool.start_early()
    (first,) = pool.pids
    os.kill(first, number)
    assert pool.inspect_now("{{ a }}", [{"a": 1}]).outputs == ("1",)
    assert first not in pool.pids
    await pool.aclose()


async def test_a_request_that_is_given_up_leaves_its_worker_in_step(pool: RenderPool) -> None:
    await hello(pool)
    before = set(pool.pids)
    for _ in range(20):
        gone = asyncio.ensure_future(pool.render(GREETING, variables(name="x" * 100_000), b""))
        await asyncio.sleep(0)
        gone.cancel()
    assert await hello(pool) == 'Grüße 🙂, "you"'
    assert before <= set(pool.pids)


async def test_workers_that_cannot_start_are_our_fault() -> None:
    none = Crew(no_process, Size(1, 2, turn_s=1, total_s=1), max_reply_bytes=100)
    for _ in range(3):
        with pytest.raises(ServerError):
            await none.ask(b"", b"")
    await none.aclose()


async def test_closing_ends_what_runs() -> None:
    pool = RenderPool(cpu_s=60, own=Size(2, 8, turn_s=60, total_s=60))
    await hello(pool)
    bad = asyncio.ensure_future(pool.render(LOOPS, variables(), b""))
    await asyncio.sleep(0.1)
    pids = pool.pids
    begin = time.monotonic()
    await pool.aclose()
    assert time.monotonic() - begin < 120
    with pytest.raises(ServerError):
        await bad
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)


def test_filters_that_import_late_work(capfd: pytest.CaptureFixture[str]) -> None:
    pool = RenderPool()
    for source in (
        "{{ 'a b' | wordwrap(1) }}",
        "{{ [1] | pprint }}",
        "{{ '<b>&amp;</b>' | striptags }}",
        "{{ strftime_now('%Y %B %Z') }}",
        "{{ [3, 1] | sort | join('-') | title }}",
    ):
        assert pool.inspect_now(source, [{}]) == LocalRenderer().inspect_now(source, [{}])
    asyncio.run(pool.aclose())


def test_nothing_reaches_out(capfd: pytest.CaptureFixture[str]) -> None:
    pool = RenderPool(cpu_s=0.4)
    for source in ("{{ cycler.__init__.__globals__.os }}", "{{ strftime_now.__globals__ }}"):
        found = pool.inspect_now(source, [json.loads(variables())])
        assert found.outputs == ("",)
    asyncio.run(pool.aclose())
    assert capfd.readouterr().err == ""
