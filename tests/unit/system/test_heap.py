"""When memory of large requests goes back to the system."""

import asyncio
from collections.abc import Callable
from types import SimpleNamespace

import pytest

from sensorium.system.heap import HeapTrimmer
from sensorium.units import MiB


class Clock:
    """A loop whose time is set, and whose only timer is the last one that was not cancelled."""

    def __init__(self) -> None:
        self.now, self.due, self.call = 0.0, 0.0, None

    def time(self) -> float:
        return self.now

    def call_at(self, when: float, call: Callable[[], None]) -> SimpleNamespace:
        self.due = when
        return SimpleNamespace(cancel=lambda: None)


def test_a_crowd_that_does_not_end_is_trimmed_too(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock()
    monkeypatch.setattr(asyncio, "get_running_loop", lambda: clock)
    trimmer = HeapTrimmer()
    trimmer.after(10)
    assert clock.due == 0.0  # nothing that is worth it
    for number in range(100):  # ten a second
        clock.now = number / 10
        trimmer.after(MiB)
        if clock.due <= clock.now + 0.1:
            break
    assert 4 < clock.due < 6
