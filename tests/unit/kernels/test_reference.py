"""The torch kernels against the formulas, token by token and head by head."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from sensorium.kernels import reference
from sensorium.kernels.context import AttentionContext
from sensorium.kernels.reference import attention, fp8

BLOCK = 4


def close(got: Tensor, expected: Tensor) -> bool:
    return bool(torch.allclose(got, expected, atol=1e-5, rtol=1e-5))


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, scale: float, sinks: Tensor | None = None) -> Tensor:
    """One query [heads, dim] over all of k, v [n, kv_heads, dim]."""
    group = q.shape[0] // k.shape[1]
    rows: list[Tensor] = []
    for head in range(q.shape[0]):
        scores = [(q[head] @ k[j, head // group]).item() * scale for j in range(k.shape[0])]
        weights = [math.exp(s - max(scores)) for s in scores]
        more = 0.0 if sinks is None else math.exp(sinks[head].item() - max(scores))
        rows.append(
            torch.stack([w * v[j, head // group] for j, w in enumerate(weights)]).sum(0) / (sum(weights) + more)
        )
    return torch.stack(rows)


class Pages:
    """Sequences of random keys and values written into a cache whose other slots hold NaN."""

    def __init__(self, lengths: list[int], query_lens: list[int], kv_heads: int, dim: int, num_decodes: int) -> None:
        generator = torch.Generator().manual_seed(0)
        self.k = [torch.randn(n, kv_heads, dim, generator=generator) for n in lengths]
        self.v = [torch.randn(n, kv_heads, dim, generator=generator) for n in lengths]
        counts = [-(-n // BLOCK) for n in lengths]
        order = torch.randperm(sum(counts) + 3, generator=generator).tolist()
        self.k_cache = torch.full((len(order), kv_heads, BLOCK, dim), torch.nan)
        self.v_cache = torch.full_like(self.k_cache, torch.nan)
        tables = torch.zeros(len(lengths), max(counts), dtype=torch.int32)
        for i, count in enumerate(counts):
            tables[i, :count] = torch.tensor([order.pop() for _ in range(count)])
            slots = torch.tensor([int(tables[i, p // BLOCK]) * BLOCK + p % BLOCK for p in range(lengths[i])])
            reference.write_kv(self.k[i], self.v[i], self.k_cache, self.v_cache, slots)
        starts = torch.tensor([0, *query_lens]).cumsum(0).to(torch.int32)
        self.context = AttentionContext(
            query_lens=query_lens,
            context_lens=lengths,
            num_decodes=num_decodes,
            block_size=BLOCK,
            query_start=starts,
            seq_lens=torch.tensor(lengths, dtype=torch.int32),
            block_tables=tables,
            slots=torch.empty(0, dtype=torch.int64),
        )
        self.q = torch.randn(sum(query_lens), 4, dim, generator=generator)

    def expected(
        self, scale: float, window: int | None, span: tuple[int, int] = (0, 0), sinks: Tensor | None = None
    ) -> Tensor:
        """With tokens [first, last) of every sequence that see one another."""
        rows, at = [], 0
        for i, count in enumerate(self.context.query_lens):
            for j in range(count):
                last = self.context.context_lens[i] - count + j + 1
                first = 0 if window is None else max(0, last - window)
                if span[0] < last <= span[1]:
                    last = span[1]
                rows.append(softmax_attention(self.q[at], self.k[i][first:last], self.v[i][first:last], scale, sinks))
                at += 1
        return torch.stack(rows)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("window", [None, 1, 3, 6, 100])
@pytest.mark.parametrize(
    ("lengths", "query_lens", "num_decodes"),
    [
        ([7, 1, 12, 4], [1, 1, 1, 1], 4),  # decodes only, one of them with nothing before it
        ([9], [9], 0),  # a whole prompt
        ([9, 5], [4, 5], 0),  # a later chunk and a whole prompt
        ([6, 11, 8, 1], [1, 1, 3, 1], 2),  # everything; a prompt of one token is a prefill
    ],
)
def test_paged_attention(
    lengths: list[int], query_lens: list[int], num_decodes: int, window: int | None, kv_heads: int
) -> None:
    pages = Pages(lengths, query_lens, kv_heads, 8, num_decodes)
    got = reference.paged_attention(pages.q, pages.k_cache, pages.v_cache, pages.context, 0.3, window)
    assert close(got, pages.expected(0.3, window))


@pytest.mark.parametrize("window", [None, 1, 3, 6])
@pytest.mark.parametrize("span", [(2, 9), (0, 6), (6, 7)])
def test_spans_that_see_all_of_themselves(
    window: int | None, span: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    pages = Pages([6, 11, 9], [1, 9, 9], 2, 8, 1)
    own = torch.cat([torch.tensor([6]), torch.arange(2, 11) + 1, torch.arange(9) + 1]).to(torch.int32)
    inside = (own > span[0]) & (own <= span[1])
    inside[0] = False  # it decodes
    visible = torch.where(inside, torch.tensor(span[1], dtype=torch.int32), own)
    for elements in (attention.MASK_ELEMENTS, 2 * 11):  # at once, and two queries at a time
        monkeypatch.setattr(attention, "MASK_ELEMENTS", elements)
        got = reference.paged_attention(pages.q, pages.k_cache, pages.v_cache, pages.context, 0.3, window, visible)
        expected = pages.expected(0.3, window, span)
        assert close(got[1:], expected[1:])
        assert close(got[:1], pages.expected(0.3, window)[:1])


@pytest.mark.parametrize("window", [None, 1, 6])
def test_sinks(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    pages, sinks = Pages([6, 11, 9], [1, 4, 9], 2, 8, 1), torch.tensor([0.3, -4.0, 2.0, 5.0])
    for elements in (attention.MASK_ELEMENTS, 2 * 11 * 4):  # at once, and two queries at a time
        monkeypatch.setattr(attention, "MASK_ELEMENTS", elements)
        got = reference.paged_attention(pages.q, pages.k_cache, pages.v_cache, pages.context, 0.3, window, None, sinks)
        assert close(got, pages.expected(0.3, window, sinks=sinks))


def test_a_cache_of_fp8() -> None:
    """Its numbers are the nearest of e4m3, of at most 448, and attention is that of these numbers."""
    pages = Pages([6, 11, 9], [1, 4, 9], 2, 8, 1)
    narrow = [torch.full(pages.k_cache.shape, torch.nan).to(fp8.E4M3) for _ in range(2)]
    for i, length in enumerate(pages.context.context_lens):
        slots = torch.tensor(
            [int(pages.context.block_tables[i, p // BLOCK]) * BLOCK + p % BLOCK for p in range(length)]
        )
        pages.k[i][0, 0] *= 1000
        reference.write_kv(pages.k[i], pages.v[i], narrow[0], narrow[1], slots)
        pages.k[i], pages.v[i] = (x.clamp(-448, 448).to(fp8.E4M3).float() for x in (pages.k[i], pages.v[i]))
    for window in (None, 3):
        got = reference.paged_attention(pages.q, narrow[0], narrow[1], pages.context, 0.3, window)
        assert close(got, pages.expected(0.3, window))


def test_paged_attention_in_bounded_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention, "GATHER_ELEMENTS", 2 * 12 * 2 * 8)  # two of the longest sequences at a time
    monkeypatch.setattr(attention, "MASK_ELEMENTS", 2 * 20)  # two queries at a time
    pages = Pages([7, 12, 3, 20, 9], [1, 1, 1, 7, 5], 2, 8, 3)
    for window in (None, 4):
        got = reference.paged_attention(pages.q, pages.k_cache, pages.v_cache, pages.context, 0.3, window)
        assert close(got, pages.expected(0.3, window))


@pytest.mark.parametrize("lengths", [[5], [3, 3], [4, 1, 6]])
def test_varlen_attention(lengths: list[int]) -> None:
    torch.manual_seed(0)
    fused = torch.randn(sum(lengths), 3, 4, 8)  # strided, as towers give it
    q, k, v = fused.unbind(1)
    rows, at = [], 0
    for length in lengths:
        run = slice(at, at + length)
        rows += [softmax_attention(q[i], k[run], v[run], 0.2) for i in range(at, at + length)]
        at += length
    assert close(reference.varlen_attention(q, k, v, lengths, 0.2), torch.stack(rows))


def test_write_kv_touches_only_its_slots() -> None:
    k, v = torch.randn(3, 5, 6), torch.randn(3, 5, 6)
    k_cache, v_cache = torch.zeros(3, 5, 4, 6), torch.zeros(3, 5, 4, 6)
    reference.write_kv(k, v, k_cache, v_cache, torch.tensor([11, 0, 6]))
    for i, (block, offset) in enumerate([(2, 3), (0, 0), (1, 2)]):
        assert torch.equal(k_cache[block, :, offset], k[i])
        assert torch.equal(v_cache[block, :, offset], v[i])
    assert k_cache.abs().sum().item() == pytest.approx(k.abs().sum().item())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_norms(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x, residual, weight = torch.randn(3, 16).to(dtype), torch.randn(3, 16).to(dtype), torch.randn(16).to(dtype)
    total = x + residual
    wide = total.double()
    expected = (wide / (wide.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight.double()).to(dtype)
    normed, summed = reference.add_rms_norm(x, residual, weight, 1e-3)
    assert torch.equal(summed, total)
    assert normed.dtype == dtype
    assert torch.allclose(normed.double(), expected.double(), rtol=2 * torch.finfo(dtype).eps, atol=1e-5)
    assert torch.equal(reference.rms_norm(total, weight, 1e-3), normed)


def test_silu_mul() -> None:
    x = torch.randn(3, 10)
    gate, up = x[:, :5], x[:, 5:]
    assert close(reference.silu_mul(x), gate / (1 + torch.exp(-gate)) * up)


@pytest.mark.parametrize("rotated", [4, 8])
def test_rope_turns_pairs_that_are_half_a_head_apart(rotated: int) -> None:
    torch.manual_seed(0)
    fused = torch.randn(3, 6, 8)
    q, k = fused[:, :4], fused[:, 4:]
    angles = torch.randn(3, rotated // 2)
    expected = fused.clone()
    for token in range(3):
        for i in range(rotated // 2):
            cos, sin = math.cos(angles[token, i]), math.sin(angles[token, i])
            a, b = fused[token, :, i].clone(), fused[token, :, i + rotated // 2].clone()
            expected[token, :, i] = a * cos - b * sin
            expected[token, :, i + rotated // 2] = b * cos + a * sin
    out_q, out_k = reference.rope(q, k, angles.cos(), angles.sin())
    assert close(torch.cat([out_q, out_k], dim=1), expected)


def test_plain_linear() -> None:
    weight, bias, x = torch.randn(5, 3), torch.randn(5), torch.randn(2, 4, 3)
    form = reference.empty_linear(5, 3, dtype=torch.float32, device=torch.device("cpu"))
    form.fill(2, weight[2:])
    form.fill(0, weight[:2])
    form.set_bias(bias)
    assert close(form(x), torch.einsum("abi,oi->abo", x, weight) + bias)
    assert torch.equal(form.rows(torch.tensor([4, 0])), weight[[4, 0]])
    assert form.nbytes == (15 + 5) * 4
