"""Memory by arithmetic: how many blocks there are, how long a sequence may be, and what is said when nothing fits."""

from __future__ import annotations

from collections.abc import Mapping

import pytest
import torch
from support.engine_harness import bench, random_prompt, request

from sensorium.config import ENCODER_CACHE_BYTES, WINDOWS_TOGETHER, EngineConfig
from sensorium.engine import loading
from sensorium.engine.cache_layout import CacheLayout, by_place
from sensorium.engine.encoder_cache import EncoderCache
from sensorium.engine.loading import (
    LoadedPart,
    bytes_beside_cache,
    choose_cache_dtype,
    choose_dtype,
    default_batched_tokens,
    room_of_rank,
)
from sensorium.engine.memory import (
    WORKSPACES,
    StepMemory,
    available_for_cache,
    encoder_cache_bytes,
    encoder_row_bytes,
    size_cache,
)
from sensorium.engine.tables import BlockTables
from sensorium.errors import StartupError
from sensorium.kernels.context import LayerCache
from sensorium.models.base import Model
from sensorium.models.cache import EncoderGroup, PagedGroup
from sensorium.system import cgroups
from sensorium.system.memory import free_memory_bytes

LAYOUT = CacheLayout.of([PagedGroup((0, 1), num_kv_heads=2, head_dim=8)], block_size=16, dtype=torch.bfloat16)
TABLES = BlockTables((None,), 16, 512)
BLOCK = LAYOUT.block_bytes


def layers_of(made: Mapping[int, LayerCache]) -> list[LayerCache]:
    return [layer for layer in by_place(made) if isinstance(layer, LayerCache)]  # all of them


def test_bytes_of_a_block() -> None:
    cache = layers_of(LAYOUT.make(3, torch.device("cpu")))
    assert [tuple(t.shape) for layer in cache for t in layer[:2]] == [(3, 2, 16, 8)] * 4
    assert {t.dtype for layer in cache for t in layer[:2]} == {torch.bfloat16}
    assert sum(t.nbytes for layer in cache for t in layer[:2]) == 3 * BLOCK
    assert not any(t.any() for layer in cache for t in layer[:2])


def test_groups_have_shapes_of_their_own() -> None:
    """Layer 3 reads the keys and values of layer 0."""
    groups = [PagedGroup((0, 2), 1, 8, shared=((3, 0),)), PagedGroup((1,), 2, 16)]
    layout = CacheLayout.of(groups, block_size=4, dtype=torch.float32)
    cache = layers_of(layout.make(7, torch.device("cpu")))
    assert [tuple(layer.keys.shape) for layer in cache] == [(7, 1, 4, 8), (7, 2, 4, 16), (7, 1, 4, 8), (7, 1, 4, 8)]
    assert cache[3] is cache[0]
    assert layout.windows == (None,) and {layer.table for layer in cache} == {0}
    assert layout.block_bytes == 4 * 2 * (2 * 8 + 2 * 16) * 4
    assert sum({id(t): t.nbytes for layer in cache for t in layer[:2]}.values()) == 7 * layout.block_bytes


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.int8])
@pytest.mark.parametrize(
    ("full", "windowed", "windows", "num_lanes"),
    [
        ((5, 4, 256), (29, 4, 256), (None, *[1024] * 5), 6),  # Gemma 3 4B: two lanes of 36 are empty
        ((10, 16, 128), (52, 16, 128), (None, *[1024] * 4), 13),  # 27B
        ((3, 1, 512), (12, 1, 256), (None, 1024, 1024), 3),  # Gemma 4 E2B: two narrow layers to a lane
        (
            (10, 4, 512),
            (50, 16, 256),
            (None, *[1024] * 5),
            10,
        ),  # 31B: two wide ones to a lane, half of a block is empty in their table
        ((1, 1, 8), (30, 1, 8), (None, *[1024] * 10), 3),
    ],
)
def test_layers_with_windows_have_tables_of_their_own(
    full: tuple[int, int, int],
    windowed: tuple[int, int, int],
    windows: tuple[int | None, ...],
    num_lanes: int,
    dtype: torch.dtype,
) -> None:
    """(layers, heads, head width) of both kinds. In one block of every table no two layers touch the same numbers."""
    number = full[0] + windowed[0]
    groups = [
        PagedGroup(tuple(range(full[0])), *full[1:]),
        PagedGroup(tuple(range(full[0], number)), *windowed[1:], sliding_window=1024),
    ]
    layout = CacheLayout.of(groups, 2, dtype, max_len=4096)
    assert (layout.windows, len(layout.lanes)) == (windows, num_lanes)
    cache = layers_of(layout.make(len(windows), torch.device("cpu")))
    for layer in cache:
        for tensor in layer[:2]:
            tensor[layer.table] += 1
    assert all(bool((tensor[layer.table] == 1).all()) for layer in cache for tensor in layer[:2])
    one = CacheLayout.of(groups, 2, dtype, max_len=1024)  # no sequence is longer than the window
    assert one.windows == (None,) and len(one.lanes) == number


def test_windows_bound_what_a_sequence_takes() -> None:
    tables = BlockTables((None, 32, 32), 16, step_tokens=64, keys_at_once=1)
    assert tables.needed(16) == 3
    assert tables.needed(16 * 100) == 100 + 2 * 7  # 31 tokens before a step of 64: in 7 blocks, wherever they begin
    config = EngineConfig("m", max_num_seqs=2)
    assert size_cache(config, tables, 10, 1600, 10**6) == (2 * 114, 1600)
    assert size_cache(config, tables, 10, 1600, 1139) == (113, 16 * 99)
    assert size_cache(config, tables, 10, 1600, 50) == (5, 16)
    with pytest.raises(StartupError, match="no memory for a KV cache"):
        size_cache(config, tables, 10, 1600, 29)
    assert (tables.capacity(228, 1600), BlockTables((None,), 16, 64).capacity(7, 100)) == (3200, 112)


def test_rows_of_an_encoder() -> None:
    """What the decoder's layers know of a row, where they attend to it: keys and values."""
    own = PagedGroup((0,), 1, 8)
    assert encoder_row_bytes([own], 32, torch.bfloat16) == 32 * 2
    assert encoder_row_bytes([own, EncoderGroup((0, 1, 2), 4, 8, 50)], 32, torch.bfloat16) == 2 * 3 * 4 * 8 * 2


def test_bytes_hold_nearly_twice_the_blocks() -> None:
    """A byte each and four for the scale of every row, where there were two bytes each."""
    for head_dim in (64, 128):
        wide = CacheLayout.of([PagedGroup((0, 1, 2), 2, head_dim)], block_size=16, dtype=torch.bfloat16)
        narrow = CacheLayout.of(wide.groups, block_size=16, dtype=torch.int8)
        assert narrow.block_bytes * 2 * head_dim == wide.block_bytes * (head_dim + 4)
        config = EngineConfig("m", max_num_seqs=1000)
        blocks = [size_cache(config, TABLES, layout.block_bytes, 4096, 100 * 2**20)[0] for layout in (wide, narrow)]
        assert blocks[1] == 100 * 2**20 // narrow.block_bytes > 1.88 * blocks[0]
        cache = layers_of(narrow.make(5, torch.device("cpu")))
        assert {t.dtype for layer in cache for t in layer[:2]} == {torch.int8}
        assert sum(t.nbytes for layer in cache for t in layer[:2]) == 5 * narrow.block_bytes


def test_type_of_the_cache() -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    assert choose_cache_dtype("auto", torch.float32, cpu, has_cache=True) is torch.float32
    assert choose_cache_dtype("auto", torch.float32, cpu, has_cache=False) is torch.float32
    assert choose_cache_dtype("int8", torch.float32, cpu, has_cache=True) is torch.int8
    assert choose_cache_dtype("fp8", torch.bfloat16, gpu, has_cache=True) is torch.float8_e4m3fn
    with pytest.raises(StartupError, match="--kv-cache-dtype int8: an encoder has no KV cache"):
        choose_cache_dtype("int8", torch.float32, cpu, has_cache=False)
    with pytest.raises(StartupError, match="--kv-cache-dtype fp8: a CPU has no kernels for it; int8"):
        choose_cache_dtype("fp8", torch.bfloat16, cpu, has_cache=True)


@pytest.mark.parametrize(
    ("available", "max_model_len", "blocks", "length"),
    [
        (1000 * BLOCK, None, 4 * 7, 100),  # no more than four longest sequences can use
        (20 * BLOCK + 5, None, 20, 100),
        (3 * BLOCK, None, 3, 48),  # sequences are as long as the cache holds
        (1000 * BLOCK, 33, 4 * 3, 33),
        (1000 * BLOCK, 5, 4, 5),
    ],
)
def test_what_fits(available: int, max_model_len: int | None, blocks: int, length: int) -> None:
    config = EngineConfig("m", max_num_seqs=4, max_model_len=max_model_len)
    assert size_cache(config, TABLES, BLOCK, max_model_len or 100, available) == (blocks, length)


@pytest.mark.parametrize(
    ("available", "max_model_len", "named"),
    [
        (BLOCK - 1, None, "--kv-cache-memory"),
        (-5, None, "--gpu-memory-utilization"),
        (3 * BLOCK, 100, "--max-model-len"),
    ],
)
def test_what_does_not_fit_names_the_flag(available: int, max_model_len: int | None, named: str) -> None:
    config = EngineConfig("m", max_num_seqs=4, max_model_len=max_model_len)
    with pytest.raises(StartupError, match=named):
        size_cache(config, TABLES, BLOCK, 100, available)


def test_a_quarter_of_what_the_container_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    assert 0 < free_memory_bytes() < 1 << 50
    monkeypatch.setattr(cgroups, "free_memory_bytes", lambda: 800_000)
    cpu = torch.device("cpu")
    assert available_for_cache(EngineConfig("m"), cpu, 0) == 200_000
    assert available_for_cache(EngineConfig("m", kv_cache_memory=7), cpu, 0) == 7
    assert encoder_cache_bytes(EngineConfig("m"), cpu, [], torch.bfloat16) == 100_000
    assert encoder_cache_bytes(EngineConfig("m", encoder_cache_memory=5), cpu, [], torch.bfloat16) == 5
    monkeypatch.setattr(cgroups, "free_memory_bytes", lambda: None)
    assert free_memory_bytes() > 1_000_000


def test_as_many_windows_as_are_decoded_together_have_room() -> None:
    group, cuda = EncoderGroup(tuple(range(32)), 20, 64, 1500), torch.device("cuda")  # whisper-large-v3
    size = encoder_cache_bytes(EngineConfig("m"), cuda, [group], torch.bfloat16)
    cache: EncoderCache[None] = EncoderCache(size, encoder_row_bytes([group], 1280, torch.bfloat16))
    assert [cache.reserve((b"", bytes([i])), 1500) for i in range(9)] == [True] * WINDOWS_TOGETHER + [False]
    assert encoder_cache_bytes(EngineConfig("m"), cuda, [], torch.bfloat16) == ENCODER_CACHE_BYTES


def test_graphs_and_libraries_have_their_part_of_a_gpu(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (6 * 10**9, 8 * 10**9))
    config = EngineConfig("m", gpu_memory_utilization=0.75)
    part = LoadedPart(model, model.checkpoint, torch.device("cuda"), torch.bfloat16, None)
    assert available_for_cache(config, part.device, 10**9) == 3 * 10**9 - WORKSPACES
    alone, with_graphs = (room_of_rank(part, config, None, 512, graph_rows=rows) for rows in (0, 64))
    logits = 4 * 64 * model.checkpoint.vocab_size
    states = model.activation_bytes(64) - model.activation_bytes(0)
    assert states > logits
    assert alone - with_graphs == logits + states


def test_rows_of_towers_have_their_part_of_a_gpu(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    part = LoadedPart(model, model.checkpoint, torch.device("cuda"), torch.bfloat16, None)
    config = EngineConfig("m", encoder_cache_memory=10**8)
    monkeypatch.setattr(type(model), "modalities", frozenset())
    without = bytes_beside_cache(part, config, 512, 0)
    monkeypatch.setattr(type(model), "modalities", frozenset({"image"}))
    assert bytes_beside_cache(part, config, 512, 0) == without + 10**8


@pytest.mark.parametrize(("took", "level"), [(2**30, "INFO"), (2**30 + 1, "WARNING"), (3 * 2**30, "WARNING")])
def test_the_first_large_step_shows_what_was_right(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, took: int, level: str
) -> None:
    """A card of 16 GiB with 8 GiB of weights and cache, and 1 GiB for all else."""
    caplog.set_level("INFO")
    gpu, peaks = torch.device("cuda", 0), [11 * 2**30]
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: peaks.pop())
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 8 * 2**30)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (4 * 2**30, 16 * 2**30))
    memory = StepMemory.begin(gpu, 2**30, 2048)
    assert not peaks  # what loading took at most is forgotten
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda device: 8 * 2**30 + took)
    assert not memory.is_known_after(1023) and not caplog.records
    assert memory.is_known_after(1024)
    [record] = caplog.records
    assert record.levelname == level
    if level == "WARNING":
        part = "0.01" if took == 2**30 + 1 else "0.13"  # of the card, rounded up
        assert f"--gpu-memory-utilization by {part}" in record.getMessage()


def test_it_is_looked_at_once(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    engine = bench(model)
    asked: list[int] = []

    def known(memory: StepMemory, tokens: int) -> bool:
        asked.append(tokens)
        return tokens > 1

    monkeypatch.setattr(StepMemory, "is_known_after", known)
    engine.engine.step_memory = StepMemory(torch.device("cuda"), 0, 0, 0)
    engine.run(request(random_prompt(1, 20), 4))
    assert (asked, engine.engine.step_memory) == ([20], None)


def test_threads_are_no_more_than_the_cores_allowed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.sched_getaffinity", lambda pid: set(range(8)))
    for allowed, expected in ((None, 8), (1, 1), (3, 3), (64, 8)):
        monkeypatch.setattr(cgroups, "cores", lambda allowed=allowed: allowed)
        assert loading.usable_cores() == expected


@pytest.mark.parametrize(
    ("wanted", "stored", "chosen"),
    [
        ("auto", "float16", torch.bfloat16),
        ("auto", "bfloat16", torch.bfloat16),
        ("auto", "float32", torch.float32),
        ("float16", "bfloat16", torch.float16),
        ("float32", "bfloat16", torch.float32),
    ],
)
def test_dtype_on_a_cpu(wanted: str, stored: str, chosen: torch.dtype) -> None:
    assert choose_dtype(wanted, stored, torch.device("cpu")) == chosen


@pytest.mark.parametrize("stored", ["bfloat16", "float16", "float32"])
def test_quantised_weights_compute_in_bfloat16_on_a_cpu(stored: str) -> None:
    """What the kernels for codes take; who asks for another type gets it."""
    assert choose_dtype("auto", stored, torch.device("cpu"), is_quantized=True) == torch.bfloat16
    assert choose_dtype("float32", stored, torch.device("cpu"), is_quantized=True) == torch.float32


def test_steps_of_a_large_generator_on_a_cpu_are_short(model: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    cpu = torch.device("cpu")
    assert default_batched_tokens(model, cpu) == 2048  # small: its steps are short anyway
    monkeypatch.setattr(loading, "SMALL_MODEL_BYTES", 0)
    assert default_batched_tokens(model, cpu) == 512
    assert default_batched_tokens(model, torch.device("cuda")) == 2048
    monkeypatch.setattr(model, "generates", False)
    assert default_batched_tokens(model, cpu) == 2048
