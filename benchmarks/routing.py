"""What stands before replicas costs: time per request and tokens a second, of several addresses in turn.

    python benchmarks/routing.py http://127.0.0.1:8000 http://127.0.0.1:8123 [--rounds 5] [--plain] [--json FILE]

The first address is what the others are compared with: a server asked directly, or one replica. Small requests go one
after the other over one connection (GET /livez: the router's share, nothing is computed); answers of --tokens go
--clients at a time, as streams, or whole with --plain: a stream of a tiny model measures who carries its tokens, whole
answers measure who computes them. Rounds of the addresses alternate, so that a busy machine is as busy for each;
figures are medians of the rounds, and their ratios are what to keep. Beside them stands the processor time that each
kind of process took for a token, which a busy machine changes little.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import time
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import httpx

SMALL = 100  # requests of a round
TICKS_S = 1 / os.sysconf("SC_CLK_TCK")
KINDS = {  # of processes, by what one of their command lines has, the first that does
    "engine": ("sensorium.engine.loop",),
    "relay": ("ray::ServeReplica:sensorium:sensorium-relay",),
    "HTTP side": ("ray::ServeReplica", "sensorium serve"),
    "Ray's proxy": ("ray::ProxyActor",),
    "HAProxy": ("haproxy",),
    "Ray besides": ("ray::", "raylet", "gcs_server"),
}


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


class Rate(NamedTuple):
    tokens_s: float
    processor_us: Mapping[str, float]  # for a token, by kind of process


def processor_s() -> dict[str, float]:
    """That all processes of each kind, and this one as the client, have taken by now."""
    found = defaultdict(float, {"client": time.process_time()})
    for folder in Path("/proc").iterdir():
        if not folder.name.isdecimal() or folder.name == str(os.getpid()):
            continue
        try:
            words = (folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace")
            times = (folder / "stat").read_text().rpartition(")")[2].split()[11:13]
        except OSError:
            continue
        kind = next((kind for kind, parts in KINDS.items() if any(part in words for part in parts)), None)
        if kind is not None:
            found[kind] += TICKS_S * sum(map(float, times))
    return found


async def answer(host: str, port: int, request: bytes, *, is_plain: bool) -> None:
    """One, over a connection of its own, with as little work here as can be."""
    reader, writer = await asyncio.open_connection(host, port)
    writer.write(request)
    start = end = await reader.read(1 << 16)
    while piece := await reader.read(1 << 16):
        end = (end + piece)[-64:]
    writer.close()
    if b" 200 " not in start[:16] or (not is_plain and b"[DONE]" not in end):
        raise RuntimeError(f"answered {start[:200]!r} ... {end!r}")


async def tokens_a_second(url: str, headers: dict[str, str], load: Load) -> Rate:
    body = json.dumps(
        {
            "messages": [{"role": "user", "content": "tell me about a red circle"}],
            "max_tokens": load.tokens,
            "ignore_eos": True,
            "stream": not load.is_plain,
        }
    )
    parts = urlsplit(url)
    host, port = parts.hostname or "127.0.0.1", parts.port or 80
    own = {"Host": parts.netloc, "Content-Type": "application/json", "Content-Length": str(len(body)), **headers}
    lines = [f"POST {parts.path}/v1/chat/completions HTTP/1.1", "Connection: close"]
    request = "\r\n".join([*lines, *(f"{name}: {value}" for name, value in own.items()), "", body]).encode()
    left = list(range(load.requests))

    async def client() -> None:
        while left:
            left.pop()
            await answer(host, port, request, is_plain=load.is_plain)

    before, start = processor_s(), time.perf_counter()
    await asyncio.gather(*(client() for _ in range(load.clients)))
    seconds, tokens = time.perf_counter() - start, load.requests * load.tokens
    taken = {kind: one - before.get(kind, 0.0) for kind, one in processor_s().items()}
    return Rate(tokens / seconds, {kind: 1e6 * one / tokens for kind, one in taken.items() if one > 0})


async def measure(urls: list[str], headers: dict[str, str], rounds: int, load: Load) -> list[dict[str, Any]]:
    small: dict[str, list[float]] = {url: [] for url in urls}
    rates: dict[str, list[Rate]] = {url: [] for url in urls}
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
            "tokens_s": median(one.tokens_s for one in rates[url]),
            "ratio": median(mine.tokens_s / its.tokens_s for mine, its in zip(rates[url], rates[first], strict=True)),
            "processor_us": {
                kind: median(one.processor_us.get(kind, 0.0) for one in rates[url])
                for kind in dict.fromkeys(kind for one in rates[url] for kind in one.processor_us)
            },
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
        print("   us a token:", ", ".join(f"{kind} {one:.1f}" for kind, one in row["processor_us"].items()))
    if given.json is not None:
        given.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
