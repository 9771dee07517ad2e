"""Native kernels on the shapes of Qwen2-VL-2B, beside torch's: `python benchmarks/kernels.py [SECTION ...]`.

Quantised weights stand beside those of bf16, GGUF's blocks beside plain reading of as many bytes: the limit of one row.

Contenders take turns, so that a busy machine is unfair to neither; the figures are medians, the best run in brackets.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import random
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from sensorium.kernels import MappedBlocks, Quantization, reference
from sensorium.kernels.backend import BLOCK_FORMS
from sensorium.kernels.context import AttentionContext
from sensorium.kernels.cpu import native
from sensorium.kernels.cpu.library import ISAS

BF16 = torch.bfloat16
COLD_BYTES = 256 << 20  # of weights that one run walks over, so that none stay in the caches
BLOCK_KINDS = ("Q4_0", "Q8_0", "Q4_K", "Q5_K", "Q6_K")
LINEAR_SHAPES = ((17920, 1536), (1536, 8960), (2048, 1536))
Contender = tuple[str, Callable[[], object]]


def race(title: str, contenders: list[Contender], rounds: int, *, work: float, unit: str) -> None:
    """`work` is what one call does, in units of 1e9."""
    times: dict[str, list[float]] = {name: [] for name, _ in contenders}
    for _, run in contenders:
        run()
    for _ in range(rounds):
        for name, run in contenders:
            start = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - start)
    said = "   ".join(f"{name} {work / statistics.median(t):7.1f} ({work / min(t):7.1f})" for name, t in times.items())
    print(f"{title:44s} {unit}:  {said}", flush=True)


def linear(kernels: native.Native, rounds: int) -> None:
    for out_features, in_features in LINEAR_SHAPES:
        weight = torch.randn(out_features, in_features).to(BF16)
        copies = max(1, COLD_BYTES // weight.nbytes)
        weights = [weight.clone() for _ in range(copies)]
        forms = [kernels.pack_linear(weight, None) for _ in range(copies)]
        for rows in (1, 8, 32, 130, 512):
            cold = rows <= 32  # a larger product is bound by arithmetic: one weight is enough
            some, many = (weights, forms) if cold else (weights[:1], forms[:1])
            x = torch.randn(rows, in_features).to(BF16)
            packed = torch.ops.mkldnn._reorder_linear_weight(weight, rows)

            def onednn(x: Tensor = x, packed: Tensor = packed) -> Tensor:
                out: Tensor = torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "")
                return out

            contenders: list[Contender] = [
                ("native", lambda x=x, many=many: [form(x) for form in many]),
                ("F.linear", lambda x=x, some=some: [functional.linear(x, w) for w in some]),
            ]
            if not cold:
                contenders.append(("oneDNN packed", onednn))
            work = len(many) * weight.nbytes / 1e9 * (1 if rows <= 8 else rows)
            race(
                f"linear {rows} x {in_features} -> {out_features}",
                contenders,
                rounds,
                work=work,
                unit="GB/s  " if rows <= 8 else "GFLOP/s",
            )


def quantized(kernels: native.Native, rounds: int) -> None:
    kinds = {"bf16": None, "int8": Quantization(8), "int4": Quantization(4)}
    for out_features, in_features in LINEAR_SHAPES:
        weight = torch.randn(out_features, in_features).to(BF16)
        copies = max(1, COLD_BYTES // (weight.numel() // 2))
        forms = {
            name: [kernels.pack_linear(weight, None, quantization=kind) for _ in range(copies)]
            for name, kind in kinds.items()
        }
        for rows in (1, 8, 16, 480):
            count = copies if rows <= 16 else 1
            x = torch.randn(rows, in_features).to(BF16)
            contenders: list[Contender] = [
                (name, lambda x=x, many=many[:count]: [form(x) for form in many]) for name, many in forms.items()
            ]
            race(
                f"quantised {rows} x {in_features} -> {out_features}",
                contenders,
                rounds,
                work=2 * count * rows * weight.numel() / 1e9,
                unit="GOP/s  ",
            )


def blocks(kernels: native.Native, rounds: int) -> None:
    out_features, in_features = 2048, 4096
    for kind in BLOCK_KINDS:
        form = BLOCK_FORMS[kind]
        octets = torch.randint(0, 256, (out_features, form.row_bytes(in_features)), dtype=torch.uint8)
        octets.view(-1, form.nbytes)[:, 1::2] &= 0x3B  # whatever is a scale is a number
        weights = [
            kernels.empty_blocks(out_features, in_features, ((out_features, kind),))
            for _ in range(max(1, COLD_BYTES // octets.nbytes))
        ]
        start = time.perf_counter()
        for weight in weights:
            weight.fill_blocks(0, octets)
        packed_s = (time.perf_counter() - start) / len(weights)
        plain = torch.ones(sum(weight.nbytes for weight in weights) // 4, dtype=torch.float32)
        parts = [[MappedBlocks(0, kind, octets.clone())] for _ in weights]
        mapped = [kernels.mapped_blocks(part, out_features, in_features) for part in parts]
        print(f"{kind} packed: {1e9 * packed_s / (out_features * in_features):.2f} ns a weight", flush=True)
        for rows in (1, 2, 4, 8, 480):
            some = weights if rows <= 8 else weights[:1]
            x = torch.randn(rows, in_features).to(BF16)
            contenders: list[Contender] = [("packed", lambda x=x, some=some: [weight(x) for weight in some])]
            if mapped[0] is not None:
                there = mapped[: len(some)]
                contenders.append(("mapped", lambda x=x, there=there: [weight(x) for weight in there if weight]))
            if rows == 1:
                contenders.append(("reading", plain.sum))
            work = plain.nbytes if rows <= 8 else 2 * rows * out_features * in_features
            race(
                f"{kind} {rows} x {in_features} -> {out_features}",
                contenders,
                rounds,
                work=work / 1e9,
                unit="GB/s  " if rows <= 8 else "GOP/s ",
            )


def attention(kernels: native.Native, rounds: int) -> None:
    heads, kv_heads, dim = 12, 2, 128
    cases = [([1], [128]), ([1], [4096]), ([1] * 8, [512] * 8), ([512], [512]), ([512], [4096])]
    for query_lens, context_lens in cases:
        context, blocks = paged(query_lens, context_lens)
        q = torch.randn(sum(query_lens), heads, dim).to(BF16)
        k, v = (torch.randn(blocks, kv_heads, 16, dim).to(BF16) for _ in range(2))
        pairs = sum(n * (length - (n - 1) / 2) for n, length in zip(query_lens, context_lens, strict=True))
        contenders: list[Contender] = [
            (name, lambda f=f, q=q, k=k, v=v, c=context: f(q, k, v, c, dim**-0.5))
            for name, f in (("native", kernels.paged_attention), ("torch", reference.paged_attention))
        ]
        race(
            f"paged {len(query_lens)} x {query_lens[0]} of {context_lens[0]}",
            contenders,
            rounds,
            work=4 * heads * dim * pairs / 1e9,
            unit="GFLOP/s",
        )
    for dim, length, count in ((80, 1024, 1), (80, 64, 16), (64, 577, 5), (72, 729, 1)):
        q, k, v = torch.randn(length * count, 48, dim).to(BF16).split([16, 16, 16], 1)
        contenders = [
            (name, lambda f=f, q=q, k=k, v=v, n=[length] * count, d=dim: f(q, k, v, n, d**-0.5))
            for name, f in (("native", kernels.varlen_attention), ("torch", reference.varlen_attention))
        ]
        race(
            f"varlen {count} x {length}, head size {dim}",
            contenders,
            rounds,
            work=4 * 16 * dim * length**2 * count / 1e9,
            unit="GFLOP/s",
        )


def paged(query_lens: list[int], context_lens: list[int]) -> tuple[AttentionContext, int]:
    """Sequences over 16-token blocks in random order, and how many blocks that takes."""
    needed = [-(-length // 16) for length in context_lens]
    free = random.Random(1).sample(range(sum(needed)), sum(needed))
    tables = torch.zeros(len(needed), max(needed), dtype=torch.int32)
    for row, count in zip(tables, needed, strict=True):
        row[:count] = torch.tensor([free.pop() for _ in range(count)], dtype=torch.int32)
    start = torch.tensor([0, *itertools.accumulate(query_lens)], dtype=torch.int32)
    lens = torch.tensor(context_lens, dtype=torch.int32)
    slots = torch.zeros(sum(query_lens), dtype=torch.int64)
    decodes = query_lens.count(1)
    return AttentionContext(query_lens, context_lens, decodes, 16, start, lens, tables, slots), sum(needed)


def small(kernels: native.Native, rounds: int) -> None:
    weight = torch.randn(1536).to(BF16)
    for rows in (1, 512):
        x, residual, wide = (torch.randn(rows, n).to(BF16) for n in (1536, 1536, 17920))
        for name, arguments in (
            ("rms_norm", (x, weight, 1e-6)),
            ("add_rms_norm", (x, residual, weight, 1e-6)),
            ("silu_mul", (wide,)),
        ):
            contenders: list[Contender] = [
                (title, functools.partial(getattr(module, name), *arguments))
                for title, module in (("native", kernels), ("torch", reference))
            ]
            race(f"{name} {rows} rows", contenders, rounds * 10, work=1e-3, unit="1000 calls/s")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sections = {"linear": linear, "quantized": quantized, "blocks": blocks, "attention": attention, "small": small}
    parser.add_argument("sections", nargs="*", choices=[*sections, []], help="default: all")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--isa", choices=ISAS, help="default: the best of this processor")
    arguments = parser.parse_args()
    kernels = native.load(arguments.isa)
    print(kernels.describe())
    with torch.inference_mode():
        for name in arguments.sections or sections:
            sections[name](kernels, arguments.rounds)


if __name__ == "__main__":
    main()
