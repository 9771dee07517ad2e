"""llama.cpp's turn in benchmarks/decode.py: runs in its Python, which needs llama-cpp-python and none of this package.

Reads lines "prefill TOKENS" and "decode SEQUENCES CONTEXT STEPS" and answers each with seconds (a step, for decode).
"""

import sys
import time

import numpy as np
from llama_cpp import Llama


def main(file: str, threads: int, context: int) -> None:
    model = Llama(file, n_ctx=context, n_threads=threads, n_threads_batch=threads, n_batch=512, verbose=False)
    random = np.random.default_rng(0)

    def prefill(tokens: int) -> float:
        prompt = [int(i) for i in random.integers(300, 150000, tokens)]
        model.reset()
        start = time.perf_counter()
        model.eval(prompt)
        return time.perf_counter() - start

    def decode(tokens: int, steps: int) -> float:
        prefill(tokens)
        model.eval([999])
        start = time.perf_counter()
        for i in range(steps):
            model.eval([1000 + i])
        return (time.perf_counter() - start) / steps

    print("ready", flush=True)
    for line in sys.stdin:
        what, *numbers = line.split()
        seconds = prefill(int(numbers[0])) if what == "prefill" else decode(int(numbers[0]), int(numbers[1]))
        print(seconds, flush=True)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
