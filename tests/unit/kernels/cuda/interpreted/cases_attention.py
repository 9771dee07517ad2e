"""Attention over the paged cache: every slot that must not be read holds NaN, and so does all memory beforehand."""

from __future__ import annotations

import pytest
import torch
from support.triton_interpreter import assert_close
from torch import Tensor

from sensorium.kernels import reference
from sensorium.kernels.context import AttentionContext
from sensorium.kernels.cuda import CudaBackend, attention, launch

CUDA = CudaBackend()
PAGE = 16


class Step:
    """Sequences of `context_lens` keys, `query_lens` of them new; the first `num_decodes` decode."""

    def __init__(
        self,
        query_lens: list[int],
        context_lens: list[int],
        heads: tuple[int, int],
        head_dim: int,
        *,
        num_decodes: int,
        dtype: torch.dtype = torch.float32,
        cache_dtype: torch.dtype | None = None,
        window: int | None = None,
    ) -> None:
        self.window, self.scale = window, head_dim**-0.5
        blocks = [-(-length // PAGE) for length in context_lens]
        order = (torch.randperm(sum(blocks) + 2) + 1).tolist()
        tables = torch.zeros(len(blocks), max(blocks) + 1, dtype=torch.int32)
        slots, cache_dtype = [], cache_dtype or dtype
        width = head_dim + 4 if cache_dtype == torch.int8 else head_dim
        shape = (len(order) + 1, heads[1], PAGE, width)
        wide = torch.full(shape, torch.nan, dtype=dtype)
        self.caches = [wide.clone(), wide.clone()]
        if cache_dtype.itemsize == 1:  # four bytes of -1 are NaN, as a scale of int8 codes, and one is one of fp8
            self.caches = [torch.full(shape, -1, dtype=torch.int8).view(cache_dtype) for _ in range(2)]
        for index, (count, length, new) in enumerate(zip(blocks, context_lens, query_lens, strict=True)):
            tables[index, :count] = torch.tensor([order.pop() for _ in range(count)])
            seen = range(0 if window is None else max(0, length - new + 1 - window), length)
            kept = torch.tensor([int(tables[index, p // PAGE]) * PAGE + p % PAGE for p in seen])
            k, v = (torch.randn(len(seen), heads[1], head_dim).to(dtype) for _ in range(2))
            reference.write_kv(k, v, self.caches[0], self.caches[1], kept)
            slots.append(kept[-new:])
        starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
        lengths = torch.tensor(context_lens, dtype=torch.int32)
        where = torch.cat(slots)
        self.context = AttentionContext(
            query_lens, context_lens, num_decodes, PAGE, starts, lengths, tables, where
        )  # fmt: skip
        qkv = torch.randn(sum(query_lens), heads[0] + 2 * heads[1], head_dim).to(dtype)
        self.q = qkv[:, : heads[0]]  # a view, as models give it

    def check(self, visible: Tensor | None = None, sinks: Tensor | None = None, factor: float = 1.0) -> None:
        assert attention.refusal(self.q, *self.caches) is None
        options = (self.context, self.scale, self.window, visible, sinks)
        got = CUDA.paged_attention(self.q, self.caches[0], self.caches[1], *options)
        expected = reference.paged_attention(self.q, self.caches[0], self.caches[1], *options)
        assert_close(got, expected, factor)


@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 6, 7, 8])
def test_groups_of_queries(group: int) -> None:
    Step([1, 5], [37, 21], (group, 1), 32, num_decodes=1).check()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtypes(dtype: torch.dtype) -> None:
    Step([1, 17], [50, 33], (4, 2), 64, num_decodes=1, dtype=dtype).check()


@pytest.mark.parametrize("head_dim", [8, 40, 80, 96, 128, 256, 512])
def test_head_sizes(head_dim: int) -> None:
    Step([1, 3], [18, 19], (2, 1), head_dim, num_decodes=1).check()


@pytest.mark.parametrize("length", [1, 15, 16, 17, 300])
def test_lengths(length: int) -> None:
    Step([1, length], [length, length], (2, 1), 16, num_decodes=1).check()


def test_many_splits_of_one_long_sequence() -> None:
    Step([1], [16 * 64 + 70], (2, 1), 16, num_decodes=1).check()


@pytest.mark.parametrize("window", [1, 3, 16, 20, 1000])
def test_windows_read_nothing_before_them(window: int) -> None:
    Step([1, 1, 40], [70, 9, 90], (4, 2), 16, num_decodes=2, window=window).check()


@pytest.mark.parametrize("window", [None, 7])
def test_sinks(window: int | None) -> None:
    sinks = torch.tensor([-1.0, 0.5, 6.0, 60.0])
    Step([1, 20], [30, 24], (4, 2), 16, num_decodes=1, window=window).check(sinks=sinks)


def test_tokens_that_see_ahead() -> None:
    step = Step([1, 30], [20, 44], (2, 2), 16, num_decodes=1, window=12)
    own = torch.arange(15, 45, dtype=torch.int32)
    visible = torch.cat([torch.tensor([20], dtype=torch.int32), torch.where((own > 20) & (own < 40), 40, own)])
    step.check(visible.to(torch.int32))


@pytest.mark.parametrize("window", [None, 21])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_cache(dtype: torch.dtype, window: int | None) -> None:
    step = Step([1, 9], [45, 33], (4, 2), 32, num_decodes=1, dtype=dtype, cache_dtype=torch.int8, window=window)
    step.check(factor=2)


@pytest.fixture(params=[80, 90])
def capability(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> int:
    """Of a card that knows numbers of e4m3, and of one that does not."""
    monkeypatch.setattr(launch, "capability", lambda: request.param)
    return int(request.param)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_fp8_cache(capability: int, dtype: torch.dtype) -> None:
    Step([1, 9], [45, 33], (4, 2), 32, num_decodes=1, dtype=dtype, cache_dtype=torch.float8_e4m3fn).check()


@pytest.mark.parametrize(("heads", "head_dim", "window"), [((1, 1), 40, 21), ((7, 1), 64, 7), ((8, 1), 80, None)])
def test_fp8_cache_of_odd_shapes(capability: int, heads: tuple[int, int], head_dim: int, window: int | None) -> None:
    step = Step([1, 1, 20], [60, 5, 40], heads, head_dim, num_decodes=2, cache_dtype=torch.float8_e4m3fn, window=window)
    step.check(sinks=torch.linspace(-1, 3, heads[0]))


def test_a_row_of_no_keys_gets_zeros() -> None:
    """Rows that pad the batch of a graph."""
    step = Step([1, 1], [5, 5], (2, 1), 16, num_decodes=2)
    step.context.seq_lens[1] = 0
    got = CUDA.paged_attention(step.q, step.caches[0], step.caches[1], step.context, step.scale)
    assert got[1].count_nonzero() == 0
    assert got[0].isfinite().all()


def test_programs_that_are_done_leave_no_trace() -> None:
    """The next launch counts from zero, whatever the batch was before."""
    backend = CudaBackend()
    for lengths in ([40, 3, 77], [9]):
        step = Step([1] * len(lengths), lengths, (4, 2), 16, num_decodes=len(lengths))
        options = (step.context, step.scale)
        got = backend.paged_attention(step.q, step.caches[0], step.caches[1], *options)
        assert_close(got, reference.paged_attention(step.q, step.caches[0], step.caches[1], *options))
    arrived = backend._arrivals.of(1, step.q)
    assert arrived is backend._arrivals.of(len(arrived), step.q)
    assert not arrived.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("lengths", [[1, 1], [1, 3]])
def test_gates(lengths: list[int], dtype: torch.dtype) -> None:
    """Of decodes and of prompts, each behind its query."""
    step = Step(lengths, [33, 18], (3, 1), 24, num_decodes=lengths.count(1), dtype=dtype)
    both = torch.randn(sum(lengths), 3, 2, 24).to(dtype)
    q, gates = both.unbind(2)
    arrivals = attention.Arrivals()
    got = attention.paged_attention(q, step.caches[0], step.caches[1], step.context, step.scale, arrivals, gates=gates)
    expected = reference.paged_attention(q, step.caches[0], step.caches[1], step.context, step.scale)
    assert_close(got, expected * gates.sigmoid())


def test_batch_mates_change_nothing() -> None:
    step = Step([1, 1, 1], [200, 3, 77], (4, 2), 16, num_decodes=3)
    together = CUDA.paged_attention(step.q, step.caches[0], step.caches[1], step.context, step.scale)
    one = AttentionContext(
        [1], [77], 1, PAGE, step.context.query_start[:2], step.context.seq_lens[2:], step.context.block_tables[2:],
        step.context.slots[2:],
    )  # fmt: skip
    alone = CUDA.paged_attention(step.q[2:], step.caches[0], step.caches[1], one, step.scale)
    assert torch.equal(alone, together[2:])


def test_what_no_kernel_takes_is_left_to_the_reference() -> None:
    step = Step([1, 3], [18, 19], (2, 1), 6, num_decodes=1, cache_dtype=torch.int8)
    assert attention.refusal(step.q, *step.caches) == "int8 heads of 6 codes, no multiple of 4"
