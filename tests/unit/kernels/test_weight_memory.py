"""Memory that small weights share."""

from __future__ import annotations

import gc
import weakref

from sensorium.kernels.cpu.memory import CHUNK, PAGE, WeightMemory


def test_small_weights_share_chunks_of_large_pages() -> None:
    asked: list[tuple[int, int]] = []
    memory = WeightMemory(lambda *where: asked.append(where))
    first, chunk = memory.take(1000)
    second, same = memory.take(64)
    assert same is chunk
    assert (first.nbytes, second.nbytes) == (1000, 64)
    assert second.data_ptr() - first.data_ptr() == 1024
    assert first.data_ptr() % PAGE == 0
    rest, _ = memory.take(CHUNK // 4 - 1)
    assert rest.data_ptr() == second.data_ptr() + 64
    large, own = memory.take(CHUNK // 4)
    assert own is large
    others = [memory.take(CHUNK // 4 - 1) for _ in range(4)]
    assert others[-1][1] is not chunk
    assert [size for _, size in asked] == [CHUNK + PAGE, CHUNK // 4, CHUNK + PAGE]


def test_a_chunk_lives_as_long_as_what_is_in_it() -> None:
    memory = WeightMemory(lambda *_: None)
    chunk = memory.take(100)[1]
    alive = weakref.ref(chunk)
    kept = memory.take(100)[1]
    del chunk
    assert alive() is kept
    del kept
    gc.collect()
    assert alive() is None
    assert memory.take(100)[0].data_ptr() % PAGE == 0
