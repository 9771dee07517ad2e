"""One model here and in llama.cpp on the same shape or file, in turn: medians and ratios.

    python benchmarks/decode.py CHECKPOINT --llama-python VENV/bin/python --gguf FILE [--quantization int8|int4]

Starts, prefill, decode and memory of the engine alone, without HTTP, as llama.cpp's are; CHECKPOINT may be FILE.
Without --gguf only ours is measured. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import IO

FOLDER = Path(__file__).parent
LENGTH = 8192  # of llama.cpp's one sequence, by default


class Side:
    """A process that answers lines with numbers."""

    def __init__(self, command: list[str | Path]) -> None:
        self.command = command
        self.figures: dict[str, list[float]] = {}
        self._process: subprocess.Popen[str] | None = None

    def start(self) -> float:
        """Seconds until it has computed a token."""
        started = time.perf_counter()
        self._process = subprocess.Popen(
            self.command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        while self._line() != "ready":
            pass
        return time.perf_counter() - started

    def stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()

    def ask(self, line: str) -> float:
        if self._process is not None and self._process.stdin is not None:
            print(line, file=self._process.stdin, flush=True)
        return float(self._line())

    def _line(self) -> str:
        stream: IO[str] | None = None if self._process is None else self._process.stdout
        line = stream.readline() if stream else ""
        if not line:
            raise SystemExit(f"has ended: {self.command}")
        return line.strip()


def told(title: str, sides: list[Side], unit: str, digits: int, *, more_is_better: bool) -> None:
    found = [side.figures[title] for side in sides]
    cells = [
        f"{statistics.median(one):.{digits}f} ({min(one):.{digits}f} to {max(one):.{digits}f}) {unit}" for one in found
    ]
    ratio = ""
    if len(found) == 2:
        ours, theirs = map(statistics.median, found)
        ratio = f"{ours / theirs if more_is_better else theirs / ours:.2f}"
    print(f"| {title} | {' | '.join([*cells, ratio])} |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--quantization", choices=("int8", "int4"))
    parser.add_argument("--llama-python", type=Path, help="a Python that has llama-cpp-python")
    parser.add_argument("--gguf", type=Path, help="the same shape, or the same file, for llama.cpp")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--starts", type=int, default=1, help="how often each is started; more than one are compared")
    parser.add_argument("--steps", type=int, default=24, help="decode steps of a run")
    parser.add_argument("--prefill", type=int, nargs="*", default=[512], help="prompt lengths")
    parser.add_argument("--decode", nargs="*", default=["1:128"], help="SEQUENCES:CONTEXT")
    parser.add_argument("--length", type=int, default=LENGTH, help="of llama.cpp's sequences, at most")
    found = parser.parse_args()
    ours: list[str | Path] = [sys.executable, FOLDER / "engine.py", found.checkpoint, "--lines"]
    ours += ["--threads", str(found.threads)]
    ours += ["--quantization", found.quantization] if found.quantization else []
    sides = [Side(ours)]
    if found.gguf:
        theirs = [found.llama_python, FOLDER / "llamacpp.py", found.gguf, str(found.threads), str(found.length)]
        sides.append(Side(theirs))
    cases = [(f"prefill of {tokens}", tokens, f"prefill {tokens}") for tokens in found.prefill]
    for case in found.decode:
        sequences, context = map(int, case.split(":"))
        line = f"decode {sequences} {context} {found.steps}"
        cases.append((f"decode, {sequences} at {context}", sequences, line))
    for number in range(found.starts):
        for side in sides:
            side.figures.setdefault("ready after", []).append(side.start())
            if number < found.starts - 1:
                side.stop()
    for number in range(found.rounds + 1):
        for title, work, line in cases:
            for side in sides:
                speed = work / side.ask(line)
                if number:
                    side.figures.setdefault(title, []).append(speed)
    for side in sides:
        side.figures["resident"] = [side.ask("memory") / 1e6]
        side.stop()
    print("| | Sensorium | llama.cpp | ratio |\n|---|---|---|---|")
    for title, _, _ in cases:
        told(title, sides, "tok/s", 1, more_is_better=True)
    told("ready after", sides, "s", 2, more_is_better=False)
    told("resident", sides, "MB", 0, more_is_better=False)
    files = [found.checkpoint] if found.checkpoint.is_file() else found.checkpoint.glob("*.safetensors")
    print(f"{found.checkpoint.name}: {sum(file.stat().st_size for file in files) / 1e6:.0f} MB")


if __name__ == "__main__":
    main()
