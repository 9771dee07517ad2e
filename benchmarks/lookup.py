"""What prompt look-up gains and costs: `python benchmarks/lookup.py CHECKPOINT [--quantization int8|int4]`.

The engine alone, with and without `--speculative-tokens`, in turn. What the model says is written beforehand, so that
random weights will do: it computes every step and then says the next token of a script. The scripts are the prompt with
every twentieth token changed (an edit), and random tokens. Figures are tokens a second, medians of the rounds.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from collections.abc import Sequence as Seq
from pathlib import Path
from typing import Any

import numpy as np
from engine import Bench  # the file beside this one

from sensorium.engine.sampler import Sampled
from sensorium.engine.scheduler import Scheduler
from sensorium.types import EngineRequest, Prompt, SamplingParams


class Scripted:
    """One engine whose sequences say what `scripts` have for them."""

    def __init__(self, bench: Bench, clock: Callable[[], float] = time.perf_counter) -> None:
        self.bench = bench
        self.clock = clock
        self.scripts: dict[int, list[int]] = {}
        self._number = 0
        sampler = bench.engine.runner._sampler
        sample = sampler.sample

        def say(logits: Any, sequences: Seq[Any], ahead: Seq[list[int]] = ()) -> Sampled:
            sample(logits, sequences, ahead)
            places = [seq.num_outputs + (len(ahead[i]) if ahead else 0) for i, seq in enumerate(sequences)]
            return Sampled([self.scripts[seq.id][at] for seq, at in zip(sequences, places, strict=True)])

        sampler.sample = say  # type: ignore[method-assign]

    def rate(self, pairs: Seq[tuple[np.ndarray, list[int]]]) -> float:
        """Tokens a second of answers to all prompts at once, from the first token of the last one on."""
        for prompt, script in pairs:
            self._number += 1
            self.scripts[self._number] = script
            params = SamplingParams(max_tokens=len(script), temperature=0.0)
            self.bench.core._add(EngineRequest(self._number, Prompt(prompt), params))
        scheduler: Scheduler = self.bench.engine.scheduler
        while scheduler.waiting or scheduler.prefilling:
            self.bench.core.turn()
        left = sum(len(script) for _, script in pairs) - sum(seq.num_outputs for seq in scheduler.decoding)
        start = self.clock()
        while scheduler.has_work():
            self.bench.core.turn()
        return left / (self.clock() - start)


def pairs(kind: str, count: int, tokens: int, random: np.random.Generator) -> list[tuple[np.ndarray, list[int]]]:
    made = []
    for _ in range(count):
        prompt = random.integers(300, 5000, tokens).astype(np.int32)
        script = prompt.copy() if kind == "edit" else random.integers(300, 5000, tokens).astype(np.int32)
        if kind == "edit":
            script[19::20] = random.integers(300, 5000, len(script[19::20]))
        made.append((prompt, script.tolist()))
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--quantization", choices=("int8", "int4"))
    parser.add_argument("--threads", type=int)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--tokens", type=int, default=200, help="of each prompt and answer")
    parser.add_argument("--at-once", type=int, nargs="*", default=[1, 8])
    found = parser.parse_args()
    engines = [
        Scripted(Bench(found.checkpoint, found.quantization, found.threads, speculative_tokens=most))
        for most in (0, 16)
    ]
    print("| answer | at once | without, tok/s | with, tok/s | ratio of the rounds |\n|---|---|---|---|---|")
    for kind in ("edit", "random"):
        for count in found.at_once:
            rates: list[list[float]] = []
            for number in range(found.rounds + 1):
                asked = pairs(kind, count, found.tokens, np.random.default_rng(number))
                rates.append([engine.rate(asked) for engine in engines])
            plain, guessing = (statistics.median(one) for one in zip(*rates[1:], strict=True))
            ratio = statistics.median(b / a for a, b in rates[1:])
            print(f"| {kind} | {count} | {plain:.1f} | {guessing:.1f} | {ratio:.2f} |", flush=True)


if __name__ == "__main__":
    main()
