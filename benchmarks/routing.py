"""What stands before replicas costs: time per request and tokens a second, of several addresses in turn.

    python benchmarks/routing.py http://127.0.0.1:8000 http://127.0.0.1:8123 [--rounds 5] [--plain] [--json FILE]

The first address is what the others are compared with: a server asked directly, or one replica. Small requests go one
after the other over one connection (GET /livez: the router's share, nothing is computed); answers of --tokens go
--clients at a time, as streams, or whole with --plain: a stream of a tiny model measures who carries its tokens, whole
answers measure who computes them. Rounds of the addresses alternate, so that a busy machine is as busy for each;
figures are medians of the rounds, and their ratios are what to keep.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import time
from pathlib import Path
from statistics import median
from typing import NamedTuple

import httpx

SMALL = 100  # requests of a round


async def small_s(url: str, headers: dict[str, str]) -> float:
    """Median seconds of a request that computes nothing."""
    taken = []
    async with httpx.AsyncClient(timeout=60, headers=headers) as http:
        for _ in range(SMALL):
            start = time.perf_counter()
            (await http.get(f"{url}/livez")).raise_for_status()
            taken.append(time.perf_counter() - start)
    return median(taken)


class Load(NamedTuple):
    """`clients` ask for one answer of `tokens` after the other, until there were `requests`."""

    clients: int
    requests: int
    tokens: int
    is_plain: bool


async def tokens_a_second(url: str, headers: dict[str, str], load: Load) -> float:
    body = {
        "messages": [{"role": "user", "content": "tell me about a red circle"}],
        "max_tokens": load.tokens,
        "ignore_eos": True,
        "stream": not load.is_plain,
    }
    left = list(range(load.requests))

    async def client(http: httpx.AsyncClient) -> None:
        while left:
            left.pop()
            async with http.stream("POST", f"{url}/v1/chat/completions", json=body) as reply:
                async for _ in reply.aiter_raw():
                    pass
                reply.raise_for_status()

    limits = httpx.Limits(max_connections=load.clients)
    async with httpx.AsyncClient(timeout=600, headers=headers, limits=limits) as http:
        start = time.perf_counter()
        await asyncio.gather(*(client(http) for _ in range(load.clients)))
    return load.requests * load.tokens / (time.perf_counter() - start)


async def measure(urls: list[str], headers: dict[str, str], rounds: int, load: Load) -> list[dict[str, float | str]]:
    small: dict[str, list[float]] = {url: [] for url in urls}
    rates: dict[str, list[float]] = {url: [] for url in urls}
    for _ in range(rounds):
        for url in urls:
            small[url].append(await small_s(url, headers))
        for url in urls:
            rates[url].append(await tokens_a_second(url, headers, load))
    first = urls[0]
    return [
        {
            "url": url,
            "small_ms": 1000 * median(small[url]),
            "added_ms": 1000 * (median(small[url]) - median(small[first])),
            "tokens_s": median(rates[url]),
            "ratio": median(mine / its for mine, its in zip(rates[url], rates[first], strict=True)),
        }
        for url in urls
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("urls", nargs="+")
    parser.add_argument("--api-key")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--requests", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64, help="of an answer")
    parser.add_argument("--plain", action="store_true", help="whole answers instead of streams")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    headers = {"Authorization": f"Bearer {given.api_key}"} if given.api_key else {}
    load = Load(given.clients, given.requests, given.tokens, given.plain)
    found = asyncio.run(measure(given.urls, headers, given.rounds, load))
    for row in found:
        print(
            f"{row['url']:32} small {row['small_ms']:6.2f} ms ({row['added_ms']:+.2f}), {row['tokens_s']:8.0f} tok/s, "
            f"{row['ratio']:.2f} of the first"
        )
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
