"""Layers with a sliding window: blocks that no token sees any more go back to the pool, and nothing else changes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from support import checkpoints
from support.engine_harness import Bench, bench, random_prompt, request, tokens_of
from support.model_driver import Driver
from support.model_driver import Sequence as Run

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.engine.prefix_cache import _of_table
from sensorium.engine.sequence import Sequence as Planned
from sensorium.kernels.context import LayerCache
from sensorium.models.base import Model
from sensorium.models.loading import load_model

WINDOW = 8
STEP = 32  # tokens of the largest step


@pytest.fixture(scope="module", params=["every layer", "one of two"])
def windowed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    path: Path = tmp_path_factory.mktemp("windowed")
    options: dict[str, Any] = {"sliding_window": WINDOW, "max_position_embeddings": 2048}
    if request.param == "every layer":
        checkpoints.make_mistral(path, **options)
    else:
        checkpoints.make_qwen2(path, use_sliding_window=True, max_window_layers=1, **options)
    return load_model(open_checkpoint(path), dtype=torch.float32, device="cpu")


def engine_of(model: Model, **options: Any) -> Bench:
    return bench(model, max_num_batched_tokens=STEP, **options)


def expected(model: Model, prompts: Sequence[Sequence[int]], count: int, **options: Any) -> list[list[int]]:
    """What a cache that keeps all blocks gives."""
    return [Driver(model, num_blocks=128, **options).greedy([Run(list(prompt))], count)[0] for prompt in prompts]


def poison_free_blocks(engine: Bench) -> None:
    """A block that was given back may hold anything."""
    pool, cache = engine.engine.scheduler.pool, engine.engine.runner._cache
    free = [block for block in range(pool.num_blocks) if pool.is_free(block) and pool._keys[block] is None]
    for layer in cache:
        assert isinstance(layer, LayerCache)
        nothing = -1 if layer.keys.dtype == torch.int8 else torch.nan  # four bytes of -1 are no number either
        layer.keys[free] = layer.values[free] = nothing


def keys_of(engine: Bench, tokens: Sequence[int], blocks: range) -> set[bytes]:
    """Keys of blocks of a prompt in all tables."""
    seq, prefixes = Planned(request(tokens, 1), 0), engine.engine.prefixes
    tables = range(len(engine.engine.scheduler.tables.windows))
    return {_of_table(prefixes.key(seq, index), table) for index in blocks for table in tables}


@pytest.mark.parametrize("cache", ["auto", "int8"])
def test_a_long_conversation_holds_a_bounded_number_of_blocks(windowed: Model, cache: str) -> None:
    """A table without a window grows; one with a window holds what a step reads, however long the sequence gets."""
    engine = engine_of(windowed, kv_cache_dtype=cache, enable_prefix_caching=False)
    scheduler = engine.engine.scheduler
    tables = scheduler.tables
    held: list[list[int]] = []

    def look(step: int) -> None:
        poison_free_blocks(engine)
        for seq in scheduler.prefilling + scheduler.decoding:
            held.append([len(b) - r for b, r in zip(seq.blocks, seq.num_released, strict=True)])

    prompt = random_prompt(3, 250)
    [result] = engine.run(request(prompt, 60), before_step=look)
    assert [result.tokens] == expected(windowed, [prompt], 60, int8_cache=cache == "int8")
    for window, counts in zip(tables.windows, zip(*held, strict=True), strict=True):
        assert max(counts) == (20 if window is None else 8)


def test_same_tokens_in_any_company(windowed: Model) -> None:
    """Eight unequal requests in too few blocks, with preemption, in pieces, cold and warm."""
    prompts = [random_prompt(i, length) for i, length in enumerate((3, 150, 16, 33, 180, 64, 1, 97))]
    wanted = expected(windowed, prompts, 12)
    engine = engine_of(windowed, kv_tokens=512, max_model_len=256)
    scheduler = engine.engine.scheduler

    def disturb(step: int) -> None:
        poison_free_blocks(engine)
        if step % 9 == 8 and scheduler.num_running > 1:
            scheduler._preempt((scheduler.decoding or scheduler.prefilling)[0])

    for _ in range(2):
        results = engine.run(*(request(prompt, 12) for prompt in prompts), before_step=disturb)
        assert tokens_of(results) == wanted
    assert scheduler.preemptions > 0


def test_the_next_turn_finds_what_the_window_still_sees(windowed: Model) -> None:
    """Blocks before the window may be gone; those in it must be there."""
    engine = engine_of(windowed)
    prompt = random_prompt(5, 300)
    [first] = engine.run(request(prompt, 40))
    longer = [*prompt, *first.tokens, *random_prompt(6, 20)]
    poison_free_blocks(engine)
    scheduler = engine.engine.scheduler
    pool = scheduler.pool
    early = [block for block in range(pool.num_blocks) if pool._keys[block] in keys_of(engine, longer, range(3))]
    assert len(early) == 3 * len(scheduler.tables.windows)
    for block in early:
        if None not in scheduler.tables.windows or len(pool._keys[block] or b"") > 32:
            pool.forget(block)  # of the windows' tables
    [second] = engine.run(request(longer, 8))
    assert second.cached == 336
    assert [second.tokens] == expected(windowed, [longer], 8)


def test_a_window_that_lost_a_block_is_no_hit(windowed: Model) -> None:
    engine = engine_of(windowed)
    prompt = random_prompt(7, 300)
    [first] = engine.run(request(prompt, 1))
    pool = engine.engine.scheduler.pool
    for block, key in enumerate(pool._keys):
        if key in keys_of(engine, prompt, range(16, 17)):
            pool.forget(block)
    [second] = engine.run(request(prompt, 1))
    assert second.cached == 256  # up to the lost block
    assert second.tokens == first.tokens
