"""A server of several models under a memory budget that holds only some: mixed requests, then loads and unloads.

    python benchmarks/catalog_models.py FOLDER
    sensorium serve --models-dir FOLDER --memory SIZE --port 8000 &
    python benchmarks/catalog.py http://127.0.0.1:8000 --pid PID [--requests 2000] [--cycles 200] [--clients 16]
    python benchmarks/catalog.py http://127.0.0.1:8000 --pid PID --all

Every model gets a request of its task: a chat with an image if it sees any, an embedding, a ranking, a transcription.
Reports what failed, and how the memory, descriptors and processes of the server's whole family changed from the first
cycle on to the last. With --all: what every process takes when all models are loaded and have answered, under a budget
that holds them.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import io
import random
import time
import wave
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
from PIL import Image

from sensorium.system.processes import family, resident_bytes
from sensorium.units import decimal_text

MOST_GROWTH_BYTES = 20 * 1024 * 1024


def silence(seconds: float = 0.5) -> bytes:
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setnchannels(1)
        file.setsampwidth(2)
        file.setframerate(16_000)
        file.writeframes(bytes(2 * int(16_000 * seconds)))
    return buffer.getvalue()


SOUND = silence()


def picture(number: int) -> list[dict[str, Any]]:
    """Another one for every number."""
    buffer = io.BytesIO()
    Image.new("RGB", (64, 64), (number % 256, number // 256 % 256, 0)).save(buffer, "PNG")
    address = "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
    return [{"type": "image_url", "image_url": {"url": address}}]


async def ask(client: httpx.AsyncClient, model: dict[str, Any], number: int) -> int:
    """One request of the first task that the model does; its status."""
    name, tasks = model["id"], model["tasks"]
    text = f"request {number}"
    if "generate" in tasks:
        content: Any = [{"type": "text", "text": text}, *picture(number)] if "image" in model["modalities"] else text
        body = {"model": name, "messages": [{"role": "user", "content": content}], "max_tokens": 4}
        reply = await client.post("/v1/chat/completions", json=body)
    elif "transcribe" in tasks:
        files = {"file": ("a.wav", SOUND)}
        reply = await client.post("/v1/audio/transcriptions", data={"model": name, "language": "en"}, files=files)
    elif "score" in tasks:
        reply = await client.post("/v1/rerank", json={"model": name, "query": text, "documents": ["one", "two"]})
    else:
        reply = await client.post("/v1/embeddings", json={"model": name, "input": text})
    if reply.status_code != 200:
        print(name, reply.status_code, reply.text[:300])
    return reply.status_code


async def mixed(
    client: httpx.AsyncClient, models: list[dict[str, Any]], count: int, clients: int, stay: float = 0.9
) -> Counter[int]:
    """A client stays with its model for a while, as conversations do."""
    numbers, statuses = iter(range(count)), Counter[int]()

    async def one(seed: int) -> None:
        chance = random.Random(seed)
        model = chance.choice(models)
        for number in numbers:
            if chance.random() > stay:
                model = chance.choice(models)
            statuses[await ask(client, model, number)] += 1

    await asyncio.gather(*map(one, range(clients)))
    return statuses


@dataclass(frozen=True, slots=True)
class Held:
    """What the server's processes have now."""

    http_bytes: int
    family_bytes: int
    descriptors: int
    processes: int

    @classmethod
    def of(cls, pid: int) -> Held:
        pids = family(pid)
        return cls(resident_bytes([pid]), resident_bytes(pids), len(list(Path(f"/proc/{pid}/fd").iterdir())), len(pids))

    def __str__(self) -> str:
        return (
            f"HTTP process {decimal_text(self.http_bytes)}, all {decimal_text(self.family_bytes)}, "
            f"{self.descriptors} descriptors, {self.processes} processes"
        )


async def cycles(client: httpx.AsyncClient, models: list[dict[str, Any]], count: int, pid: int) -> tuple[Held, Held]:
    """Load, ask, unload, in turn. What is held with nothing loaded: after a few cycles, and after all."""
    first = Held.of(pid)
    warm = 2 * len(models)
    for number in range(count + warm):
        model = models[number % len(models)]
        for path in ("load", None, "unload"):
            if path is None:
                await ask(client, model, number)
            else:
                (await client.post(f"/v1/models/{path}", json={"model": model["id"]})).raise_for_status()
        if number == warm - 1:
            first = Held.of(pid)
            print(f"after {warm} cycles: {first}", flush=True)
    return first, Held.of(pid)


async def together(client: httpx.AsyncClient, models: list[dict[str, Any]], pid: int) -> None:
    for path in ("load", None):
        for number, model in enumerate(models):
            if path is None:
                await ask(client, model, number)
            else:
                (await client.post(f"/v1/models/{path}", json={"model": model["id"]})).raise_for_status()
    rows = (await client.get("/v1/models")).json()["data"]
    loaded = [row["memory"] for row in rows if row["state"] == "ready"]
    weights, caches = (sum(memory[name] for memory in loaded) for name in ("weights", "kv_cache"))
    for one in family(pid):
        command = Path(f"/proc/{one}/cmdline").read_text().split("\0")
        name = next((word for word in command if word.startswith("sensorium.")), "HTTP process")
        print(f"{name}: {decimal_text(resident_bytes([one]))}")
    print(f"{len(loaded)} models, weights {decimal_text(weights)}, KV caches {decimal_text(caches)}: {Held.of(pid)}")


async def run(arguments: argparse.Namespace) -> int:
    headers = {"Authorization": f"Bearer {arguments.key}"} if arguments.key else {}
    async with httpx.AsyncClient(base_url=arguments.url, timeout=600, headers=headers) as client:
        models = (await client.get("/v1/models")).json()["data"]
        print("models:", ", ".join(model["id"] for model in models), flush=True)
        if arguments.all:
            await together(client, models, arguments.pid)
            return 0
        begun_s = time.perf_counter()
        statuses = await mixed(client, models, arguments.requests, arguments.clients)
        print(f"{arguments.requests} requests in {time.perf_counter() - begun_s:.0f} s: {dict(statuses)}", flush=True)
        print(f"then: {Held.of(arguments.pid)}", flush=True)
        for model in models:
            await client.post("/v1/models/unload", json={"model": model["id"]})
        first, last = await cycles(client, models, arguments.cycles, arguments.pid)
        print(f"after {arguments.cycles} more: {last}")
    grew = last.family_bytes - first.family_bytes
    leaks = grew > MOST_GROWTH_BYTES or last.descriptors > first.descriptors or last.processes > first.processes
    return 1 if leaks or set(statuses) != {200} else 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("url")
    parser.add_argument("--pid", type=int, required=True, help="of the server")
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--cycles", type=int, default=200)
    parser.add_argument("--all", action="store_true", help="only what all take together")
    parser.add_argument("--key", help="an operator's key")
    return asyncio.run(run(parser.parse_args()))


if __name__ == "__main__":
    raise SystemExit(main())
