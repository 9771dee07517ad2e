"""`python -m sensorium.kernels.cuda.build --arch 80,89,90`: compiles the kernels into Triton's cache, without a GPU.

The cache is the folder of TRITON_CACHE_DIR, or ~/.triton/cache; it can be shipped in an image with the same Triton.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from sensorium.kernels.backend import Activation, DecoderLayerParts, Draws, Edits, LowRank, Quantization, TokenGroups
from sensorium.kernels.context import AttentionContext, LayerCache
from sensorium.kernels.cuda.backend import CudaBackend
from sensorium.kernels.cuda.compiling import Usage, compiled, compiling_for, usage
from sensorium.kernels.cuda.device import (
    adapters,
    attention,
    experts,
    fp8,
    linear,
    logits,
    norms,
    rope,
    sampling,
    states,
)
from sensorium.kernels.cuda.launch import has_fp8
from sensorium.kernels.reference import PlainLinear, QuantizedLinear

DTYPES = {name: getattr(torch, name) for name in ("bfloat16", "float16", "float32", "int8", "float8_e4m3fn")}
RUNS = (1, 4096)  # tokens of a prompt, for the tiles of each size
RANKS = (8, 64)  # of adapters, for the tiles of each size


@dataclasses.dataclass(frozen=True, slots=True)
class Shape:
    """What the variants of a decoder's kernels depend on."""

    heads: int
    kv_heads: int
    head_dim: int
    hidden: int
    intermediate: int
    rotated: int | None = None  # numbers of a head that turn; None: all
    dtype: str = "bfloat16"
    cache_dtype: str | None = None  # None: `dtype`
    has_qk_norms: bool = False
    has_sinks: bool = False
    sees_ahead: bool = False  # tokens of media see each other both ways
    norm_offset: float = 0.0
    activation: Activation = "silu"
    block_size: int = 16
    vocab: int = 151936
    experts: int = 0  # of a layer that routes, each of `intermediate`
    per_token: int = 1
    has_expert_biases: bool = False
    bits: Literal[4, 8] | None = None  # of weights in codes, 4 or 8; of a layer that routes those of experts alone
    group: int = 64  # inputs that share a scale of 4 bits, or of fp8 (0: all)
    floats: bool = False  # of 8 bits fp8, of 4 mxfp4

    @property
    def form(self) -> Quantization | None:
        """Of weights in codes."""
        if self.bits is None:
            return None
        is_int8 = self.bits == 8 and not self.floats
        return Quantization(8) if is_int8 else Quantization(self.bits, self.group, floats=self.floats)


SHAPES = {
    "qwen2-2b": Shape(12, 2, 128, 1536, 8960),
    "qwen2-7b": Shape(28, 4, 128, 3584, 18944),
    "qwen3-8b": Shape(32, 8, 128, 4096, 12288, has_qk_norms=True),
    "llama-1b": Shape(32, 8, 64, 2048, 8192),
    "llama-8b": Shape(32, 8, 128, 4096, 14336),
    "phi-3": Shape(32, 32, 96, 3072, 8192),
    "gemma3-4b": Shape(
        8, 4, 256, 2560, 10240, has_qk_norms=True, sees_ahead=True, norm_offset=1.0, activation="gelu_tanh"
    ),
    "gpt-oss": Shape(
        64,
        8,
        64,
        2880,
        2880,
        has_sinks=True,
        activation="clamped_swiglu",
        experts=32,
        per_token=4,
        has_expert_biases=True,
        bits=4,
        group=32,
        floats=True,
    ),
    "qwen3-30b-a3b": Shape(32, 4, 128, 2048, 768, has_qk_norms=True, experts=128, per_token=8),
    "qwen3-30b-a3b-w4": Shape(32, 4, 128, 2048, 768, has_qk_norms=True, experts=128, per_token=8, bits=4, group=128),
    "qwen3-30b-a3b-w8": Shape(32, 4, 128, 2048, 768, has_qk_norms=True, experts=128, per_token=8, bits=8),
    "qwen3-30b-a3b-fp8": Shape(
        32, 4, 128, 2048, 768, has_qk_norms=True, experts=128, per_token=8, bits=8, group=128, floats=True
    ),
    "gemma4-26b-w4": Shape(16, 8, 256, 2816, 704, activation="gelu_tanh", experts=128, per_token=8, bits=4),
    "qwen2-7b-int8": Shape(28, 4, 128, 3584, 18944, cache_dtype="int8"),
    "qwen2-7b-kv-fp8": Shape(28, 4, 128, 3584, 18944, cache_dtype="float8_e4m3fn"),
    "qwen2-7b-w4": Shape(28, 4, 128, 3584, 18944, bits=4, group=128),
    "qwen2-7b-w8": Shape(28, 4, 128, 3584, 18944, bits=8),
    "qwen2-7b-fp8": Shape(28, 4, 128, 3584, 18944, bits=8, group=0, floats=True),
    "qwen3-8b-fp8": Shape(32, 8, 128, 4096, 12288, has_qk_norms=True, bits=8, group=128, floats=True),
}
"""Of decoders that are served. Others are compiled when they are first needed."""


def functions() -> list[Any]:
    """All that is compiled."""
    found = [
        value
        for module in (adapters, attention, experts, fp8, linear, logits, norms, rope, sampling, states)
        for value in vars(module).values()
    ]
    return [*dict.fromkeys(one for one in found if type(one).__name__ == "JITFunction")]


def compile_shape(shape: Shape, arch: int) -> None:
    """Every kernel that a decoder of this shape starts, into Triton's cache."""
    with FakeTensorMode(allow_non_fake_inputs=True), compiling_for(arch):
        for tokens in RUNS:
            _step(shape, [tokens], 0)
        _step(shape, [1, 1], 2)
        _sample(2, shape.vocab)
    if shape.form is not None and not shape.experts:
        compile_products(shape, shape.form, arch)
    if shape.experts:
        compile_experts(shape, arch)


def _step(shape: Shape, lengths: list[int], decodes: int) -> None:
    """A layer of a step, of tensors that are not there."""
    backend, dtype, tokens = CudaBackend(), DTYPES[shape.dtype], sum(lengths)
    cache_dtype = DTYPES[shape.cache_dtype or shape.dtype]
    width = shape.head_dim + 4 if cache_dtype == torch.int8 else shape.head_dim
    pages = (64, shape.kv_heads, shape.block_size, width)
    cache = LayerCache(_empty(*pages, dtype=cache_dtype), _empty(*pages, dtype=cache_dtype))
    context = AttentionContext(
        lengths,
        lengths,
        decodes,
        shape.block_size,
        _empty(len(lengths) + 1, dtype=torch.int32),
        _empty(len(lengths), dtype=torch.int32),
        _empty(len(lengths), 64, dtype=torch.int32),
        _empty(tokens, dtype=torch.int64),
    )
    half = (shape.rotated or shape.head_dim) // 2
    turn = (_empty(tokens, half, dtype=torch.float32), _empty(tokens, half, dtype=torch.float32))
    stack = backend.decoder_stack(
        [_layer(shape, dtype)],
        _empty(shape.hidden, dtype=dtype),
        num_heads=shape.heads,
        num_kv_heads=shape.kv_heads,
        head_dim=shape.head_dim,
        scale=1.0,
        eps=1e-6,
        activation=shape.activation,
        norm_offset=shape.norm_offset,
    )
    if stack is not None:
        stack(_empty(tokens, shape.hidden, dtype=dtype), [turn], [cache], context)
    visible = _empty(tokens, dtype=torch.int32) if shape.sees_ahead else None
    sinks = _empty(shape.heads, dtype=torch.float32) if shape.has_sinks else None
    qkv = _empty(tokens, shape.heads + 2 * shape.kv_heads, shape.head_dim, dtype=dtype)
    q = qkv.narrow(1, 0, shape.heads)
    backend.paged_attention(q, cache.keys, cache.values, context, 1.0, None, visible, sinks)


def compile_products(shape: Shape, form: Quantization, arch: int) -> None:
    """With weights in codes, for each tile of rows, with and without a bias."""
    with FakeTensorMode(), compiling_for(arch):
        _products(shape, form)


def compile_experts(shape: Shape, arch: int) -> None:
    """For few rows of each and for many."""
    dtype = DTYPES[shape.dtype]

    def linear(out: int, of: int) -> PlainLinear | QuantizedLinear:
        if shape.form is None:
            return PlainLinear(_empty(out, of, dtype=dtype))
        return CudaBackend().empty_quantized(out, of, shape.form, dtype=dtype, device=torch.device("cuda", 0))

    def linears(out: int, of: int) -> list[PlainLinear | QuantizedLinear]:
        made = [linear(out, of) for _ in range(shape.experts)]
        for one in made:
            one.set_bias(_empty(out, dtype=dtype) if shape.has_expert_biases else None)
        return made

    with FakeTensorMode(), compiling_for(arch):
        gate_up = linears(2 * shape.intermediate, shape.hidden)
        routed = CudaBackend().experts(gate_up, linears(shape.hidden, shape.intermediate), shape.activation)
        for tokens in (1, 64 * shape.experts):
            chosen, weights = CudaBackend().choose(
                _empty(tokens, shape.experts, dtype=dtype), shape.per_token, renormalizes=True, scale=1.0
            )
            routed(_empty(tokens, shape.hidden, dtype=dtype), chosen, weights)


def compile_adapters(shape: Shape, arch: int) -> None:
    """What adds LoRA adapters to a linear layer, of few and of many tokens, of small and of large ranks."""
    with FakeTensorMode(allow_non_fake_inputs=True), compiling_for(arch):
        add_adapters(shape.hidden, DTYPES[shape.dtype])


def add_adapters(hidden: int, dtype: torch.dtype) -> None:
    """The same for whatever is compiled for; tensors that are not there are made."""
    for rank in RANKS:
        one = LowRank(_empty(rank, hidden, dtype=dtype), [(0, _empty(hidden, rank, dtype=dtype))])
        for tokens in RUNS:
            out, x = _empty(tokens, hidden, dtype=dtype), _empty(tokens, hidden, dtype=dtype)
            CudaBackend().add_low_rank(out, x, [one], TokenGroups([None]))


def _products(shape: Shape, form: Quantization) -> None:
    dtype = DTYPES[shape.dtype]
    for bias in (None, _empty(shape.hidden, dtype=torch.float32)):
        for out, of in ((shape.hidden, shape.hidden), (2 * shape.intermediate, shape.hidden),
                        (shape.hidden, shape.intermediate)):  # fmt: skip
            weight = CudaBackend().empty_quantized(out, of, form, dtype=dtype, device=torch.device("cuda", 0))
            weight.set_bias(bias)
            for rows in (1, 64, *RUNS[-1:] * (form.is_fp8 and has_fp8())):
                weight(_empty(rows, of, dtype=dtype))


def _sample(rows: int, vocab: int) -> None:
    whole, half, large = np.zeros(rows, np.int32), np.zeros(rows, np.float32), np.zeros(rows, np.uint64)
    logits = _empty(rows, vocab, dtype=torch.float32)
    CudaBackend().edit(logits, logits, Edits.none(rows, vocab))
    CudaBackend().draw(logits, Draws(large, large, np.zeros(rows, np.float64), half, half, whole))


def _empty(*sizes: int, dtype: torch.dtype) -> Tensor:
    return torch.empty(sizes, dtype=dtype, device=torch.device("cuda", 0))


def _layer(shape: Shape, dtype: torch.dtype) -> DecoderLayerParts:
    def weight(out: int, of: int) -> PlainLinear:
        return PlainLinear(_empty(out, of, dtype=dtype))

    norm, head_norm = _empty(shape.hidden, dtype=dtype), _empty(shape.head_dim, dtype=dtype)
    return DecoderLayerParts(
        input_norm=norm,
        qkv=weight((shape.heads + 2 * shape.kv_heads) * shape.head_dim, shape.hidden),
        q_norm=head_norm if shape.has_qk_norms else None,
        k_norm=head_norm if shape.has_qk_norms else None,
        o=weight(shape.hidden, shape.heads * shape.head_dim),
        mlp_norm=norm,
        gate_up=weight(2 * shape.intermediate, shape.hidden),
        down=weight(shape.hidden, shape.intermediate),
        sliding_window=None,
    )


def usages(arch: int) -> list[Usage]:
    """What each variant that this process has compiled uses of the GPU."""
    return [usage(name, arch, constants, kernel) for name, constants, kernel in compiled(functions(), arch)]


def _build(task: tuple[str, Shape, int]) -> tuple[str, int]:
    name, shape, arch = task
    compile_shape(shape, arch)
    compile_adapters(shape, arch)
    return name, arch


def _shapes(path: Path | None) -> dict[str, Shape]:
    if path is None:
        return SHAPES
    return {name: Shape(**fields) for name, fields in json.loads(path.read_text()).items()}


def main(arguments: Sequence[str] | None = None) -> Iterator[str]:
    """Lines that say what was compiled, as it happens."""
    parser = argparse.ArgumentParser("python -m sensorium.kernels.cuda.build", description=__doc__)
    parser.add_argument("--arch", default="80,89,90", help="compute capabilities, such as 90 for 9.0")
    parser.add_argument("--shapes", type=Path, help="JSON file, name -> fields of a Shape; default: all known")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    given = parser.parse_args(arguments)
    try:
        archs, shapes = [int(one) for one in given.arch.split(",")], _shapes(given.shapes)
    except (ValueError, TypeError, OSError) as error:
        parser.error(str(error))
    tasks = [(name, shape, arch) for arch in archs for name, shape in shapes.items()]
    if given.jobs == 1:
        yield from (_said(*_build(task)) for task in tasks)
        return
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        for name, arch in pool.map(_build, tasks):
            yield _said(name, arch)


def _said(name: str, arch: int) -> str:
    return f"compiled {name} for sm_{arch}"


if __name__ == "__main__":
    for line in main():
        print(line, flush=True)
    sys.exit()
