"""Sockets between ranks: who sends what, messages as large as they get, and a rank that is gone."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from sensorium.parallel.lines import MOST_BYTES, PATH_BYTES, Lines, fits


@pytest.fixture
def folder() -> Iterator[Path]:
    """With a short name, as sockets need."""
    with tempfile.TemporaryDirectory() as made:
        yield Path(made)


def met(folder: Path, size: int) -> list[Lines]:
    lines = [Lines(rank, size, folder / "store") for rank in range(size)]
    with ThreadPoolExecutor(size) as threads:
        list(threads.map(Lines.meet, lines))
    return lines


@pytest.mark.parametrize("size", [2, 4])
def test_all_get_what_each_sends(folder: Path, size: int) -> None:
    """All send before one reads, and one is a message ahead."""
    lines = met(folder, size)

    def exchange(rank: int) -> list[bytes]:
        found = []
        for turn in range(20):
            rooms = {other: memoryview(bytearray(MOST_BYTES)) for other in range(size) if other != rank}
            lines[rank].exchange(memoryview(bytes([rank * 20 + turn]) * MOST_BYTES), rooms)
            found.append(bytes(rooms[other][-1] for other in rooms))
        return found

    with ThreadPoolExecutor(size) as threads:
        for rank, found in enumerate(threads.map(exchange, range(size))):
            others = [other for other in range(size) if other != rank]
            assert found == [bytes(other * 20 + turn for other in others) for turn in range(20)]
    assert not list(folder.iterdir())


def test_a_rank_that_is_gone(folder: Path) -> None:
    first, second = met(folder, 2)
    second._to[0].close()
    with pytest.raises(RuntimeError, match="has ended"):
        first.exchange(memoryview(b"abc"), {1: memoryview(bytearray(3))})


def test_a_folder_with_a_long_name_has_none() -> None:
    assert fits(Path("/tmp/sensorium-ranks/store")) and not fits(Path("/" + "x" * PATH_BYTES))
