"""How long the first grammar keeps the engine's other threads from running: `python benchmarks/grammar_lock.py FOLDER`.

Opens the checkpoint's tokenizer for grammars in both ways, beside a thread that sleeps a millisecond at a time and
notes how late it wakes up; and alone, for what the machine does to it anyway. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

from sensorium.checkpoint.configs import open_checkpoint
from sensorium.engine import grammars
from sensorium.prompt.tokenizer import Tokenizer
from sensorium.types import Vocabulary

NAP_S = 0.001


def gaps(act: Callable[[], object]) -> list[float]:
    """Seconds between two looks at the clock of a thread that ran beside it, longest first."""
    found: list[float] = []
    done = threading.Event()

    def look() -> None:
        last = time.perf_counter()
        while not done.wait(NAP_S):
            now = time.perf_counter()
            found.append(now - last)
            last = now

    watch = threading.Thread(target=look)
    watch.start()
    act()
    done.set()
    watch.join()
    return sorted(found, reverse=True)


def ways(vocabulary: Vocabulary, vocab_size: int) -> dict[str, Callable[[], object]]:
    held = grammars.Grammars(vocab_size, lambda: None)
    return {
        "alone": lambda: time.sleep(2),
        "process of its own": lambda: held.open(vocabulary),
        "in the engine": lambda: grammars.open_tokenizer(vocabulary, vocab_size),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    found = parser.parse_args()
    checkpoint = open_checkpoint(found.folder)
    tokenizer = Tokenizer.from_folder(found.folder, vocab_size=checkpoint.vocab_size)
    vocabulary = tokenizer.vocabulary(checkpoint.stop_token_ids)
    if vocabulary is None:
        sys.exit("The tokens of this checkpoint have no bytes of their own.")
    for name, act in ways(vocabulary, checkpoint.vocab_size).items():
        started, cpu = time.perf_counter(), time.process_time()
        longest = gaps(act)
        print(
            f"{name:20} {time.perf_counter() - started:6.2f} s, {time.process_time() - cpu:5.2f} s of a processor, "
            f"longest gaps {', '.join(f'{1000 * gap:.1f}' for gap in longest[:3])} ms"
        )


if __name__ == "__main__":
    main()
