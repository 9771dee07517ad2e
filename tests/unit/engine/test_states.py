"""Layers with states in the engine: however a sequence's steps are cut, found or lost, its tokens are the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support import checkpoints
from support.engine_harness import Bench, bench, random_prompt, request, tokens_of
from support.model_driver import Driver, Sequence

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.config import EngineConfig
from sensorium.engine.block_pool import BlockPool
from sensorium.engine.faults import Faults
from sensorium.engine.memory import LEAST_SLOTS, size_states
from sensorium.engine.state_slots import ZERO_SLOT
from sensorium.engine.tables import BlockTables
from sensorium.kernels.context import StateCache
from sensorium.models.base import Model
from sensorium.models.loading import load_model

LENGTHS = (3, 120, 16, 33, 130, 64, 1, 97)


@pytest.fixture(scope="module", params=["lfm2", "qwen3_5_text"])
def hybrid(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Model:
    path: Path = tmp_path_factory.mktemp("hybrid")
    getattr(checkpoints, f"make_{request.param}")(path)
    return load_model(open_checkpoint(path), dtype=torch.float32, device="cpu")


def engine_of(model: Model, faults: Faults | None = None, **options: Any) -> Bench:
    return bench(model, faults=faults, **{"max_num_batched_tokens": 48, "max_model_len": 256, **options})


def expected(model: Model, prompts: list[list[int]], count: int, **options: Any) -> list[list[int]]:
    return [Driver(model, num_blocks=128, **options).greedy([Sequence(list(prompt))], count)[0] for prompt in prompts]


def poison_free_slots(engine: Bench) -> None:
    """A slot that nobody holds and nobody can find may hold anything; the one of zeros never changes."""
    pool = slots_of(engine)
    free = [slot for slot in range(pool.num_blocks) if pool.is_free(slot) and pool._keys[slot] is None]
    for layer in engine.engine.runner._cache:
        if isinstance(layer, StateCache):
            for part in layer.parts:
                part[free] = torch.nan
                assert not part[ZERO_SLOT].any()


def slots_of(engine: Bench) -> BlockPool:
    states = engine.engine.prefixes.states
    assert states is not None
    return states.pool


@pytest.mark.parametrize(("cache", "kv_tokens"), [("auto", 512), ("int8", 16384)])
def test_same_tokens_in_any_company(hybrid: Model, cache: str, kv_tokens: int) -> None:
    """Eight unequal requests, also in too few blocks, with preemption, in pieces, cold and warm."""
    prompts = [random_prompt(i, length) for i, length in enumerate(LENGTHS)]
    wanted = expected(hybrid, prompts, 17, int8_cache=cache == "int8")
    engine = engine_of(hybrid, kv_tokens=kv_tokens, kv_cache_dtype=cache)
    scheduler = engine.engine.scheduler

    def disturb(step: int) -> None:
        poison_free_slots(engine)
        if step % 9 == 8 and scheduler.num_running > 1:
            scheduler._preempt((scheduler.decoding or scheduler.prefilling)[0])

    for _ in range(2):
        results = engine.run(*(request(prompt, 17) for prompt in prompts), before_step=disturb)
        assert tokens_of(results) == wanted
    assert scheduler.preemptions > 0
    assert any(result.cached for result in results) == (kv_tokens > 512)


def test_what_the_prefix_cache_knows(hybrid: Model) -> None:
    """The end of a prompt, the end of an answer, and, from the second time on, where prompts part."""
    engine = engine_of(hybrid, max_num_batched_tokens=512)
    common, ends = random_prompt(1, 100), [random_prompt(i, 60) for i in range(2, 5)]
    cached = []
    for prompt in ([*common, *ends[0]], [*common, *ends[0]], [*common, *ends[1]], [*common, *ends[2]]):
        [result] = engine.run(request(prompt, 17), before_step=lambda step: poison_free_slots(engine))
        assert [result.tokens] == expected(hybrid, [prompt], 17)
        cached.append(result.cached)
    assert cached == [0, 144, 0, 96]
    longer = [*prompt, *result.tokens, *random_prompt(9, 5)]
    [result] = engine.run(request(longer, 8))
    assert result.cached == 176  # of 160 + 17 tokens, the last of which was not computed
    assert [result.tokens] == expected(hybrid, [longer], 8)
    [other] = engine.run(request(longer, 8, salt=b"another tenant"))
    assert (other.cached, other.tokens) == (0, result.tokens)
    off = engine_of(hybrid, enable_prefix_caching=False)
    for _ in range(2):
        [result] = off.run(request(longer, 8))
        assert (result.cached, result.tokens) == (0, other.tokens)
    assert not slots_of(off)._by_key


def test_a_lost_snapshot_is_no_hit(hybrid: Model) -> None:
    """Keys and values alone are of no use; nor is a state whose keys and values are gone."""
    engine = engine_of(hybrid)
    prompt = random_prompt(7, 120)
    [first] = engine.run(request(prompt, 2))
    slots = slots_of(engine)
    assert len(slots._by_key) == 3  # each chunk, of 48 tokens at most, has left one
    last = max(slots._by_key.values(), key=lambda slot: list(slots._free).index(slot))
    slots.forget(last)
    [second] = engine.run(request(prompt, 2))
    assert (second.cached, second.tokens) == (96, first.tokens)
    pool = engine.engine.scheduler.pool
    for key in list(pool._by_key):
        pool.forget(pool._by_key[key])
    [third] = engine.run(request(prompt, 2))
    assert (third.cached, third.tokens) == (0, first.tokens)


def test_a_step_that_failed_is_repeated(hybrid: Model) -> None:
    """Its layers had written their states already. The first failure of a shape ends its requests, the second does
    not."""
    prompts = [random_prompt(i, 20) for i in (1, 2)]
    wanted = expected(hybrid, prompts, 12)
    faults = Faults("sample:raise:5,sample:raise:12")
    engine = engine_of(hybrid, faults)
    failed = engine.run(*(request(prompt, 12) for prompt in prompts))
    assert [result.reason for result in failed] == ["error", "error"]
    assert tokens_of(engine.run(*(request(prompt, 12) for prompt in prompts))) == wanted


def test_nothing_is_guessed_but_what_a_grammar_leaves(hybrid: Model) -> None:
    """A wrong guess starts the sequence over, whose state has seen it."""
    assert engine_of(hybrid, speculative_tokens=4).engine.lookup is None
    prompt = random_prompt(3, 40)
    [wanted] = expected(hybrid, [prompt], 20)
    engine = engine_of(hybrid)
    guessed = 0

    def propose(seq: Any, most: int) -> list[int]:
        nonlocal guessed
        guessed += 1
        right = wanted[seq.num_outputs : seq.num_outputs + 2]
        return right if guessed % 3 else [*right[:1], 7]

    engine.engine.scheduler.propose = propose
    [result] = engine.run(request(prompt, 20), before_step=lambda step: poison_free_slots(engine))
    assert result.tokens == wanted
    assert 5 < guessed < 20


def test_few_slots_make_few_sequences(hybrid: Model) -> None:
    prompts = [random_prompt(i, length) for i, length in enumerate(LENGTHS)]
    engine = engine_of(hybrid, max_num_seqs=2)
    scheduler = engine.engine.scheduler
    running = []
    results = engine.run(
        *(request(prompt, 9) for prompt in prompts), before_step=lambda step: running.append(scheduler.num_running)
    )
    assert max(running) == 2
    assert tokens_of(results) == expected(hybrid, prompts, 9)


@pytest.mark.parametrize(
    ("available", "max_model_len", "slots"),
    [
        (10**9, None, 1 + 2 * 4 + 4 * 1024 // 128),  # all that can be of use
        (9 * 1000 + 128 * 100 + 1000, None, 10),  # a snapshot for 128 tokens
        (12_000, None, 6),  # half of it
        (100, None, LEAST_SLOTS),
        (105_000, 1024, LEAST_SLOTS),  # a sequence takes 102,400
        (108_500, 1024, 6),
    ],
)
def test_memory_of_states(available: int, max_model_len: int | None, slots: int) -> None:
    """1,000 bytes a slot, 100 a token."""
    config = EngineConfig("m", max_num_seqs=4, max_model_len=max_model_len)
    tables = BlockTables((None,), 16, 512)
    assert size_states(config, tables, 1600, 1000, 1024, available) == slots
    assert size_states(config, tables, 1600, 0, 1024, available) == 0
