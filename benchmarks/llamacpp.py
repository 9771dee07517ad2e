"""llama.cpp's turn in benchmarks/decode.py: runs in its Python, which needs llama-cpp-python and none of this package.

Reads lines "prefill TOKENS" and "decode SEQUENCES CONTEXT STEPS" and answers each with seconds (a step, for decode);
"memory" with the resident bytes of its process. The C functions are called themselves: the package's class has one
sequence only.
"""

import re
import sys
import time
from collections.abc import Callable
from pathlib import Path

import llama_cpp
import numpy as np

BATCH = 512


class Sequences:
    """A context for some sequences of the same length."""

    def __init__(self, model: object, count: int, length: int, threads: int) -> None:
        params = llama_cpp.llama_context_default_params()
        params.n_ctx, params.n_seq_max = count * length, count
        params.n_batch = params.n_ubatch = BATCH
        params.n_threads = params.n_threads_batch = threads
        self._context = llama_cpp.llama_init_from_model(model, params)
        if not self._context:
            raise SystemExit(f"llama.cpp has no memory for {count} sequences of {length}")
        self._batch = llama_cpp.llama_batch_init(BATCH, 0, count)
        self._lengths = [0] * count

    def clear(self) -> None:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        self._lengths = [0] * len(self._lengths)

    def add(self, tokens: list[tuple[int, int, bool]]) -> None:
        """(sequence, token, whether its logits are wanted)"""
        for at, (sequence, token, wanted) in enumerate(tokens):
            self._batch.token[at], self._batch.pos[at] = token, self._lengths[sequence]
            self._batch.n_seq_id[at], self._batch.seq_id[at][0] = 1, sequence
            self._batch.logits[at] = wanted
            self._lengths[sequence] += 1
        self._batch.n_tokens = len(tokens)
        if llama_cpp.llama_decode(self._context, self._batch):
            raise SystemExit("llama.cpp computes nothing")
        if tokens[-1][2]:
            llama_cpp.llama_get_logits_ith(self._context, -1)[0]  # waits until they are there


def main(file: str, threads: int, length: int) -> None:
    """`length`: of a sequence, at most."""
    quiet = llama_cpp.llama_log_callback(lambda level, text, data: None)
    llama_cpp.llama_log_set(quiet, None)
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(file.encode(), llama_cpp.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp does not load {file}")
    size = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))
    random, contexts = np.random.default_rng(0), {1: Sequences(model, 1, length, threads)}

    def ids(count: int) -> list[int]:
        return [int(i) for i in random.integers(300, size - 300, count)]

    def prompt(sequences: Sequences, number: int, tokens: int) -> None:
        for start in range(0, tokens, BATCH):
            here = ids(min(BATCH, tokens - start))
            sequences.add([(number, one, start + i == tokens - 1) for i, one in enumerate(here)])

    def prefill(tokens: int) -> float:
        sequences = contexts[1]
        sequences.clear()
        start = time.perf_counter()
        prompt(sequences, 0, tokens)
        return time.perf_counter() - start

    def decode(count: int, tokens: int, steps: int) -> float:
        if count not in contexts:
            contexts[count] = Sequences(model, count, length, threads)
        sequences = contexts[count]
        sequences.clear()
        for number in range(count):
            prompt(sequences, number, tokens)
        took = []
        for _ in range(steps + 2):
            start = time.perf_counter()
            sequences.add([(number, one, True) for number, one in enumerate(ids(count))])
            took.append(time.perf_counter() - start)
        return sum(took[2:]) / steps

    def memory() -> float:
        lines = Path("/proc/self/smaps_rollup").read_text()
        return 1024 * float(re.findall(r"^Pss:\s+(\d+)", lines, re.MULTILINE)[0])

    asked: dict[str, Callable[..., float]] = {"prefill": prefill, "decode": decode, "memory": memory}
    prefill(1)
    print("ready", flush=True)
    for line in sys.stdin:
        what, *numbers = line.split()
        print(asked[what](*map(int, numbers)), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
