"""The same chats and prompts through HTTP, through `run-batch` and through `LLM`, in turn, with one model.

    python benchmarks/offline.py CHECKPOINT [--requests 1000] [--rounds 3] [--concurrency 64] [--serve "--threads 1"]

Prints output tokens a second of each, the medians of the rounds: of a closed loop of streams against a server (what
`sensorium bench serve` does), of `run-batch` in process (without its start, as it tells it), of `LLM.generate`. The
first two answer chats, the last one prompts, which a closed loop of completions answers as well.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
from compare import lists_models, running, until

from sensorium import LLM, SamplingParams
from sensorium.cli import bench
from sensorium.cli.client import Endpoint, Remote
from sensorium.cli.loads import Request, chat_request, text

RATE = re.compile(r"output tokens \(([0-9.]+) a second\)")
OUTPUT_TOKENS = 64


def completion_request(model: str, prompt: str) -> Request:
    body = {"model": model, "prompt": prompt, "max_tokens": OUTPUT_TOKENS, "temperature": 0, "ignore_eos": True}
    return Request("/completions", msgspec.json.encode({**body, "stream": False}), streams=False)


async def over_http(url: str, requests: Sequence[Request], concurrency: int) -> float:
    """Output tokens a second; every request has as many."""
    async with Remote(Endpoint.parse(url)) as remote:
        samples: list[bench.Sample] = []
        begun_s = time.perf_counter()
        await bench.closed_loop(remote, requests, concurrency, samples.append)
        seconds = time.perf_counter() - begun_s
    if errors := [one.error for one in samples if one.error]:
        raise SystemExit(errors[0])
    return OUTPUT_TOKENS * len(samples) / seconds


def run_batch(model: str, flags: Sequence[str], bodies: Sequence[bytes], folder: Path) -> float:
    lines = [
        {"custom_id": str(number), "url": "/v1/chat/completions", "body": {**json.loads(body), "stream": False}}
        for number, body in enumerate(bodies)
    ]
    for line in lines:
        line["body"].pop("stream_options", None)  # type: ignore[attr-defined]  # it is a dictionary
    (folder / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    command = ["run-batch", "-i", str(folder / "in.jsonl"), "-o", str(folder / "out.jsonl"), "--overwrite", model]
    done = subprocess.run(
        [sys.executable, "-m", "sensorium", *command, *flags], capture_output=True, text=True, check=False
    )
    found = RATE.search(done.stderr)
    if found is None:
        raise SystemExit(done.stderr)
    return float(found[1])


def generate(llm: LLM, prompts: list[str]) -> float:
    params = SamplingParams(temperature=0, max_tokens=OUTPUT_TOKENS, ignore_eos=True)
    begun_s = time.perf_counter()
    found = llm.generate(prompts, params, use_tqdm=False)
    seconds = time.perf_counter() - begun_s
    return sum(len(one.outputs[0].token_ids) for one in found) / seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--requests", type=int, default=1000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--concurrency", type=int, default=64)
    parser.add_argument("--input-words", type=int, default=32)
    parser.add_argument("--serve", default="", help="flags of serve, for all of them")
    found = parser.parse_args()
    flags = shlex.split(found.serve)
    rates: dict[str, list[float]] = {}
    command = [
        sys.executable,
        "-m",
        "sensorium",
        "serve",
        "{model}",
        "--port",
        "{port}",
        "--disable-log-requests",
        *flags,
    ]
    given: dict[str, Any] = {}
    for flag, value in zip(flags[::2], flags[1::2], strict=True):
        given[flag.removeprefix("--").replace("-", "_")] = value
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        log = folder / "log"
        with running(shlex.join(command), found.model, log) as (pid, url), LLM(found.model, **given) as llm:
            until(lambda: lists_models(url), pid, log)
            for number in range(found.rounds):
                rng = random.Random(number)
                prompts = [text(rng, found.input_words) for _ in range(found.requests)]
                chats = [chat_request(found.model, one, OUTPUT_TOKENS) for one in prompts]
                plain = [completion_request(found.model, one) for one in prompts]
                batch = run_batch(found.model, flags, [one.body for one in chats], folder)
                rates.setdefault("run-batch", []).append(batch)
                chatted = asyncio.run(over_http(url, chats, found.concurrency))
                rates.setdefault("chats over HTTP", []).append(chatted)
                rates.setdefault("LLM.generate", []).append(generate(llm, prompts))
                completed = asyncio.run(over_http(url, plain, found.concurrency))
                rates.setdefault("completions over HTTP", []).append(completed)
                print({what: round(values[-1]) for what, values in rates.items()}, flush=True)
    middle = {what: statistics.median(values) for what, values in rates.items()}
    for what, rate in middle.items():
        print(f"{what:<22} {rate:10,.0f} tok/s")
    print(f"run-batch : chats over HTTP           {middle['run-batch'] / middle['chats over HTTP']:.2f}")
    print(f"LLM.generate : completions over HTTP  {middle['LLM.generate'] / middle['completions over HTTP']:.2f}")


if __name__ == "__main__":
    main()
