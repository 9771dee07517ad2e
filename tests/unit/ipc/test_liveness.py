"""When somebody counts as hung: what the watchers count, and how long work may take."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from sensorium.ipc import liveness
from sensorium.ipc.liveness import UNMEASURED_PACE_S, Pulse, StepTimes, WatchedTime
from sensorium.system.processes import activity


def test_time_in_which_the_watcher_was_stopped_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 100.0
    monkeypatch.setattr(liveness, "monotonic", lambda: now)
    watched = WatchedTime(1.0)
    for seconds, expected in ((1.0, 1.0), (1.5, 2.5), (3600.0, 4.5), (1.0, 5.5)):
        now += seconds
        assert watched.look() == pytest.approx(expected)
    watched.reset()
    now += 0.5
    assert watched.look() == pytest.approx(0.5)


def test_work_is_expected_to_take_what_like_work_took() -> None:
    times = StepTimes()
    assert times.expected_s(5e9) == pytest.approx(5e9 * UNMEASURED_PACE_S)
    for seconds in [0.01] * 150 + [0.02] * 3:
        times.add(1 << 30, seconds)
    times.add(1 << 20, 0.001)
    assert times.expected_s(1 << 30) == pytest.approx(0.02)
    assert times.expected_s(1 << 36) == pytest.approx(0.02 * 64)  # never seen: in proportion
    assert times.expected_s(1 << 20) == pytest.approx(0.001)
    assert times.expected_s(1 << 10) == pytest.approx(0.001)  # less than ever seen: no longer than that
    for _ in range(1000):
        times.add(1 << 20, 0.002)
    assert len(times._times[21]) == liveness.KEPT_TIMES


def test_a_step_may_take_ten_seconds_or_twenty_times_what_it_takes() -> None:
    pulse = Pulse(lambda: None, 10.0)
    assert pulse.bound_s(0) == 10
    assert pulse.bound_s(0, slow=True) == 300
    for _ in range(100):
        pulse._times.add(1 << 30, 0.01)
        pulse._times.add(1 << 40, 3.0)
    assert pulse.bound_s(1 << 30) == 10
    assert pulse.bound_s(1 << 40) == pytest.approx(60)
    pulse.begin(1 << 30)
    pulse.end()
    pulse.end()
    assert sum(map(len, pulse._times._times.values())) == 201


def test_a_process_that_computes_shows_it_and_a_stopped_one_does_not() -> None:
    child = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        before = activity(child.pid)
        deadline = time.monotonic() + 120
        while activity(child.pid) <= before + 3:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.kill(child.pid, signal.SIGSTOP)
        time.sleep(0.1)
        before = activity(child.pid)
        time.sleep(0.3)
        assert activity(child.pid) == before > 0
    finally:
        child.kill()
        child.wait()
    assert activity(child.pid) == 0


def test_nobody_watches_a_loop_that_is_through(monkeypatch: pytest.MonkeyPatch) -> None:
    """It ended within a piece of work, and its process goes on to other things."""
    monkeypatch.setattr(liveness, "BEAT_S", 0.01)
    heard = threading.Event()
    pulse = Pulse(heard.set, 100.0)
    before = set(threading.enumerate())
    pulse.start()
    (thread,) = set(threading.enumerate()) - before
    pulse.begin()
    assert heard.wait(120)
    pulse.stop()
    thread.join(120)
    assert not thread.is_alive()
