"""Norms, activations, rotation, the writing of the cache, and a decoder's layers that are made of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.triton_interpreter import assert_close
from torch import Tensor
from torch.nn import functional

from sensorium import kernels
from sensorium.checkpoint.families import FAMILIES
from sensorium.checkpoint.text_config import read_text_config
from sensorium.kernels import Activation, DecoderLayerParts, reference
from sensorium.kernels.context import AttentionContext, LayerCache
from sensorium.kernels.cuda import CudaBackend
from sensorium.kernels.cuda import norms as cuda_norms
from sensorium.kernels.cuda import rope as cuda_rope
from sensorium.models.gemma4 import Gemma4Decoder, Gemma4Layer
from sensorium.models.layers import Linear

CUDA = CudaBackend()
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FP8 = torch.float8_e4m3fn


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
@pytest.mark.parametrize("shape", [(3, 64), (2, 5, 33), (1, 3000)])
def test_rms_norm(shape: tuple[int, ...], offset: float, dtype: torch.dtype) -> None:
    x, weight = torch.randn(shape).to(dtype), torch.randn(shape[-1]).to(dtype)
    assert_close(CUDA.rms_norm(x, weight, 1e-6, offset), reference.rms_norm(x, weight, 1e-6, offset))


def test_rms_norm_of_rows_that_are_not_adjacent() -> None:
    x, weight = torch.randn(4, 80)[:, :33], torch.randn(33)
    assert_close(CUDA.rms_norm(x, weight, 1e-6), reference.rms_norm(x, weight, 1e-6))
    assert_close(CUDA.rms_norm(x.t(), weight[:4], 1e-6), reference.rms_norm(x.t(), weight[:4], 1e-6))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_add_rms_norm(offset: float, dtype: torch.dtype) -> None:
    x, residual, weight = (torch.randn(size).to(dtype) for size in ((5, 48), (5, 48), (48,)))
    expected = reference.add_rms_norm(x, residual, weight, 1e-5, offset)
    got = CUDA.add_rms_norm(x, residual.clone(), weight, 1e-5, offset)
    for one, other in zip(got, expected, strict=True):
        assert_close(one, other)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [0.0, 1.0])
def test_a_norm_before_the_sum(offset: float, dtype: torch.dtype) -> None:
    x, residual, first, weight = (torch.randn(size).to(dtype) for size in ((5, 40), (5, 40), (40,), (40,)))
    expected = reference.add_rms_norm(reference.rms_norm(x, first, 1e-5, offset), residual, weight, 1e-5, offset)
    factor = torch.tensor([0.75]).to(dtype)
    total = expected[1] * factor
    expected = reference.rms_norm(total, weight, 1e-5, offset), total
    wide = torch.empty(5, 40)
    got = cuda_norms.add_rms_norm(x, residual.clone(), weight, 1e-5, offset, first, wide, factor)
    for one, other in zip(got, expected, strict=True):
        assert_close(one, other, 2)
    assert torch.equal(wide, got[0].float())


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", [*cuda_norms.PLAIN, "clamped_swiglu"])
def test_gated(activation: Activation, dtype: torch.dtype) -> None:
    x = (4 * torch.randn(3, 2 * 37)).to(dtype)
    assert_close(CUDA.gated(x, activation), reference.gated(x, activation), 4)


@pytest.mark.parametrize("activation", cuda_norms.PLAIN)
def test_activate(activation: Activation) -> None:
    x = 3 * torch.randn(2, 700)
    assert_close(CUDA.activate(x.clone(), activation), reference.activate(x, activation), 2)
    huge = torch.tensor([[-1e4, -100.0, 0.0, 100.0, 1e4]])
    assert_close(CUDA.activate(huge.clone(), activation), reference.activate(huge, activation))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("tokens", "is_plain"), [(3, True), (3, False), (17, True)])
def test_what_a_layer_adds_of_the_tokens_themselves(tokens: int, is_plain: bool, dtype: torch.dtype) -> None:
    """In one launch of few tokens and a plain weight."""
    x, residual, first = (torch.randn(size).to(dtype) for size in ((tokens, 72), (tokens, 72), (72,)))
    gate = reference.PlainLinear((torch.randn(21, 72) * 72**-0.5).to(dtype))
    gate.set_bias(None if is_plain else torch.zeros(21))
    rows = torch.randn(tokens, 2, 21).to(dtype)[:, 1]
    total = residual + reference.rms_norm(x, first, 1e-6)
    expected = reference.activate(gate(total), "gelu_tanh") * rows
    got = cuda_norms.token_gates(x, residual, first, gate, rows, 1e-6, "gelu_tanh")
    assert_close(got[0], expected, 4)
    assert_close(got[1], total, 2)


def turns(tokens: int, half: int) -> tuple[Tensor, Tensor]:
    angles = 10 * torch.randn(tokens, half)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "rotated"), [(8, 8), (64, 64), (80, 32), (96, 96), (12, 4)])
def test_rope(head_dim: int, rotated: int, dtype: torch.dtype) -> None:
    heads = torch.randn(3, 9, head_dim).to(dtype)
    q, k = heads[:, :5], heads[:, 5:7]
    cos, sin = turns(3, rotated // 2)
    expected = reference.rope(q, k, cos, sin)
    before = heads[:, 7:].clone()
    got = CUDA.rope(q, k, cos, sin)
    for one, other in zip(got, expected, strict=True):
        assert_close(one, other)
    assert torch.equal(heads[:, 7:], before)


def test_rope_without_keys() -> None:
    q = torch.randn(2, 3, 16)
    cos, sin = turns(2, 8)
    expected, _ = reference.rope(q, q[:, :0], cos, sin)
    assert_close(CUDA.rope(q, q[:, :0], cos, sin)[0], expected)


def scales_of(cache: Tensor) -> Tensor:
    """The float32 behind the codes of each row."""
    return cache[..., -4:].contiguous().view(torch.float32)


class Cache:
    """The same two caches twice, NaN all over, and where three tokens go."""

    def __init__(self, kv_heads: int, head_dim: int, dtype: torch.dtype) -> None:
        width = head_dim + 4 if dtype == torch.int8 else head_dim
        self.own, self.expected = (
            [torch.zeros(4, kv_heads, 8, width, dtype=torch.uint8).sub_(1).repeat(1, 1, 1, dtype.itemsize).view(dtype)
             for _ in range(2)]
            for _ in range(2)
        )  # fmt: skip
        self.slots = torch.tensor([25, 3, 14])

    def check(self) -> None:
        within = {2: 2e-2}.get(self.own[0].dtype.itemsize, 1e-5)
        pairs = list(zip(self.own, self.expected, strict=True))
        if self.own[0].dtype == FP8:
            self.check_fp8()
            return
        if self.own[0].dtype == torch.int8:
            for own, expected in pairs:
                codes = (own[..., :-4].int() - expected[..., :-4].int()).abs()
                assert codes.max() <= 1
                assert codes.count_nonzero() <= codes.numel() // 100
            pairs = [(scales_of(own), scales_of(expected)) for own, expected in pairs]
        for own, expected in pairs:
            untouched = expected.float().isnan()
            assert torch.equal(untouched, own.float().isnan())
            kept = [x.float()[~untouched] for x in (own, expected)]
            torch.testing.assert_close(*kept, atol=within, rtol=within)

    def check_fp8(self) -> None:
        """The numbers of the reference, but where a rotation's last bits move one to the next one."""
        for own, expected in zip(self.own, self.expected, strict=True):
            kept = own.float(), expected.float()
            torch.testing.assert_close(*kept, atol=2e-2, rtol=0.13, equal_nan=True)
            assert (kept[0] != kept[1])[~kept[1].isnan()].float().mean() < 0.05


@pytest.mark.parametrize(
    ("dtype", "cache_dtype"),
    [(one, one) for one in DTYPES]
    + [(torch.float32, torch.int8), (torch.bfloat16, torch.int8)]
    + [(one, FP8) for one in DTYPES],
)
@pytest.mark.parametrize(("kv_heads", "head_dim"), [(1, 80), (3, 32)])
def test_write_kv(kv_heads: int, head_dim: int, dtype: torch.dtype, cache_dtype: torch.dtype) -> None:
    cache = Cache(kv_heads, head_dim, cache_dtype)
    k, v = torch.randn(3, 2 * kv_heads, head_dim).to(dtype).chunk(2, dim=1)
    v[1] = 0  # a row without a scale
    reference.write_kv(k, v, cache.expected[0], cache.expected[1], cache.slots)
    CUDA.write_kv(k, v, cache.own[0], cache.own[1], cache.slots)
    cache.check()


def test_bytes_of_fp8_are_those_of_torch() -> None:
    """Every number of e4m3, the middle of every two, what lies beside it, and what is beyond or no number."""
    codes = torch.arange(127, dtype=torch.uint8).view(FP8).float()
    middles = (codes[1:] + codes[:-1]) / 2
    near = [torch.nextafter(middles, torch.tensor(way)) for way in (0.0, 1e9)]
    odd = torch.tensor([448.1, 464.0, 1e9, torch.inf, torch.nan, 1e-30, 2.0**-10, 1e-45])
    numbers = torch.cat([codes, middles, *near, odd])
    numbers = torch.cat([numbers, -numbers])
    k = functional.pad(numbers, (0, -len(numbers) % 48)).view(-1, 3, 16)
    slots = torch.arange(len(k))
    own, expected = (
        [torch.zeros(-(-len(k) // 8), 3, 8, 16, dtype=torch.uint8).view(FP8) for _ in range(2)] for _ in range(2)
    )
    reference.write_kv(k, -k, expected[0], expected[1], slots)
    CUDA.write_kv(k, -k, own[0], own[1], slots)
    for one, other in zip(own, expected, strict=True):
        same = (one.view(torch.uint8) == other.view(torch.uint8)) | (one.float().isnan() & other.float().isnan())
        assert same.all()


@pytest.mark.parametrize(
    ("dtype", "cache_dtype"),
    [(torch.float32, torch.float32), (torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16),
     (torch.float32, torch.int8), (torch.float32, FP8), (torch.float16, FP8)],
)  # fmt: skip
@pytest.mark.parametrize(("head_dim", "rotated", "offset"), [(32, 32, 0.0), (80, 20, 1.0), (24, 24, None)])
def test_norms_rotation_and_cache_in_one(
    head_dim: int, rotated: int, offset: float | None, dtype: torch.dtype, cache_dtype: torch.dtype
) -> None:
    cache = Cache(2, head_dim, cache_dtype)
    heads = torch.randn(3, 7 + 4, head_dim).to(dtype)
    q, k, v = torch.split(heads, [7, 2, 2], dim=1)
    cos, sin = turns(3, rotated // 2)
    norms = None if offset is None else (torch.randn(head_dim).to(dtype), torch.randn(head_dim).to(dtype))
    wanted_q, wanted_k = q.contiguous(), k.contiguous()
    if norms is not None:
        wanted_q, wanted_k = (
            reference.rms_norm(x, w, 1e-6, offset or 0.0) for x, w in zip((wanted_q, wanted_k), norms, strict=True)
        )
    wanted_q, wanted_k = reference.rope(wanted_q, wanted_k, cos, sin)
    reference.write_kv(wanted_k, v, cache.expected[0], cache.expected[1], cache.slots)
    cuda_rope.rotate_and_write(
        q, k, v, cos, sin, norms, 1e-6, offset or 0.0, LayerCache(cache.own[0], cache.own[1]), cache.slots
    )
    assert_close(q, wanted_q)
    cache.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "rotated", "has_norms"), [(32, 32, True), (24, 12, False), (20, 12, True)])
def test_rotation_in_pairs(head_dim: int, rotated: int, has_norms: bool, dtype: torch.dtype) -> None:
    """As the reference does it with the first of each pair in front."""
    cache, pairs = Cache(2, head_dim, dtype), rotated // 2
    heads = torch.randn(3, 5 + 4, head_dim).to(dtype)
    q, k, v = torch.split(heads, [5, 2, 2], dim=1)
    cos, sin = turns(3, pairs)
    norms = (torch.randn(head_dim).to(dtype), torch.randn(head_dim).to(dtype)) if has_norms else None
    wanted = [q.contiguous(), k.contiguous()]
    if norms is not None:
        wanted = [reference.rms_norm(x, w, 1e-6) for x, w in zip(wanted, norms, strict=True)]
    order = [*range(0, rotated, 2), *range(1, rotated, 2), *range(rotated, head_dim)]
    wanted_q, wanted_k = reference.rope(wanted[0][..., order], wanted[1][..., order], cos, sin)
    reference.write_kv(wanted_k, v, cache.expected[0], cache.expected[1], cache.slots)
    cuda_rope.rotate_and_write(
        q, k, v, cos, sin, norms, 1e-6, 0.0, LayerCache(cache.own[0], cache.own[1]), cache.slots, is_paired=True
    )
    assert_close(q, wanted_q)
    cache.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "rotated"), [(32, 32), (20, 12)])
def test_norms_of_all_heads_together(head_dim: int, rotated: int, dtype: torch.dtype) -> None:
    """Queries go elsewhere: what one program writes others still have to read."""
    cache = Cache(2, head_dim, dtype)
    heads = torch.randn(3, 5 + 4, head_dim).to(dtype)
    q, k, v = torch.split(heads, [5, 2, 2], dim=1)
    cos, sin = turns(3, rotated // 2)
    norms = (torch.randn(5 * head_dim).to(dtype), torch.randn(2 * head_dim).to(dtype))
    wanted = [reference.rms_norm(x.flatten(1), w, 1e-6).view(x.shape) for x, w in zip((q, k), norms, strict=True)]
    wanted_q, wanted_k = reference.rope(wanted[0], wanted[1], cos, sin)
    reference.write_kv(wanted_k, v, cache.expected[0], cache.expected[1], cache.slots)
    before = heads.clone()
    got = cuda_rope.rotate_and_write(
        q, k, v, cos, sin, norms, 1e-6, 0.0, LayerCache(cache.own[0], cache.own[1]), cache.slots, norms_whole=True
    )
    assert_close(got, wanted_q, 2)
    assert torch.equal(heads, before)
    cache.check()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("writes", [False, True])
def test_scaled_queries_normed_values_and_no_keys(writes: bool, dtype: torch.dtype) -> None:
    """Without keys of its own a layer leaves the cache as it is."""
    cache = Cache(2, 24, dtype)
    heads = torch.randn(3, 5 + 4, 24).to(dtype)
    q, k, v = torch.split(heads, [5, 2, 2], dim=1)
    cos, sin = turns(3, 12)
    scales = torch.tensor([1.0, 1.069, 1.33])
    wanted_q, wanted_k = reference.rope(q, k, cos, sin)
    if writes:
        normed = reference.rms_norm(v, torch.ones(24, dtype=dtype), 1e-6)
        reference.write_kv(wanted_k, normed, cache.expected[0], cache.expected[1], cache.slots)
    got = cuda_rope.rotate_and_write(
        q, k, v, cos, sin, None, 1e-6, 0.0, LayerCache(cache.own[0], cache.own[1]), cache.slots, norms_values=True,
        writes=writes, scales=scales,
    )  # fmt: skip
    assert_close(got, wanted_q * scales.to(dtype).view(-1, 1, 1), 2)
    cache.check()


def layer(hidden: int, heads: int, kv_heads: int, head_dim: int, *, sublayers: bool) -> DecoderLayerParts:
    def linear(out: int, of: int) -> reference.PlainLinear:
        return reference.PlainLinear(torch.randn(out, of) * of**-0.5)

    def norm(size: int) -> Tensor:
        return 1 + 0.1 * torch.randn(size)

    return DecoderLayerParts(
        input_norm=norm(hidden),
        qkv=linear((heads + 2 * kv_heads) * head_dim, hidden),
        q_norm=norm(head_dim) if sublayers else None,
        k_norm=norm(head_dim) if sublayers else None,
        o=linear(hidden, heads * head_dim),
        mlp_norm=norm(hidden),
        gate_up=linear(48, hidden),
        down=linear(hidden, 24),
        sliding_window=2 if sublayers else None,
        attended_norm=norm(hidden) if sublayers else None,
        after_norm=norm(hidden) if sublayers else None,
    )


def by_reference(
    layers: list[DecoderLayerParts], norm: Tensor, x: Tensor, turn: tuple[Tensor, Tensor], caches: list[LayerCache],
    context: AttentionContext, widths: list[int],
) -> Tensor:  # fmt: skip
    """Layers of head_dim 8 in torch."""
    for parts, cache in zip(layers, caches, strict=True):
        heads = parts.qkv(reference.rms_norm(x, parts.input_norm, 1e-6)).view(len(x), -1, 8)
        q, k, v = torch.split(heads, widths, dim=1)
        if parts.q_norm is not None and parts.k_norm is not None:
            q, k = reference.rms_norm(q, parts.q_norm, 1e-6), reference.rms_norm(k, parts.k_norm, 1e-6)
        q, k = reference.rope(q, k, *turn)
        reference.write_kv(k, v, cache.keys, cache.values, context.slots)
        out = reference.paged_attention(q, cache.keys, cache.values, context, 0.3, parts.sliding_window)
        out = parts.o(out.flatten(1))
        x = x + (out if parts.attended_norm is None else reference.rms_norm(out, parts.attended_norm, 1e-6))
        assert parts.down is not None and parts.gate_up is not None
        out = parts.down(reference.gated(parts.gate_up(reference.rms_norm(x, parts.mlp_norm, 1e-6)), "silu"))
        x = x + (out if parts.after_norm is None else reference.rms_norm(out, parts.after_norm, 1e-6))
    return reference.rms_norm(x, norm, 1e-6)


@pytest.mark.parametrize("sublayers", [False, True])
def test_layers_of_a_decoder(sublayers: bool) -> None:
    layers, norm = [layer(20, 2, 1, 8, sublayers=sublayers) for _ in range(2)], torch.randn(20)
    tables = torch.tensor([[3, 0], [1, 2]], dtype=torch.int32)
    context = AttentionContext(
        [1, 3], [1, 3], 1, 8, torch.tensor([0, 1, 4], dtype=torch.int32), torch.tensor([1, 3], dtype=torch.int32),
        tables, torch.tensor([24, 8, 9, 10]),
    )  # fmt: skip
    own, other = (
        [LayerCache(torch.full((4, 1, 8, 8), torch.nan), torch.full((4, 1, 8, 8), torch.nan)) for _ in layers]
        for _ in range(2)
    )
    caches: Any = own
    hidden, turn = torch.randn(4, 20), turns(4, 4)
    stack = CUDA.decoder_stack(
        layers, norm, num_heads=2, num_kv_heads=1, head_dim=8, scale=0.3, eps=1e-6, activation="silu", norm_offset=0.0
    )
    assert stack is not None
    before = hidden.clone()
    expected = by_reference(layers, norm, hidden, turn, other, context, [2, 1, 1])
    assert_close(stack(hidden, [turn], caches, context), expected, 10)
    assert torch.equal(hidden, before)
    some = torch.tensor([0, 3])
    assert_close(stack(hidden, [turn], caches, context, some)[some], expected[some], 10)


TINY_GEMMA4: dict[str, Any] = {
    "model_type": "gemma4_text", "vocab_size": 40, "vocab_size_per_layer_input": 40, "hidden_size": 24,
    "intermediate_size": 20, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8,
    "global_head_dim": 16, "sliding_window": 2, "hidden_size_per_layer_input": 12, "num_kv_shared_layers": 2,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
}  # fmt: skip

WITH_EXPERTS = {"enable_moe_block": True, "num_experts": 3, "top_k_experts": 2, "moe_intermediate_size": 20}


def tiny_gemma4(**options: Any) -> Gemma4Decoder:
    """Random weights, all norms near 1."""
    with torch.device("meta"):
        made = Gemma4Decoder(read_text_config({**TINY_GEMMA4, **options}, FAMILIES["Gemma4ForCausalLM"]))
    for module in made.modules():
        if isinstance(module, Linear):
            module.pack(torch.randn(module.out_features, module.in_features) * module.in_features**-0.5, None)
        for name, one in list(module.named_parameters(recurse=False)):
            setattr(module, name, torch.nn.Parameter(1 + 0.2 * torch.randn(one.shape), requires_grad=False))
    return made


@pytest.mark.parametrize("kind", ["large", "small", "experts", "experts of other weights"])
def test_layers_of_gemma4(monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """A decode and a run, with heads of two sizes: of small models the last two layers read the others' keys, and all
    add rows, of large ones keys are values; and of large ones with experts beside the MLP, whose weights these kernels
    read with it or do not."""
    large: dict[str, Any] = {
        "num_kv_shared_layers": 0, "hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "num_hidden_layers": 2,
        "num_global_key_value_heads": 1, "layer_types": TINY_GEMMA4["layer_types"][:2],
    }  # fmt: skip
    is_small, has_experts = kind == "small", kind.startswith("experts")
    decoder = tiny_gemma4(**({} if is_small else large), **(WITH_EXPERTS if has_experts else {}))
    if has_experts:
        experts = reference.experts if kind != "experts" else CUDA.experts
        monkeypatch.setattr(kernels, "experts", experts)
    tables, slots = torch.tensor([[3, 0], [1, 2]], dtype=torch.int32), torch.tensor([24, 8, 9, 10])
    context = AttentionContext(
        [1, 3], [1, 3], 1, 8, torch.tensor([0, 1, 4], dtype=torch.int32), torch.tensor([1, 3], dtype=torch.int32),
        tables, slots, token_ids=torch.tensor([3, 9, 0, 39]),
    )  # fmt: skip
    hidden, positions, found = torch.randn(4, 24), torch.tensor([0, 0, 1, 2]), []
    assert decoder.stack is None  # the CPU's
    layers = [layer for layer in decoder.layers if isinstance(layer, Gemma4Layer)]
    parts = [layer.parts(place) for layer, place in zip(layers, decoder.rotation_of, strict=True)]
    assert [one is not None and one.token_rows is not None for one in parts] == [is_small] * len(layers)
    assert [one is not None and one.routed is not None for one in parts] == [has_experts] * len(layers)
    stack = CUDA.decoder_stack(
        [one for one in parts if one is not None], decoder.norm.weight, num_heads=2, num_kv_heads=1, head_dim=8,
        scale=decoder.scale, eps=decoder.norm.eps, norm_offset=0.0, activation=decoder.activation,
    )  # fmt: skip
    for computing in (None, stack):
        vars(decoder)["stack"] = computing
        own = [LayerCache(*torch.full((2, 4, 1, 8, size), torch.nan)) for size in (8, 16)]
        found.append(decoder(hidden, positions, own * (len(layers) // 2), context))
    assert_close(found[1], found[0], 10)


def test_experts_and_rows_of_the_tokens_are_no_stack() -> None:
    """No model has both in a layer; what a config can say is computed all the same."""
    decoder = tiny_gemma4(**WITH_EXPERTS)
    parts = [layer.parts(0) for layer in decoder.layers if isinstance(layer, Gemma4Layer)]
    stack = CUDA.decoder_stack(
        [one for one in parts if one is not None], decoder.norm.weight, num_heads=2, num_kv_heads=1, head_dim=8,
        scale=decoder.scale, eps=decoder.norm.eps, norm_offset=0.0, activation=decoder.activation,
    )  # fmt: skip
    assert (len(parts), stack) == (4, None)
