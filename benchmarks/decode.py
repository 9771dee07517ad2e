"""One sequence beside llama.cpp on the same shape: prefill and decode, in turn, medians and ratios.

    python benchmarks/decode.py CHECKPOINT --llama-python VENV/bin/python --gguf FILE [--quantization int8|int4]

Ours is the engine alone, without HTTP, as llama.cpp's is. Without --gguf only ours is measured. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import IO

from engine import Bench  # the file beside this one

PEER = Path(__file__).parent / "llamacpp.py"
CONTEXT = 8192


class LlamaCpp:
    def __init__(self, python: Path, file: Path, threads: int) -> None:
        self._process = subprocess.Popen(
            [python, PEER, file, str(threads), str(CONTEXT)],
            text=True,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
        )
        self._line()

    def _line(self) -> str:
        stream: IO[str] | None = self._process.stdout
        line = stream.readline() if stream else ""
        if not line:
            raise SystemExit("llama.cpp has ended")
        return line.strip()

    def ask(self, line: str) -> float:
        if self._process.stdin is not None:
            print(line, file=self._process.stdin, flush=True)
        return float(self._line())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--quantization", choices=("int8", "int4"))
    parser.add_argument("--llama-python", type=Path, help="a Python that has llama-cpp-python")
    parser.add_argument("--gguf", type=Path, help="the same shape for llama.cpp")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=24, help="decode steps of a run")
    parser.add_argument("--prefill", type=int, nargs="*", default=[512], help="prompt lengths")
    parser.add_argument("--decode", type=int, nargs="*", default=[128], help="tokens of context")
    found = parser.parse_args()
    bench = Bench(found.checkpoint, found.quantization, found.threads)
    peer = LlamaCpp(found.llama_python, found.gguf, found.threads) if found.gguf else None
    cases: list[tuple[str, int, Callable[[], float], str]] = []
    for tokens in found.prefill:
        cases.append((f"prefill of {tokens}", tokens, lambda n=tokens: bench.prefill_s(n), f"prefill {tokens}"))
    for context in found.decode:
        cases.append(
            (
                f"decode at {context}",
                1,
                lambda n=context: bench.decode_s(1, n, found.steps),
                f"decode {context} {found.steps}",
            )
        )
    ours: dict[str, list[float]] = {}
    theirs: dict[str, list[float]] = {}
    for number in range(found.rounds + 1):
        for title, work, run, line in cases:
            ours.setdefault(title, []).append(work / run())
            if peer:
                theirs.setdefault(title, []).append(work / peer.ask(line))
        if number == 0:
            ours.clear(), theirs.clear()
    print("| | Sensorium, tok/s | llama.cpp, tok/s | ratio |\n|---|---|---|---|")
    for title, speeds in ours.items():
        mine, other = statistics.median(speeds), statistics.median(theirs.get(title, [0.0]))
        print(
            f"| {title} | {mine:.1f} ({min(speeds):.1f} to {max(speeds):.1f}) | {other:.1f} "
            f"({min(theirs.get(title, [0.0])):.1f} to {max(theirs.get(title, [0.0])):.1f}) | "
            f"{mine / other if other else 0.0:.2f} |"
        )


if __name__ == "__main__":
    main()
