"""What a GPU can do, and what the engine makes of it, each beside the floor that memory and arithmetic set.

    python benchmarks/gpu.py kernels --json kernels.json
    python benchmarks/gpu.py engine CHECKPOINT --batch 1 32 256 --context 1024 --json engine.json

Medians of CUDA events around many repetitions. Each command takes less than ten minutes.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import torch

from sensorium.config import EngineConfig
from sensorium.engine.drawing import draw_together
from sensorium.engine.graphs import CudaCapture
from sensorium.engine.loading import Engine, build_engine, choose_quantization, opened
from sensorium.kernels import FP8, Quantization
from sensorium.kernels.context import AttentionContext
from sensorium.kernels.gpu import gpu_kernels, refusal
from sensorium.models.loading import load_model
from sensorium.types import EngineRequest, Prompt, SamplingParams

GPU = torch.device("cuda", 0)
ROUNDS, REPEATS = 7, 20
SHAPES = {  # name -> (out, in) of the products of a layer
    "2B": ((2048, 1536), (1536, 1536), (17920, 1536), (1536, 8960), (151936, 1536)),
    "7B": ((4608, 3584), (3584, 3584), (37888, 3584), (3584, 18944), (152064, 3584)),
}
HEADS = {"2B": (12, 2, 128), "7B": (28, 4, 128)}

Row = dict[str, Any]


def seconds(compute: Callable[[], object], repeats: int = REPEATS) -> float:
    """Of one call, by the GPU's clock: the median of rounds."""
    compute()
    times = []
    for _ in range(ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(repeats):
            compute()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / 1000 / repeats)
    return statistics.median(times)


# Ceilings and kernels


def copy_rate() -> float:
    """Bytes a second, read and written."""
    source = torch.empty(2**30, dtype=torch.uint8, device=GPU)
    target = torch.empty_like(source)
    return 2 * source.nbytes / seconds(lambda: target.copy_(source))


def products(rate: float) -> Iterator[Row]:
    """bfloat16 by cuBLAS, with the share of the copy rate that reading the weights is."""
    for name, shapes in SHAPES.items():
        for out, size in shapes:
            weight = torch.randn(out, size, dtype=torch.bfloat16, device=GPU)
            for rows in (1, 32, 256, 2048):
                x = torch.randn(rows, size, dtype=torch.bfloat16, device=GPU)
                took = seconds(lambda x=x, weight=weight: torch.nn.functional.linear(x, weight))
                moved = weight.nbytes + x.nbytes + 2 * rows * out
                yield {
                    "what": f"product {name} {rows} x {size} x {out}",
                    "us": took * 1e6,
                    "tflops": 2 * rows * size * out / took / 1e12,
                    "share of copy rate": moved / took / rate,
                }


def products_with_codes(rate: float) -> Iterator[Row]:
    """The same of a layer's largest product with weights in codes, activations included."""
    forms = {
        "int8": Quantization(8),
        "int4": Quantization(4),
        "fp8": FP8,
        "fp8 blocks": Quantization(8, 128, floats=True),
    }
    for (name, shapes), (kind, form) in itertools.product(SHAPES.items(), forms.items()):
        out, size = shapes[2]
        weight = gpu_kernels().current.empty_quantized(out, size, form, dtype=torch.bfloat16, device=GPU)
        weight.fill(0, torch.randn(out, size, dtype=torch.bfloat16, device=GPU))
        for rows in (1, 32, 256, 2048):
            took = seconds(partial(weight, torch.randn(rows, size, dtype=torch.bfloat16, device=GPU)))
            yield {
                "what": f"product {name} {kind} {rows} x {size} x {out}",
                "us": took * 1e6,
                "tflops": 2 * rows * size * out / took / 1e12,
                "share of copy rate": (weight.nbytes + 2 * rows * (size + out)) / took / rate,
            }


def attention(rate: float) -> Iterator[Row]:
    """Decodes of bfloat16 over a paged cache of each type."""
    for name, (heads, kv_heads, size) in HEADS.items():
        for batch, length, dtype in itertools.product(
            (1, 32, 256), (1024, 8192), (torch.bfloat16, torch.float8_e4m3fn)
        ):
            pages = -(-length // 16)
            keys, values = (
                torch.randn(batch * pages, kv_heads, 16, size, dtype=torch.bfloat16, device=GPU).to(dtype)
                for _ in range(2)
            )
            tables = torch.randperm(batch * pages, device=GPU).view(batch, pages).int()
            ones, lengths = [1] * batch, [length] * batch
            starts = torch.arange(batch + 1, dtype=torch.int32, device=GPU)
            seq_lens = torch.full((batch,), length, dtype=torch.int32, device=GPU)
            slots = torch.zeros(batch, dtype=torch.int64, device=GPU)
            context = AttentionContext(ones, lengths, batch, 16, starts, seq_lens, tables, slots)
            q = torch.randn(batch, heads, size, dtype=torch.bfloat16, device=GPU)
            arguments = (q, keys, values, context, size**-0.5)
            took = seconds(partial(gpu_kernels().current.paged_attention, *arguments))
            yield {
                "what": f"decode attention {name} batch {batch} context {length} {dtype}".replace("torch.", ""),
                "us": took * 1e6,
                "share of copy rate": (keys.nbytes + values.nbytes) / took / rate,
            }


def gaps() -> Iterator[Row]:
    """Of kernels that do nothing to speak of, one after the other and as a graph."""
    x = torch.zeros(1, device=GPU)

    def many() -> None:
        for _ in range(300):
            x.add_(1)

    replay = CudaCapture()(many)
    yield {"what": "gap between kernels, eager", "us": seconds(many, 3) / 300 * 1e6}
    yield {"what": "gap between kernels, graph", "us": seconds(replay, 3) / 300 * 1e6}


def sampling() -> Iterator[Row]:
    """Filtered draws, which sort."""
    params = SamplingParams(max_tokens=1, temperature=0.8, top_p=0.9, top_k=50)
    for rows in (1, 32, 256):
        logits = torch.randn(rows, 151936, device=GPU)
        numbers = np.random.default_rng(1).random(rows)
        took = seconds(
            lambda logits=logits, rows=rows, numbers=numbers: draw_together(logits, [params] * rows, numbers), 3
        )
        yield {"what": f"sampling by sorting, {rows} rows", "us": took * 1e6}


def kernels() -> Iterator[Row]:
    rate = copy_rate()
    yield {"what": "copy", "GB/s": rate / 1e9}
    yield from products(rate)
    yield from products_with_codes(rate)
    yield from attention(rate)
    yield from gaps()
    yield from sampling()


# The engine


def loaded(arguments: argparse.Namespace, way: str) -> Engine:
    longest = arguments.context + arguments.tokens + 16
    config = EngineConfig(
        model=arguments.checkpoint,
        max_model_len=longest,
        max_num_seqs=max(arguments.batch),
        quantization=arguments.quantization,
        kv_cache_dtype=arguments.kv_cache_dtype,
        enable_prefix_caching=False,
        speculative_tokens=0,
    )
    checkpoint = opened(config)
    quantization = choose_quantization(config, checkpoint.quantization, GPU)
    model = load_model(checkpoint, dtype=torch.bfloat16, device=GPU, quantization=quantization)
    capture = CudaCapture() if way != "eager" else None
    engine = build_engine(model, checkpoint, config, GPU, torch.bfloat16, capture=capture)
    engine.runner.overlaps = way == "graph and overlap"
    while engine.runner.can_capture:
        engine.runner.capture_one()
    return engine


def decode_seconds(engine: Engine, batch: int, context: int, tokens: int) -> tuple[float, float]:
    """(seconds of all prompts, median seconds of a step that decodes the whole batch)"""
    scheduler, runner, rng = engine.scheduler, engine.runner, np.random.default_rng(1)
    for number in range(batch):
        prompt = Prompt(rng.integers(10, engine.vocab_size - 10, context).astype(np.int32))
        scheduler.add(EngineRequest(number, prompt, SamplingParams(max_tokens=tokens, temperature=0.0)))
    started, steps, prefilled = perf_counter(), [], 0.0
    while scheduler.has_work():
        began = perf_counter()
        plan, _ = scheduler.schedule()
        with runner.computing():
            pending = runner.launch(plan)
            if runner.overlaps and (coming := scheduler.foreseen(plan)):
                runner.prepare(coming)
            result = pending.result()
        for seq, count in [*((seq, 1) for seq in plan.decodes), *plan.prefills]:
            scheduler.advance(seq, count)
        for seq, gained in zip(result.sequences, result.tokens.token_ids, strict=True):
            scheduler.commit(seq, gained)
        if len(plan.decodes) == batch and not plan.prefills:
            steps.append(perf_counter() - began)
        else:
            prefilled = perf_counter() - started
    return prefilled, statistics.median(steps[2:])


def engine_rows(arguments: argparse.Namespace) -> Iterator[Row]:
    rate = copy_rate()
    yield {"what": "copy", "GB/s": rate / 1e9}
    for way in ("eager", "graph", "graph and overlap"):
        engine = loaded(arguments, way)
        text, ready = opened(EngineConfig(arguments.checkpoint)).decoder, engine.ready
        for batch in arguments.batch:
            prompts, took = decode_seconds(engine, batch, arguments.context, arguments.tokens)
            per_token = ready.kv_bytes / ready.kv_tokens
            floor = (ready.weight_bytes + batch * arguments.context * per_token) / (rate / 2)
            yield {
                "what": f"{way}, batch {batch}, context {arguments.context}, {text.num_layers} layers",
                "ms a step": took * 1000,
                "floor ms": floor * 1000,
                "share of the floor": floor / took,
                "tokens/s": batch / took,
                "prompt tokens/s": batch * arguments.context / prompts,
                "GiB at most": torch.cuda.max_memory_allocated(GPU) / 2**30,
            }
        del engine
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("kernels", help="copies, products, attention, gaps, sampling")
    engine = commands.add_parser("engine", help="a checkpoint's decodes: eager, as graphs, with overlap")
    engine.add_argument("checkpoint")
    engine.add_argument("--batch", type=int, nargs="+", default=[1, 32, 256])
    engine.add_argument("--context", type=int, default=1024)
    engine.add_argument("--tokens", type=int, default=64)
    engine.add_argument("--quantization", default="auto")
    engine.add_argument("--kv-cache-dtype", default="auto")
    for command in commands.choices.values():
        command.add_argument("--json", type=Path, help="file for the rows")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("torch sees no GPU here")
    reason = refusal(GPU)
    if reason is None:
        gpu_kernels().switch()
    rows: list[Row] = [{"card": torch.cuda.get_device_name(GPU), "torch": torch.__version__, "reference": reason}]
    for row in kernels() if arguments.command == "kernels" else engine_rows(arguments):
        rows.append(row)
        print(
            ", ".join(f"{name} {value:.4g}" if isinstance(value, float) else f"{value}" for name, value in row.items())
        )
        if arguments.json:
            arguments.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
