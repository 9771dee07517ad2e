"""The towers' queue: tenants share its time, and nothing stays behind."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from sensorium.engine import encoding
from sensorium.engine.encoder_cache import EncoderCache
from sensorium.engine.encoding import Encodings
from sensorium.engine.faults import Faults
from sensorium.engine.sequence import Wanted
from sensorium.types import MediaFeatures


class Tower:
    """Every item is as many pieces of one second as its name says."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        self.done: list[str] = []
        monkeypatch.setattr(encoding, "monotonic", lambda: self.now)

    def encoding(self, kind: str, items: Sequence[MediaFeatures]) -> Any:
        for item in items:
            name = item.key.decode()
            pieces = int(name.split("-")[1])
            for _ in range(pieces):
                yield 1
                self.now += 1.0
                self.done.append(name)
        return [[0] for _ in items]


def test_a_small_item_does_not_wait_for_another_tenants_large_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    tower = Tower(monkeypatch)
    cache: EncoderCache[Any] = EncoderCache(100, 1)
    queue = Encodings(tower.encoding, cache, lambda error: False, Faults())

    def add(tenant: bytes, name: str) -> None:
        item = MediaFeatures("image", name.encode(), 1)
        cache.reserve((tenant, item.key), 1, tenant)
        queue.add({(tenant, item.key): Wanted(tenant, item)})

    for index in range(6):
        add(b"a", f"{index}-20")
    begun: list[float] = []
    for _ in range(10):
        queue.run(begun.append)
    add(b"b", "b-3")
    for _ in range(7):
        queue.run(begun.append)
    assert tower.done.count("b-3") == 3
    assert not cache.is_awaited((b"b", b"b-3"))
    for index in range(6):
        cache.unpin((b"a", f"{index}-20".encode()))
    before = len(tower.done)
    queue.run(begun.append)
    assert not queue
    assert len(tower.done) == before  # whoever wanted them has left
    assert set(begun) == {1}


def test_towers_take_no_more_time_than_steps_of_who_has_no_media(monkeypatch: pytest.MonkeyPatch) -> None:
    tower = Tower(monkeypatch)
    cache: EncoderCache[Any] = EncoderCache(100, 1)
    queue = Encodings(tower.encoding, cache, lambda error: False, Faults())
    item = MediaFeatures("image", b"a-90", 1)
    cache.reserve((b"", item.key), 1, b"a")
    queue.add({(b"", item.key): Wanted(b"a", item)})

    def pieces(turns: set[bytes], seconds: float, steps: int) -> int:
        before = len(tower.done)
        for _ in range(steps):
            queue.run(lambda macs: None)
            queue.step_took(turns, seconds)
        return len(tower.done) - before

    pieces(set(), 0.0, 1)  # the first one begins the tower
    assert pieces({b"a"}, 0.1, 10) == 10
    assert pieces(set(), 0.0, 10) == 10
    assert pieces({b"a", b"b"}, 0.1, 33) in (3, 4)
    assert pieces({b"b"}, 2.0, 10) == 10


def test_what_sequences_attend_to_is_gathered_unless_others_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    tower = Tower(monkeypatch)
    monkeypatch.setattr(encoding, "GATHERING_S", 5.0)
    cache: EncoderCache[Any] = EncoderCache(100, 1)
    queue = Encodings(tower.encoding, cache, lambda error: False, Faults(), gathers=True)
    item = MediaFeatures("audio", b"a-30", 1)
    cache.reserve((b"", item.key), 1, b"a")
    queue.add({(b"", item.key): Wanted(b"a", item)})

    def run(turns: set[bytes]) -> int:
        before = len(tower.done)
        queue.run(lambda macs: None)
        queue.step_took(turns, 100.0)
        return len(tower.done) - before

    assert run({b"b"}) <= 1  # nobody knows yet who is there
    assert [run({b"b"}), run(set()), run({b"a"}), run({b"a", b"b"}), run(set())] == [1, 1, 5, 5, 1]
