"""Embeddings of 256 texts through each server and through sentence-transformers, in turn: texts per second.

    python benchmarks/embeddings.py --st PYTHON --vllm "COMMAND" [--rounds 3] [--dtypes float32 bfloat16]

The checkpoint is made first: the shape and module files of bge (base, small) or of Qwen3-Embedding (qwen3-0.6b, whose
vector is the last token's), random weights, a WordPiece vocabulary of made-up words. All sides of one type are up at
the same time and idle but for the one whose turn it is. Commands may contain {model}, {port} and {dtype}. See
docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from statistics import median
from typing import TypeAlias

import numpy as np
from compare import lists_models, running, until
from embedding_models import SHAPES, make_checkpoint, words
from numpy.typing import NDArray

from sensorium.cli.client import Endpoint, Remote

OURS = f"{shlex.quote(sys.executable)} -m sensorium serve {{model}} --port {{port}} --dtype {{dtype}}"
TOKENS = (20, 400)  # of a text, its two special ones included
PEER = Path(__file__).with_name("embeddings_peer.py")

Vectors: TypeAlias = NDArray[np.float32]
Side: TypeAlias = Callable[[list[str]], tuple[float, Vectors]]  # texts -> seconds, vectors [texts, size]
Peer: TypeAlias = Callable[[list[str], int], tuple[float, Vectors]]  # the same, with a batch size


# The texts


def make_texts(count: int, seed: int) -> list[str]:
    rng, vocabulary = random.Random(seed), words()
    return [" ".join(rng.choices(vocabulary, k=rng.randint(*TOKENS) - 2)) for _ in range(count)]


# The sides


@contextmanager
def served(command: str, model: Path, dtype: str, log: Path, per_request: int) -> Iterator[Side]:
    """A server; `per_request` texts to a request, all requests at once."""
    with ExitStack() as stack:
        if command.startswith("http://"):
            address = command
        else:
            pid, address = stack.enter_context(running(command.replace("{dtype}", dtype), model, log))
            until(lambda: lists_models(address), pid, log)

        async def ask(texts: list[str]) -> tuple[float, Vectors]:
            async with Remote(Endpoint.parse(address), timeout_s=900) as remote:
                name = (await remote.models())[0]
                start_s = time.perf_counter()
                answers = await asyncio.gather(
                    *(
                        remote.post("/embeddings", {"model": name, "input": texts[at : at + per_request]})
                        for at in range(0, len(texts), per_request)
                    )
                )
                seconds = time.perf_counter() - start_s
            return seconds, np.array([row["embedding"] for one in answers for row in one["data"]], np.float32)

        yield lambda texts: asyncio.run(ask(texts))


@contextmanager
def peer(python: str, model: Path, dtype: str, log: Path) -> Iterator[Peer]:
    """sentence-transformers in its own process: (texts, batch size) -> seconds, vectors."""
    with (
        log.open("ab") as output,
        subprocess.Popen(
            [python, str(PEER), str(model), dtype],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
        ) as process,
    ):
        if process.stdin is None or process.stdout is None:
            raise RuntimeError("no pipes")

        def ask(texts: list[str], batch_size: int) -> tuple[float, Vectors]:
            assert process.stdin is not None and process.stdout is not None
            into = log.with_suffix(".npy")
            print(
                json.dumps({"texts": texts, "batch_size": batch_size, "into": str(into)}),
                file=process.stdin,
                flush=True,
            )
            answer = process.stdout.readline()
            if not answer:
                sys.exit(f"sentence-transformers ended:\n{log.read_text(errors='replace')[-2000:]}")
            return json.loads(answer)["seconds"], np.load(into)

        yield ask
        process.stdin.close()


def lowest_cosine(vectors: Vectors, others: Vectors) -> float:
    wide, reference = vectors.astype(np.float64), others.astype(np.float64)
    dots = (wide * reference).sum(1) / np.linalg.norm(wide, axis=1) / np.linalg.norm(reference, axis=1)
    return float(dots.min())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ours", default=OURS, help="start command of this server, or its address if it is running")
    parser.add_argument("--st", metavar="PYTHON", help="a Python that has sentence-transformers")
    parser.add_argument("--vllm", metavar="COMMAND", help="the same of vLLM")
    parser.add_argument("--dtypes", nargs="+", default=["float32"], help="types to compare in")
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=[8, 16, 32, 64], help="of sentence-transformers")
    parser.add_argument("--per-request", type=int, default=256, help="texts to a request of a server")
    parser.add_argument("--texts", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--shape", choices=SHAPES, default="base")
    parser.add_argument("--checkpoint", type=Path, help="made here if it is not there, and kept")
    parser.add_argument("--json", type=Path, help="all runs, one per line, are added to this file")
    found = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        model = found.checkpoint or Path(temporary) / "model"
        if not model.exists():
            make_checkpoint(model, found.shape)
        for dtype in found.dtypes:
            compare(found, model, dtype, Path(temporary))


def compare(found: argparse.Namespace, model: Path, dtype: str, temporary: Path) -> None:
    some = make_texts(16, found.seed)
    with ExitStack() as stack:
        sides: dict[str, Side] = {}
        reference: Vectors | None = None
        if found.ours:
            sides["Sensorium"] = stack.enter_context(
                served(found.ours, model, dtype, temporary / f"ours-{dtype}", found.per_request)
            )
        if found.vllm:
            sides["vLLM"] = stack.enter_context(
                served(found.vllm, model, dtype, temporary / f"vllm-{dtype}", found.per_request)
            )
        if found.st:
            ask = stack.enter_context(peer(found.st, model, dtype, temporary / f"st-{dtype}"))
            reference = ask(some, 0)[1]
            for size in found.batch_sizes:
                sides[f"sentence-transformers, {size} at a time"] = lambda texts, size=size: ask(texts, size)
        for name, side in sides.items():  # warms up; the vectors are looked at here
            vectors = side(some)[1]
            if reference is not None:
                print(
                    f"{dtype}, {name}: lowest cosine to plain float32 {lowest_cosine(vectors, reference):.7f}, "
                    f"largest difference {np.abs(vectors - reference).max():.1e}",
                    flush=True,
                )
        rates: dict[str, list[float]] = {name: [] for name in sides}
        for number in range(1, found.rounds + 1):
            texts = make_texts(found.texts, found.seed + number)  # new ones: a decoder's prefix cache knows the last
            for name, side in sides.items():
                rates[name].append(len(texts) / side(texts)[0])
                print(f"    {dtype}, {name}: {rates[name][-1]:.2f} texts/s", flush=True)
                if found.json:
                    with found.json.open("a") as file:
                        print(json.dumps({"dtype": dtype, "side": name, "texts_per_s": rates[name][-1]}), file=file)
    ours = median(rates.get("Sensorium", [0.0]))
    print(f"\n| {dtype} | texts/s | Sensorium's to this |\n|---|---|---|")
    for name, all_rates in rates.items():
        print(
            f"| {name} | {median(all_rates):.2f} ({min(all_rates):.2f} to {max(all_rates):.2f}) "
            f"| {ours / median(all_rates):.2f}x |"
        )


if __name__ == "__main__":
    main()
