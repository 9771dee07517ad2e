"""The engine alone, in this process, no HTTP: `python benchmarks/engine.py CHECKPOINT [--quantization int8|int4]`.

Prompts are random token ids, no two alike; answers are greedy and never stop early. Figures are medians, the best run
in brackets. With --lines it is the process that benchmarks/decode.py asks beside llama.cpp's, and prints "ready" once
it has computed a token: see benchmarks/llamacpp.py for the lines.
"""

from __future__ import annotations

import argparse
import itertools
import os
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from sensorium.cli.models import find_checkpoint
from sensorium.config import EngineConfig
from sensorium.engine.faults import Faults
from sensorium.engine.loading import build_engine, default_threads, load_draft
from sensorium.engine.loop import Core
from sensorium.ipc.channel import Channel
from sensorium.kernels import Quantization
from sensorium.models.loading import load_model
from sensorium.system.processes import resident_bytes
from sensorium.types import EngineRequest, Prompt, SamplingParams

LINES_CACHE = 1 << 30  # bytes


class Nobody(Channel):
    """Takes what the core sends, and has nothing to say."""

    def __init__(self) -> None:
        self.bytes_sent = 0

    def poll(self, *, wait: bool, patience_s: float | None = None) -> list[tuple[int, memoryview]]:
        return []

    def wake(self) -> None:
        pass

    def send(self, frame: bytes) -> None:
        self.bytes_sent += len(frame)


class Bench:
    def __init__(
        self,
        folder: Path,
        quantization: str | None = None,
        threads: int | None = None,
        *,
        speculative_tokens: int = 0,
        draft: Path | None = None,
        cache_bytes: int | None = None,
        packs: bool = True,
    ) -> None:
        """`folder`: or a GGUF file. `draft`: a checkpoint whose model guesses tokens."""
        checkpoint = find_checkpoint(str(folder))
        text = checkpoint.text
        if text is None:
            raise SystemExit(f"{folder} has no language model")
        torch.set_num_threads(threads or default_threads(checkpoint))
        wanted = Quantization(8 if quantization == "int8" else 4) if quantization else None
        self.model = model = load_model(
            checkpoint, dtype=torch.bfloat16, device="cpu", quantization=wanted, memory_mapped=True
        )
        config = EngineConfig(
            str(folder), enable_prefix_caching=False, speculative_tokens=speculative_tokens, kv_cache_memory=cache_bytes
        )
        cpu, guessing = torch.device("cpu"), None
        if draft is not None:
            guessing = load_draft(replace(config, draft_model=str(draft), quantization=quantization or "auto"))
            torch.set_num_threads(threads or default_threads(checkpoint))
        self.engine = build_engine(model, checkpoint, config, cpu, torch.bfloat16, draft=guessing)
        self.core = Core(self.engine, Nobody(), Faults())
        self._vocab_size = text.vocab_size
        self._random = np.random.default_rng(0)
        self._ids = itertools.count(1)
        if packs:
            self.pack()

    def pack(self) -> None:
        """What a server does while nobody asks."""
        while self.engine.pack_some():
            pass

    def start(self, sequences: int, prompt_tokens: int, answer_tokens: int) -> float:
        """Seconds until every one of `sequences` prompts has its first token."""
        scheduler = self.engine.scheduler
        for _ in range(sequences):
            ids = self._random.integers(300, self._vocab_size - 300, prompt_tokens).astype(np.int32)
            sampling = SamplingParams(max_tokens=answer_tokens, temperature=0.0)
            self.core._add(EngineRequest(next(self._ids), Prompt(ids), sampling))
        start = time.perf_counter()
        while scheduler.waiting or scheduler.prefilling:
            self.core.turn()
        return time.perf_counter() - start

    def decode(self, steps: int) -> float:
        """Seconds of `steps` steps in which every sequence gets one token."""
        start = time.perf_counter()
        for _ in range(steps):
            self.core.turn()
        return time.perf_counter() - start

    def finish(self) -> None:
        for request_id in list(self.engine.scheduler._by_id):
            self.engine.scheduler.abort(request_id)

    def prefill_s(self, tokens: int) -> float:
        seconds = self.start(1, tokens, 2)
        self.finish()
        return seconds

    def decode_s(self, sequences: int, context: int, steps: int) -> float:
        """Seconds a step, at about `context` tokens of context."""
        self.start(sequences, context, steps + 8)
        self.decode(2)
        seconds = self.decode(steps) / steps
        self.finish()
        return seconds


def answer_lines(found: argparse.Namespace) -> None:
    bench = Bench(found.checkpoint, found.quantization, found.threads, cache_bytes=LINES_CACHE, packs=False)
    bench.prefill_s(1)
    print("ready", flush=True)
    bench.pack()
    asked: dict[str, Callable[..., float]] = {
        "prefill": bench.prefill_s,
        "decode": bench.decode_s,
        "memory": lambda: float(resident_bytes([os.getpid()])),
    }
    for line in sys.stdin:
        what, *numbers = line.split()
        print(asked[what](*map(int, numbers)), flush=True)


def figure(title: str, work: float, seconds: list[float], unit: str) -> None:
    print(
        f"{title:44s} {work / statistics.median(seconds):9.1f} {unit} ({work / min(seconds):.1f})   "
        f"{1e3 * statistics.median(seconds):9.2f} ms ({1e3 * min(seconds):.2f})",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--quantization", choices=("int8", "int4"))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=32, help="decode steps of a run")
    parser.add_argument("--prefill", type=int, nargs="*", default=[512], help="prompt lengths")
    parser.add_argument("--decode", nargs="*", default=["1:128", "32:128"], help="SEQUENCES:CONTEXT")
    parser.add_argument("--lines", action="store_true", help="answer the lines of standard input")
    found = parser.parse_args()
    if found.lines:
        answer_lines(found)
        return
    started = time.perf_counter()
    bench = Bench(found.checkpoint, found.quantization, found.threads)
    print(f"loaded in {time.perf_counter() - started:.2f} s, {torch.get_num_threads()} threads")
    runs: dict[tuple[str, float, str], list[float]] = {}
    for round_number in range(found.rounds + 1):
        for tokens in found.prefill:
            seconds = bench.prefill_s(tokens)
            runs.setdefault((f"prefill of {tokens} tokens", tokens, "tok/s"), []).append(seconds)
        for case in found.decode:
            sequences, context = map(int, case.split(":"))
            seconds = bench.decode_s(sequences, context, found.steps)
            runs.setdefault((f"decode, {sequences} x {context} tokens of context", sequences, "tok/s"), []).append(
                seconds
            )
        if round_number == 0:
            runs.clear()
    for (title, work, unit), seconds_of in runs.items():
        figure(title, work, seconds_of, unit)


if __name__ == "__main__":
    main()
