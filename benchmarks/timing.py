"""Whether the time of an answer tells one key what another key has sent: a server with two keys, asked in turn.

    sensorium serve MODEL --api-key KEY_A --api-key KEY_B --port 8000 &
    python benchmarks/timing.py http://127.0.0.1:8000 KEY_A KEY_B [--count 200] [--what image tokenize prompt schema]

KEY_A sends half of `--count` inputs. KEY_B then sends those and as many new ones, in pairs of random order. The
threshold on the time that tells them apart best is chosen on every second pair and judged on the others, and the other
way round: accuracy near 50 % is a guess. As a control KEY_A asks the same about inputs of its own, which are kept for
it: there the time may tell. For a model without images leave out image and tokenize.
"""

from __future__ import annotations

import argparse
import base64
import io
import random
import time
from collections.abc import Callable
from statistics import median
from typing import Any

import httpx
import numpy as np
from PIL import Image

WORDS = "red blue green circle square star one two three picture shows what where left right".split()
Probe = Callable[[int], tuple[str, dict[str, Any]]]


def image_url(number: int, side: int) -> str:
    """Noise: every number has an image of its own."""
    pixels = np.random.default_rng(number).integers(0, 256, (side, side, 3), np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG", compress_level=1)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def probes(side: int) -> dict[str, Probe]:
    """By name, what is sent of a number: path and body."""

    def shown(number: int) -> list[dict[str, Any]]:
        part = {"type": "image_url", "image_url": {"url": image_url(number, side)}}
        return [{"role": "user", "content": [part, {"type": "text", "text": "What is this?"}]}]

    def said(number: int) -> str:
        chosen = random.Random(number)
        return " ".join(chosen.choice(WORDS) for _ in range(600))

    def schema(number: int) -> dict[str, Any]:
        names = {f"field_{number}_{index}": {"type": "string", "maxLength": 20 + index} for index in range(20)}
        return {"type": "object", "properties": names, "required": list(names)}

    short = {"max_tokens": 1, "temperature": 0}
    hello = [{"role": "user", "content": "hello"}]
    return {
        "image": lambda number: ("/v1/chat/completions", {"messages": shown(number), **short}),
        "tokenize": lambda number: ("/tokenize", {"messages": shown(number)}),
        "prompt": lambda number: ("/v1/completions", {"prompt": said(number), **short}),
        "schema": lambda number: (
            "/v1/chat/completions",
            {"messages": hello, "structured_outputs": {"json": schema(number)}, **short},
        ),
    }


class Client:
    def __init__(self, url: str, key: str) -> None:
        self._http = httpx.Client(base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=300)

    def seconds(self, probe: Probe, number: int) -> float:
        path, body = probe(number)
        request = self._http.build_request("POST", path, json=body)
        start = time.perf_counter()
        self._http.send(request).raise_for_status()
        return time.perf_counter() - start


def asked_in_pairs(client: Client, probe: Probe, seen: list[int], new: list[int]) -> list[tuple[float, float]]:
    """(seconds for a seen input, for a new one), pair by pair."""
    pairs = []
    for one, other in zip(seen, new, strict=True):
        times = {number: client.seconds(probe, number) for number in random.sample([one, other], 2)}
        pairs.append((times[one], times[other]))
    return pairs


def accuracy(pairs: list[tuple[float, float]]) -> float:
    """Of the best threshold, chosen on every second pair and judged on the others; the mean of both ways."""
    halves = np.array(pairs[::2]), np.array(pairs[1::2])
    return float(np.mean([judged(*best(chosen), others) for chosen, others in (halves, halves[::-1])]))


def best(pairs: np.ndarray) -> tuple[float, bool]:
    """(threshold, whether seen inputs are the faster ones) that tells most of [pairs, 2] right."""
    times = np.sort(pairs, axis=None)
    thresholds = (times[1:] + times[:-1]) / 2
    return max(((t, faster) for t in thresholds for faster in (True, False)), key=lambda rule: judged(*rule, pairs))


def judged(threshold: float, faster: bool, pairs: np.ndarray) -> float:
    """Share of the inputs that the rule calls right."""
    is_fast = pairs < threshold
    return float(np.mean(is_fast == np.array([faster, not faster])))


def report(name: str, who: str, pairs: list[tuple[float, float]]) -> None:
    seen, new = (1000 * median(times) for times in zip(*pairs, strict=True))
    print(f"{name:9} {who:14} seen {seen:7.2f} ms  new {new:7.2f} ms  told apart {accuracy(pairs):6.1%}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("key_a")
    parser.add_argument("key_b")
    parser.add_argument("--count", type=int, default=200, help="inputs that KEY_B sends")
    parser.add_argument("--side", type=int, default=224, help="pixels of an image's side")
    parser.add_argument("--what", nargs="+", choices=tuple(probes(1)), default=tuple(probes(1)))
    options = parser.parse_args()
    first, second = Client(options.url, options.key_a), Client(options.url, options.key_b)
    half, start = options.count // 2, random.randrange(2**40)
    for name in options.what:
        probe, numbers = probes(options.side)[name], list(range(start, start + 3 * half))
        start += len(numbers)
        seen, new, others = numbers[:half], numbers[half : 2 * half], numbers[2 * half :]
        for client in (first, second):  # what is made once for each key is made
            client.seconds(probe, start + 10**9)
        for number in seen:
            first.seconds(probe, number)
        report(name, "another key's", asked_in_pairs(second, probe, seen, new))
        recent = seen[-16:]  # few enough to be kept by every cache
        for number in recent:
            first.seconds(probe, number)
        report(name, "its own", asked_in_pairs(first, probe, recent, others[: len(recent)]))


if __name__ == "__main__":
    main()
