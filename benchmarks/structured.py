"""What structured output costs: `python benchmarks/structured.py BASE_URL [--rounds 5] [--requests 64]`.

Against a running server: tokens per second at a concurrency of 16 without and with a form, in turn, and the longest
time per output token; then how long pieces of other streams wait while a grammar of 100 kB is compiled. Every answer
is cut by `max_tokens`, so that all have the same length. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from typing import Any

from sensorium.cli.bench import Sample, closed_loop, send
from sensorium.cli.client import Endpoint, Remote
from sensorium.cli.loads import Request, chat_request, text

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string"},
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "colours": {"type": "array", "items": {"enum": ["red", "green", "blue"]}, "minItems": 2},
    },
    "required": ["name", "age", "colours"],
    "additionalProperties": False,
}
FORMS: dict[str, dict[str, Any]] = {
    "none": {"ignore_eos": True},
    "regex": {"structured_outputs": {"regex": "[a-zA-Z ,.]{4000,}"}},
    "schema": {"structured_outputs": {"json": {"type": "array", "items": PERSON, "minItems": 1000}}},
}


def request(model: str, rng: random.Random, tokens: int, form: dict[str, Any]) -> Request:
    return chat_request(model, text(rng, 12), tokens, temperature=1, **form)


async def load(remote: Remote, requests: list[Request], concurrency: int) -> tuple[float, list[Sample]]:
    """(output tokens per second, the samples)"""
    samples: list[Sample] = []
    started = time.perf_counter()
    await closed_loop(remote, requests, concurrency, samples.append)
    seconds = time.perf_counter() - started
    if failed := [sample.error for sample in samples if sample.error]:
        raise SystemExit(f"{len(failed)} requests failed: {failed[0]}")
    return sum(sample.output_tokens for sample in samples) / seconds, samples


async def throughput(remote: Remote, model: str, found: argparse.Namespace, rng: random.Random) -> None:
    rates: dict[str, list[float]] = {name: [] for name in FORMS}
    tpots: dict[str, list[float]] = {name: [] for name in FORMS}
    for number in range(found.rounds + 1):
        for name, form in FORMS.items():
            requests = [request(model, rng, found.tokens, form) for _ in range(found.requests)]
            rate, samples = await load(remote, requests, found.concurrency)
            if number:  # the first warms everything
                rates[name].append(rate)
                tpots[name] += [sample.tpot_s for sample in samples]
    for name in FORMS:
        ratio = statistics.median(one / plain for one, plain in zip(rates[name], rates["none"], strict=True))
        middle, most = statistics.median(tpots[name]), max(tpots[name])
        print(
            f"{name:8} {statistics.median(rates[name]):8.0f} tok/s  x{ratio:.2f}  "
            f"TPOT {1000 * middle:.2f} ms, most {1000 * most:.2f} ms (x{most / middle:.2f})"
        )


def large_grammar(rng: random.Random, size: int = 100_000) -> str:
    """Lark of so many bytes, another one each time."""
    words = (f'"{text(rng, 1)} {place}"' for place in range(size))
    source = "start: WORD+\nWORD: " + next(words)
    while len(source) < size:
        source += " | " + next(words)
    return source


async def stall(remote: Remote, model: str, found: argparse.Namespace, rng: random.Random) -> None:
    """The longest wait between two pieces of four streams, without and beside a large grammar that is compiled."""
    for name in ("alone", "beside grammars"):
        gaps: list[float] = []
        for _ in range(found.rounds):
            requests = [request(model, rng, found.long, FORMS["none"]) for _ in range(4)]
            form = {"guided_grammar": large_grammar(rng)}  # before: it takes this process 15 ms
            running = [asyncio.ensure_future(send(remote, one)) for one in requests]
            await asyncio.sleep(0.2)
            if name != "alone":
                sample = await send(remote, request(model, rng, 2, form))
                if sample.error:
                    raise SystemExit(sample.error)
            for sample in await asyncio.gather(*running):
                gaps += sample.gaps_s
        gaps.sort()
        print(
            f"{name:16} gaps: median {1000 * statistics.median(gaps):.2f} ms, "
            f"99.9 % {1000 * gaps[int(len(gaps) * 0.999)]:.1f} ms, most {1000 * gaps[-1]:.1f} ms"
        )


async def run(found: argparse.Namespace) -> None:
    rng = random.Random(found.seed)
    async with Remote(Endpoint.parse(found.base_url)) as remote:
        model = (await remote.models())[0]
        await throughput(remote, model, found, rng)
        await stall(remote, model, found, rng)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base_url")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=128, help="of an answer")
    parser.add_argument(
        "--long", type=int, default=1000, help="tokens of the streams beside which a grammar is compiled"
    )
    parser.add_argument("--seed", type=int, default=int(time.time()))
    asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    main()
