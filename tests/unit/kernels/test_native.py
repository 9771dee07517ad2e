"""Every native kernel against its torch twin in float32, on awkward sizes and on every instruction set."""

from __future__ import annotations

import itertools
import random
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from sensorium.kernels import Activation, DecoderLayerParts, Quantization, reference
from sensorium.kernels.context import AttentionContext, LayerCache
from sensorium.kernels.cpu import native
from sensorium.kernels.cpu.library import ACTIVATIONS
from sensorium.kernels.cpu.linear import MappedLinear, NativeLinear, PackedLinear
from sensorium.kernels.cpu.native import Native

BF16 = torch.bfloat16
ROUNDING = 2.0**-8  # of one bf16 result


def random_bf16(*shape: int) -> Tensor:
    return torch.randn(shape).to(BF16)


def assert_close(got: Tensor, expected: Tensor, *, tolerance: float = 2 * ROUNDING) -> None:
    """Elementwise relative to the value or, near zero, to the tensor's own size."""
    assert got.shape == expected.shape
    size = expected.abs().mean() if expected.numel() else torch.tensor(0.0)
    error = (got.float() - expected).abs() / (expected.abs() + size)
    assert not error.isnan().any()
    if error.numel():
        assert error.max().item() < tolerance


def in_place(kernels: Native, weight: Tensor) -> MappedLinear:
    return MappedLinear(kernels, [(0, weight)], *weight.shape)


def context_of(query_lens: list[int], context_lens: list[int], block_size: int, num_blocks: int) -> AttentionContext:
    """Sequences over blocks in random order."""
    free = random.Random(3).sample(range(num_blocks), num_blocks)
    needed = [-(-length // block_size) for length in context_lens]
    tables = torch.zeros(len(query_lens), max(needed) + 1, dtype=torch.int32)
    slots = []
    for i, (count, queries, length) in enumerate(zip(needed, query_lens, context_lens, strict=True)):
        blocks = [free.pop() for _ in range(count)]
        tables[i, :count] = torch.tensor(blocks, dtype=torch.int32)
        slots += [blocks[p // block_size] * block_size + p % block_size for p in range(length - queries, length)]
    return AttentionContext(
        query_lens=query_lens,
        context_lens=context_lens,
        num_decodes=query_lens.count(1),
        block_size=block_size,
        query_start=torch.tensor([0, *itertools.accumulate(query_lens)], dtype=torch.int32),
        seq_lens=torch.tensor(context_lens, dtype=torch.int32),
        block_tables=tables,
        slots=torch.tensor(slots),
    )


def visible_of(context: AttentionContext, sequence: int, first: int, last: int) -> Tensor:
    """How far tokens see when those at places [first, last) of one sequence see one another."""
    pieces = [
        torch.arange(length - count, length, dtype=torch.int32) + 1
        for count, length in zip(context.query_lens, context.context_lens, strict=True)
    ]
    own = pieces[sequence]
    own[(own > first) & (own <= last)] = last
    return torch.cat(pieces)


@pytest.mark.parametrize("shape", [(16, 32), (64, 48), (100, 70), (33, 7), (1, 1), (50, 129), (257, 640)])
@pytest.mark.parametrize("rows", [0, 1, 3, 12, 13, 40])
def test_linear(kernels: Native, shape: tuple[int, int], rows: int) -> None:
    weight, bias = random_bf16(*shape), random_bf16(shape[0])
    x = random_bf16(rows, shape[1])
    form = kernels.pack_linear(weight, bias)
    expected = functional.linear(x.float(), weight.float(), bias.float())
    assert_close(form(x), expected)
    assert_close(form(x, torch.float32), expected, tolerance=1e-4)
    ids = torch.randint(0, shape[0], (5,))
    assert torch.equal(form.rows(ids), weight[ids])


def test_linear_large_enough_for_every_blocking(fastest: Native) -> None:
    weight = random_bf16(80, 1100)
    form = fastest.pack_linear(weight, None)
    for rows in (47, 60, 1000):
        x = random_bf16(rows, 1100)
        assert_close(form(x), x.float() @ weight.float().T)


def test_linear_rows_do_not_depend_on_their_neighbours(kernels: Native) -> None:
    form = kernels.pack_linear(random_bf16(96, 1536), None)
    x = random_bf16(50, 1536)
    together = form(x)
    for rows in (1, 7, 30):
        assert torch.equal(form(x[:rows].contiguous()), together[:rows])


def test_linear_takes_rows_in_pieces_and_strided(fastest: Native) -> None:
    weight = random_bf16(75, 40)
    pieces = PackedLinear(fastest, 75, 40)
    wide = torch.cat([weight, random_bf16(75, 8)], dim=1)
    for first, last in ((5, 32), (0, 5), (32, 75)):
        pieces.fill(first, wide[first:last, :40])
    assert torch.equal(pieces.rows(torch.arange(75)), weight)
    x = random_bf16(3, 4, 40).transpose(0, 1)
    assert_close(pieces(x), x.float() @ weight.float().T)
    with pytest.raises(ValueError, match="do not fit"):
        pieces.fill(70, weight)
    with pytest.raises(ValueError, match="expected bfloat16"):
        pieces(x.float())


@pytest.mark.parametrize("size", [8, 64, 100, 1536])
@pytest.mark.parametrize("rows", [0, 1, 5, 70])
def test_norms(kernels: Native, size: int, rows: int) -> None:
    x, residual, weight, bias = random_bf16(rows, size), random_bf16(rows, size), random_bf16(size), random_bf16(size)
    assert_close(kernels.rms_norm(x, weight, 1e-6), reference.rms_norm(x.float(), weight.float(), 1e-6))
    total = (x.float() + residual.float()).to(BF16)
    normed, new_residual = kernels.add_rms_norm(x, residual.clone(), weight, 1e-6)
    assert torch.equal(new_residual, total)
    assert_close(normed, reference.rms_norm(total.float(), weight.float(), 1e-6))
    expected = functional.layer_norm(x.float(), (size,), weight.float(), bias.float(), 1e-5)
    assert_close(kernels.layer_norm(x, weight, bias, 1e-5), expected)
    assert_close(kernels.layer_norm(x, None, None, 1e-5), functional.layer_norm(x.float(), (size,), eps=1e-5))


@pytest.mark.parametrize("activation", [name for name in ACTIVATIONS if name != "clamped_swiglu"])
def test_activations(kernels: Native, activation: Activation) -> None:
    x = torch.cat([random_bf16(5000) * 4, torch.tensor([0.0, -0.0, 200.0, -200.0, 1e30, -1e30], dtype=BF16)])
    expected = reference.activate(x.float(), activation)
    error = (kernels.activate(x, activation).float() - expected).abs() / (expected.abs() + 1e-2)
    assert error.max() < 2 * ROUNDING


@pytest.mark.parametrize("size", [4, 48, 1000])
def test_silu_mul(kernels: Native, size: int) -> None:
    for rows in (0, 1, 9):
        x = random_bf16(rows, 2 * size)
        assert_close(kernels.silu_mul(x), reference.silu_mul(x.float()))


@pytest.mark.parametrize(("head_dim", "rotary"), [(64, 64), (80, 80), (128, 96), (24, 12), (6, 6)])
def test_rope(kernels: Native, head_dim: int, rotary: int) -> None:
    for tokens in (0, 1, 33):
        fused = random_bf16(tokens, 7, head_dim)
        q, k, v = fused.split([4, 2, 1], dim=1)
        angles = torch.randn(tokens, rotary // 2)
        expected = reference.rope(q.float(), k.float(), angles.cos(), angles.sin())
        untouched = v.clone()
        got = kernels.rope(q, k, angles.cos(), angles.sin())
        assert_close(got[0], expected[0])
        assert_close(got[1], expected[1])
        assert torch.equal(v, untouched)


@pytest.mark.parametrize("head_dim", [16, 24, 64, 80, 128])
@pytest.mark.parametrize("heads", [(4, 4), (6, 1), (12, 2)])
@pytest.mark.parametrize("window", [None, 5, 70])
def test_paged_attention(kernels: Native, head_dim: int, heads: tuple[int, int], window: int | None) -> None:
    query_lens = [1, 1, 1, 1, 3, 17, 40, 130]
    context_lens = [1, 16, 17, 700, 3, 49, 64, 150]
    context = context_of(query_lens, context_lens, 16, 80)
    k_cache, v_cache = random_bf16(80, heads[1], 16, head_dim), random_bf16(80, heads[1], 16, head_dim)
    q = random_bf16(sum(query_lens), heads[0] + 1, head_dim)[:, : heads[0]]
    scale = head_dim**-0.5
    got = kernels.paged_attention(q, k_cache, v_cache, context, scale, window)
    expected = reference.paged_attention(q.float(), k_cache.float(), v_cache.float(), context, scale, window)
    assert_close(got, expected, tolerance=4 * ROUNDING)
    precise = kernels.paged_attention(q.float(), k_cache.float(), v_cache.float(), context, scale, window)
    assert precise.dtype is torch.float32
    assert_close(precise, expected, tolerance=1e-5)
    codes = torch.zeros(80, heads[1], 16, head_dim + 4, dtype=torch.int8)  # of which native code has only bf16's
    assert kernels.paged_attention(q.float(), codes, codes, context, scale, window).dtype is torch.float32


@pytest.mark.parametrize("window", [None, 5, 70])
@pytest.mark.parametrize("span", [(20, 148), (30, 31), (60, 150)])
def test_spans_that_see_all_of_themselves(kernels: Native, window: int | None, span: tuple[int, int]) -> None:
    context = context_of([1, 17, 130, 40], [700, 49, 150, 64], 16, 80)
    k_cache, v_cache = random_bf16(80, 2, 16, 32), random_bf16(80, 2, 16, 32)
    q = random_bf16(188, 6, 32)
    visible = visible_of(context, 2, *span)
    got = kernels.paged_attention(q, k_cache, v_cache, context, 0.2, window, visible)
    wide = q.float(), k_cache.float(), v_cache.float()
    expected = reference.paged_attention(*wide, context, 0.2, window, visible)
    assert_close(got, expected, tolerance=4 * ROUNDING)
    assert_close(kernels.paged_attention(*wide, context, 0.2, window, visible), expected, tolerance=1e-5)


@pytest.mark.parametrize("window", [None, 5, 70])
def test_sinks(kernels: Native, window: int | None) -> None:
    """Also such that take all of the probability, and none."""
    context = context_of([1, 1, 3, 130, 40], [1, 700, 3, 150, 64], 16, 80)
    k_cache, v_cache = random_bf16(80, 2, 16, 32), random_bf16(80, 2, 16, 32)
    q = random_bf16(175, 6, 32)
    sinks = torch.tensor([0.5, -300.0, 3.0, 300.0, -2.0, 1.0])
    got = kernels.paged_attention(q, k_cache, v_cache, context, 0.2, window, None, sinks)
    wide = q.float(), k_cache.float(), v_cache.float()
    expected = reference.paged_attention(*wide, context, 0.2, window, None, sinks)
    assert_close(got, expected, tolerance=4 * ROUNDING)
    assert_close(kernels.paged_attention(*wide, context, 0.2, window, None, sinks), expected, tolerance=1e-5)
    assert not expected[:, 3].any()
    without = reference.paged_attention(*wide, context, 0.2, window)
    assert_close(expected[:, 1], without[:, 1], tolerance=1e-6)


def test_paged_attention_other_block_sizes_and_stale_memory(kernels: Native) -> None:
    for block_size in (8, 32, 5):
        context = context_of([1, 1, 9], [3, 90, 30], block_size, 60)
        q, k, v = random_bf16(11, 2, 32), random_bf16(11, 2, 32), random_bf16(11, 2, 32)
        k_cache = torch.full((60, 2, block_size, 32), torch.nan, dtype=BF16)
        v_cache = k_cache.clone()
        for table, length in zip(context.block_tables, context.context_lens, strict=True):
            for position in range(length):
                at = table[position // block_size], slice(None), position % block_size
                k_cache[at], v_cache[at] = random_bf16(2, 32), random_bf16(2, 32)
        twin_k, twin_v = k_cache.clone(), v_cache.clone()
        kernels.write_kv(k, v, k_cache, v_cache, context.slots)
        reference.write_kv(k, v, twin_k, twin_v, context.slots)
        assert torch.equal(k_cache.nan_to_num(9.0), twin_k.nan_to_num(9.0))
        assert torch.equal(v_cache.nan_to_num(9.0), twin_v.nan_to_num(9.0))
        got = kernels.paged_attention(q, k_cache, v_cache, context, 0.2)
        k32, v32 = k_cache.float().nan_to_num(0.0), v_cache.float().nan_to_num(0.0)
        assert_close(got, reference.paged_attention(q.float(), k32, v32, context, 0.2), tolerance=4 * ROUNDING)


def test_paged_attention_survives_large_scores(kernels: Native) -> None:
    context = context_of([1, 40], [600, 40], 16, 48)
    k_cache, v_cache = random_bf16(48, 1, 16, 64) * 30, random_bf16(48, 1, 16, 64)
    q = random_bf16(41, 2, 64) * 30
    got = kernels.paged_attention(q, k_cache, v_cache, context, 0.125)
    expected = reference.paged_attention(q.float(), k_cache.float(), v_cache.float(), context, 0.125)
    assert_close(got, expected, tolerance=4 * ROUNDING)


@pytest.mark.parametrize("head_dim", [16, 24, 72, 128])
@pytest.mark.parametrize("window", [None, 70])
def test_int8_cache(kernels: Native, head_dim: int, window: int | None) -> None:
    query_lens, context_lens = [1, 1, 1, 17, 130], [1, 16, 700, 49, 150]
    context = context_of(query_lens, context_lens, 16, 64)
    q = random_bf16(sum(query_lens), 6, head_dim)
    k, v = random_bf16(150, 2, head_dim) * 3, random_bf16(150, 2, head_dim)
    k[7] = 0
    keys, values = (torch.zeros(64, 2, 16, head_dim + 4, dtype=torch.int8) for _ in range(2))
    caches, twins = (keys, values), (keys.clone(), values.clone())
    places = torch.randperm(64 * 16)
    for first in range(0, 900, 150):  # every slot that a sequence reads
        kernels.write_kv(k, v, *caches, places[first : first + 150])
        reference.write_kv(k, v, *twins, places[first : first + 150])
    for ours, theirs in zip(caches, twins, strict=True):
        got, expected = (reference.dequantize_heads(cache, torch.float32) for cache in (ours, theirs))
        step = expected.abs().amax(-1, keepdim=True) / 127
        assert ((got - expected).abs() <= 1.01 * step).all()  # a tie may go either way
    got = kernels.paged_attention(q, *caches, context, 0.1, window)
    assert_close(got, reference.paged_attention(q.float(), *caches, context, 0.1, window), tolerance=4 * ROUNDING)


@pytest.mark.parametrize("window", [1, 5, 64, 300])
def test_windowed_varlen_attention(kernels: Native, window: int) -> None:
    lengths = [200, 1, 33, 64, 130]
    q, k, v = random_bf16(sum(lengths), 6, 32).split([2, 2, 2], dim=1)
    got = kernels.varlen_attention(q, k, v, lengths, 0.2, window)
    expected = reference.varlen_attention(q.float(), k.float(), v.float(), lengths, 0.2, window)
    assert_close(got, expected, tolerance=4 * ROUNDING)


@pytest.mark.parametrize("window", [None, 1, 70])
@pytest.mark.parametrize("head_dim", [2, 16, 54, 64, 72])
def test_float_varlen_attention(kernels: Native, head_dim: int, window: int | None) -> None:
    lengths = [200, 1, 33, 64, 130]
    q, k, v = torch.randn(sum(lengths), 9, head_dim).split([3, 3, 3], dim=1)
    got = kernels.varlen_attention(q, k, v, lengths, head_dim**-0.5, window)
    assert got.dtype is torch.float32
    expected = reference.varlen_attention(q.double(), k.double(), v.double(), lengths, head_dim**-0.5, window)
    assert_close(got, expected, tolerance=1e-5)


@pytest.mark.parametrize("queries", [1, 4, 5])
@pytest.mark.parametrize("head_dim", [2, 54, 64, 72])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_run_attention_of_few_queries(kernels: Native, queries: int, head_dim: int, dtype: torch.dtype) -> None:
    q = torch.randn(queries, 3, head_dim).to(dtype)
    for keys in (1, 63, 700):
        memory = torch.randn(2, 3, keys, head_dim).to(dtype)
        by_head, by_row = memory.transpose(1, 2), memory.transpose(1, 2).contiguous()  # [keys, heads, head_dim] each
        got = [kernels.run_attention(q, k, v, head_dim**-0.5) for k, v in (by_head, by_row)]
        assert torch.equal(*got)
        wide_k, wide_v = by_row.double()
        expected = reference.run_attention(q.double(), wide_k, wide_v, head_dim**-0.5)
        assert_close(got[0], expected, tolerance=1e-5 if dtype is torch.float32 else 4 * ROUNDING)


@pytest.mark.parametrize("head_dim", [16, 64, 72, 80])
@pytest.mark.parametrize("lengths", [[1], [5, 64, 1], [200, 33], [64, 64]])
def test_varlen_attention(kernels: Native, head_dim: int, lengths: list[int]) -> None:
    fused = random_bf16(sum(lengths), 9, head_dim)
    q, k, v = fused.split([3, 3, 3], dim=1)
    got = kernels.varlen_attention(q, k, v, lengths, head_dim**-0.5)
    expected = reference.varlen_attention(q.float(), k.float(), v.float(), lengths, head_dim**-0.5)
    assert_close(got, expected, tolerance=4 * ROUNDING)


def gate_up(kernels: Native, wide: int, hidden: int, form: str) -> NativeLinear:
    weight = random_bf16(2 * wide, hidden)
    made: NativeLinear
    if form in ("rows", "compact"):
        made = in_place(kernels, weight)
    else:
        quantization = {"int8": Quantization(8), "int4": Quantization(4, 32)}.get(form)
        made = kernels.pack_linear(weight, None, quantization=quantization)
    if form == "compact":
        cast(Any, made).pack()
    made.set_bias(random_bf16(2 * wide))
    return made


@pytest.mark.parametrize(
    ("qk_norm", "int8", "wide", "form", "is_gemma", "paired"),
    [
        (False, False, 80, "packed", False, 0),
        (True, False, 96, "packed", False, 0),
        (False, True, 80, "packed", False, 0),
        (False, False, 96, "rows", False, 0),
        (False, False, 96, "compact", False, 0),
        (False, False, 96, "int8", False, 0),
        (False, False, 96, "int4", False, 0),
        (False, False, 80, "int4", False, 0),
        (True, False, 80, "packed", True, 0),
        (True, True, 96, "int4", True, 0),
        (False, False, 80, "packed", False, 32),
        (True, True, 96, "int4", False, 18),
    ],
)
def test_decoder_is_its_kernels_one_by_one(
    kernels: Native, qk_norm: bool, int8: bool, wide: int, form: str, is_gemma: bool, paired: int
) -> None:
    """`wide` is a multiple of 32, or not: gate and up are multiplied in one then, or one after the other. Gemma has two
    block tables. `paired`: dimensions of a head that are rotated in pairs, all of which are neighbours then."""
    hidden, heads, kv_heads, dim, tokens = 96, 6, 2, 32, 520
    query_lens, context_lens = [1, 1, 1, 517], [1, 40, 16, 530]
    context = context_of(query_lens, context_lens, 16, 48)
    if is_gemma:
        context.visible = visible_of(context, 3, 100, 290)
        context.others = [context_of(query_lens, context_lens, 16, 48)]
    tables = [0, int(is_gemma), 0]
    stored = [LayerCache(random_bf16(48, kv_heads, 16, dim), random_bf16(48, kv_heads, 16, dim), one) for one in tables]
    if int8:
        turned = reference.quantize_heads
        stored = [LayerCache(turned(keys), turned(values), table) for keys, values, table in stored]
    cache: Any = stored
    twin = [(layer.keys.clone(), layer.values.clone()) for layer in cache]
    layers = [
        DecoderLayerParts(
            random_bf16(hidden),
            kernels.pack_linear(random_bf16((heads + 2 * kv_heads) * dim, hidden), None),
            random_bf16(dim) if qk_norm else None,
            random_bf16(dim) if qk_norm else None,
            kernels.pack_linear(random_bf16(hidden, heads * dim), None),
            random_bf16(hidden),
            cast(Any, gate_up(kernels, wide, hidden, form)),
            kernels.pack_linear(random_bf16(hidden, wide), None),
            20 if i == 1 else None,
            random_bf16(hidden) if is_gemma else None,
            random_bf16(hidden) if is_gemma else None,
            is_gemma,
            i % 2,
            is_paired=bool(paired),
        )
        for i in range(3)
    ]
    norm, x = random_bf16(hidden), random_bf16(tokens, hidden)
    angles = torch.randn(2, tokens, (paired or dim) // 2)
    rotations = [(one.cos(), one.sin()) for one in angles]
    order = [*range(0, paired, 2), *range(1, paired, 2), *range(paired, dim)]
    offset = 1.0 if is_gemma else 0.0
    decoder = kernels.decoder_stack(
        layers, norm, num_heads=heads, num_kv_heads=kv_heads, head_dim=dim, scale=0.2, eps=1e-6, norm_offset=offset
    )
    assert decoder is not None
    before = x.clone()
    got = decoder(x, rotations, cache, context)
    assert torch.equal(x, before)

    residual, out = x.clone(), None
    for parts, (k_cache, v_cache), table in zip(layers, twin, tables, strict=True):
        if out is None:
            normed = kernels.rms_norm(residual, parts.input_norm, 1e-6, offset)
        else:
            normed, residual = kernels.add_rms_norm(out, residual, parts.input_norm, 1e-6, offset)
        q, k, v = parts.qkv(normed).view(tokens, -1, dim).split([heads, kv_heads, kv_heads], dim=1)
        if parts.q_norm is not None and parts.k_norm is not None:
            q = kernels.rms_norm(q, parts.q_norm, 1e-6, offset)
            k = kernels.rms_norm(k, parts.k_norm, 1e-6, offset)
        q, k = kernels.rope(q[..., order], k[..., order], *rotations[parts.rotation])
        seen = context.by_table(table)
        kernels.write_kv(k, v, k_cache, v_cache, seen.slots)
        attended = kernels.paged_attention(q, k_cache, v_cache, seen, 0.2, parts.sliding_window, context.visible)
        out = parts.o(attended.flatten(1))
        if parts.attended_norm is not None:
            out = kernels.rms_norm(out, parts.attended_norm, 1e-6, offset)
        normed, residual = kernels.add_rms_norm(out, residual, parts.mlp_norm, 1e-6, offset)
        assert parts.down is not None and parts.gate_up is not None
        out = parts.down(kernels.silu_mul(parts.gate_up(normed)))
        if parts.after_norm is not None:
            out = kernels.rms_norm(out, parts.after_norm, 1e-6, offset)
    assert out is not None
    assert torch.equal(got, kernels.add_rms_norm(out, residual, norm, 1e-6, offset)[0])
    for ours, theirs in zip(cache, twin, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])
    rows = torch.tensor([0, 2, 3, 77, 519])  # all that is read; keys and values are written of every token
    for keys, values, table in cache:
        slots = context.by_table(table).slots
        keys[slots // 16, :, slots % 16] = values[slots // 16, :, slots % 16] = 0
    assert torch.equal(decoder(x, rotations, cache, context, rows)[rows], got[rows])
    for ours, theirs in zip(cache, twin, strict=True):
        assert torch.equal(ours[0], theirs[0])
        assert torch.equal(ours[1], theirs[1])


def test_decoder_is_not_made_of_other_parts(fastest: Native) -> None:
    form = fastest.pack_linear(random_bf16(32, 32), None)
    parts = DecoderLayerParts(
        random_bf16(32), form, None, None, form, random_bf16(32), form, cast(Any, lambda x: x), None
    )
    assert (
        fastest.decoder_stack([parts], random_bf16(32), num_heads=1, num_kv_heads=1, head_dim=8, scale=1, eps=1e-6)
        is None
    )


def test_results_do_not_depend_on_the_number_of_threads(kernels: Native) -> None:
    """Sizes at which every kernel takes a team: more than 64 KB for the small ones."""
    weight, x, bias = random_bf16(2000, 640), random_bf16(150, 640), random_bf16(640)
    context = context_of([1, 1, 90], [2000, 40, 200], 16, 160)
    q, k, v = random_bf16(92, 6, 64), random_bf16(92, 2, 64), random_bf16(92, 2, 64)
    caches = [(random_bf16(160, 2, 16, 64), random_bf16(160, 2, 16, 64))]
    caches.append((reference.quantize_heads(caches[0][0]), reference.quantize_heads(caches[0][1])))
    seen = random_bf16(1100, 6, 64).split(2, dim=1)
    angles = torch.randn(92, 32)

    def everything() -> list[Tensor]:
        form = kernels.pack_linear(weight, None)
        wide = form(x)
        results = [
            wide,
            form(x[:1]),
            form.rows(torch.arange(2000)),
            kernels.silu_mul(wide),
            kernels.activate(wide.clone(), "gelu"),
            kernels.rms_norm(x, bias, 1e-5),
            *kernels.add_rms_norm(x, x.clone(), bias, 1e-5),
            kernels.layer_norm(x, bias, bias, 1e-5),
            *kernels.rope(q.clone(), k.clone(), angles.cos(), angles.sin()),
            kernels.varlen_attention(seen[0], seen[1], seen[2], [900, 3, 197], 0.125),
            kernels.varlen_attention(seen[0], seen[1], seen[2], [900, 3, 197], 0.125, 50),
            kernels.varlen_attention(seen[0].float(), seen[1].float(), seen[2].float(), [900, 3, 197], 0.125),
        ]
        for k_cache, v_cache in ((a.clone(), b.clone()) for a, b in caches):
            kernels.write_kv(k, v, k_cache, v_cache, context.slots)
            results += [
                k_cache,
                v_cache,
                kernels.paged_attention(q, k_cache, v_cache, context, 0.125),
                kernels.paged_attention(q, k_cache, v_cache, context, 0.125, 300),
            ]
        return results

    threads, results = kernels.threads, []
    try:
        for count in (1, 2, 3, 5):
            kernels.set_threads(count)
            results.append(everything())
    finally:
        kernels.set_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_other_dtypes_and_layouts_go_to_the_reference(fastest: Native) -> None:
    assert not fastest.supports(torch.float32, torch.device("cpu"))
    x, weight = torch.randn(3, 8), torch.randn(8)
    assert torch.equal(fastest.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))
    q, k = torch.randn(3, 2, 8), torch.randn(3, 1, 8)
    cos, sin = torch.rand(3, 4), torch.rand(3, 4)
    expected = reference.rope(q, k, cos, sin)
    assert all(torch.equal(a, b) for a, b in zip(fastest.rope(q, k, cos, sin), expected, strict=True))
    assert torch.equal(fastest.activate(x.clone(), "gelu"), reference.activate(x, "gelu"))
    columns = random_bf16(5, 2, 8).transpose(1, 2)  # heads of a token do not lie side by side
    wide = columns.float()
    got = fastest.varlen_attention(columns, columns, columns, [5], 1.0)
    assert_close(got, reference.varlen_attention(wide, wide, wide, [5], 1.0), tolerance=8 * ROUNDING)


def test_an_instruction_set_of_another_machine_is_an_error(fastest: Native) -> None:
    with pytest.raises(OSError, match="neon"):
        native.load("neon")


def test_describe_names_what_runs(fastest: Native) -> None:
    assert fastest.isa in fastest.describe()
    assert native.available()


@pytest.mark.parametrize("shape", [(16, 32), (64, 48), (100, 70), (33, 7), (1, 1), (50, 129), (257, 640)])
def test_weights_in_place_give_the_numbers_of_packed_ones(kernels: Native, shape: tuple[int, int]) -> None:
    """In two parts that lie apart, rows at a distance and at odd addresses, before and after they are packed."""
    n, k = shape
    wide = random_bf16(n, k + 5)
    weight = wide[:, 3 : 3 + k]
    cut = random.Random(n).randrange(n)
    parts = [(0, weight[:cut]), (cut, weight[cut:].clone())]
    form = kernels.mapped_linear(parts, n, k)
    if not kernels.isa.startswith("avx512"):
        assert form is None
        return
    assert isinstance(form, MappedLinear)
    bias = random_bf16(n)
    form.set_bias(bias)
    packed = kernels.pack_linear(weight, bias)
    address, ids = form.address, torch.randint(0, n, (5,))
    for is_packed in (False, True):
        assert (form.mapped_bytes == 0) is is_packed
        for rows in (0, 1, 3, 12, 13, 40, 100):
            x = random_bf16(rows, k)
            assert torch.equal(form(x), packed(x))
        assert torch.equal(form.rows(ids), weight[ids])
        form.pack()
    assert form.address == address
    wide.zero_()
    assert torch.equal(form(x), packed(x))


@pytest.mark.parametrize("shape", [(64, 64), (100, 515), (33, 2050), (32, 1), (5, 2), (7, 3), (70, 1536)])
@pytest.mark.parametrize("unusual", [0.0, 0.001])
def test_compact_weights_lose_nothing(kernels: Native, shape: tuple[int, int], unusual: float) -> None:
    """Also those whose exponents are far from the others', and zeros; in 12 bits each and a little."""
    n, k = shape
    weight = random_bf16(n, k) * 0.02
    odd = torch.rand(n, k) < unusual
    weight[odd] = (torch.randn(n, k) * torch.exp2(torch.randint(-120, 60, (n, k)).float())).to(BF16)[odd]
    weight[torch.rand(n, k) < unusual] = 0.0
    weight[n // 2] = 0.0
    form, packed = in_place(kernels, weight), kernels.pack_linear(weight, None)
    form.pack()
    assert form._exceptions is not None
    if n % 32 == 0 and k > 32:
        assert form.nbytes < packed.nbytes * 0.83
    for rows in (0, 1, 2, 3, 5, 8, 12, 13, 30, 60):
        x = random_bf16(rows, k)
        assert torch.equal(form(x), packed(x))
        assert torch.equal(form(x, torch.float32), packed(x, torch.float32))
    assert torch.equal(form.rows(torch.arange(n)), weight)


def test_compact_weights_keep_every_bit(kernels: Native) -> None:
    """Infinities, NaN with what is in them, negative zeros and what is too small to be normal."""
    bits = random_bf16(96, 1030).view(torch.int16)
    places = torch.randperm(bits.numel())[:300]
    bits.view(-1)[places] = torch.randint(-(2**15), 2**15, (300,), dtype=torch.int16)
    form = in_place(kernels, bits.view(BF16))
    form.pack()
    assert form._exceptions is not None
    assert torch.equal(form.rows(torch.arange(96)).view(torch.int16), bits)


def test_weights_with_too_many_exponents_are_packed_as_they_are(kernels: Native) -> None:
    weight = random_bf16(64, 600)
    weight[40] *= torch.exp2(torch.randint(-60, 60, (600,)).float()).to(BF16)  # one row is enough
    form, packed = in_place(kernels, weight), kernels.pack_linear(weight, None)
    form.pack()
    assert form._exceptions is None
    assert form.nbytes == packed.nbytes
    x = random_bf16(3, 600)
    assert torch.equal(form(x), packed(x))
    assert torch.equal(form.rows(torch.arange(64)), weight)


def test_every_row_in_place_has_a_place(fastest: Native) -> None:
    weight = random_bf16(20, 8)
    for parts in ([(0, weight[:19])], [(0, weight[:, :7])], [(0, weight.float())]):
        if fastest.isa.startswith("avx512"):
            with pytest.raises(ValueError, match=r"row"):
                fastest.mapped_linear(parts, 20, 8)
