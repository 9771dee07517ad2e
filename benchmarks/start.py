"""What a start costs in each of several trees of this project, in turn: seconds, processor seconds, resident memory.

    python benchmarks/start.py TREE [TREE ...] [--rounds 5] [--model CHECKPOINT] [--serve "--kv-cache-memory 64MiB"]

Every TREE has its own `.venv`. Prints the medians: seconds until `/v1/models` answers; processor seconds of all
processes until then, which other programs on the machine disturb least; resident memory (PSS, all processes) after
eight short completions. The first start of each is not counted: it compiles and fills caches. PYTHONDONTWRITEBYTECODE
must not be set, or every start compiles all modules anew.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import msgspec
from compare import lists_models, running, until

from sensorium.cli import bench
from sensorium.cli.client import Endpoint, Remote
from sensorium.cli.loads import Request
from sensorium.system.processes import family, resident_bytes

TICKS = os.sysconf("SC_CLK_TCK")


def processor_s(pids: Sequence[int]) -> float:
    """User and system time of these processes so far."""
    fields = [Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split() for pid in pids]
    return sum(int(one[11]) + int(one[12]) for one in fields) / TICKS


async def complete(url: str, count: int) -> None:
    async with Remote(Endpoint.parse(url)) as remote:
        body = {"model": (await remote.models())[0], "prompt": "What do you see?", "max_tokens": 16}
        for _ in range(count):
            sample = await bench.send(remote, Request("/completions", msgspec.json.encode(body), streams=False))
            if sample.error:
                raise SystemExit(sample.error)


def start(tree: Path, model: str, flags: str) -> tuple[float, float, float]:
    """(seconds, processor seconds, MB) of one start."""
    command = f"{tree}/.venv/bin/sensorium serve {model} --port {{port}} {flags}"
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        with running(command, Path(model), log) as (pid, url):
            seconds = until(lambda: lists_models(url), pid, log)
            processor = processor_s(family(pid))
            asyncio.run(complete(url, 8))
            return seconds, processor, resident_bytes(family(pid)) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trees", type=Path, nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--model", default="", help="the built-in one without it")
    parser.add_argument("--serve", default="--kv-cache-memory 64MiB", help="flags of serve")
    found = parser.parse_args()
    if os.environ.get("PYTHONDONTWRITEBYTECODE"):
        sys.exit("PYTHONDONTWRITEBYTECODE is set: every start would compile all modules")
    figures: dict[Path, list[tuple[float, float, float]]] = {tree.resolve(): [] for tree in found.trees}
    for number in range(found.rounds + 1):
        for tree, rows in figures.items():
            row = start(tree, found.model, found.serve)
            if number:
                rows.append(row)
                print(f"{tree}: ready after {row[0]:.2f} s, {row[1]:.2f} processor s, {row[2]:.0f} MB", flush=True)
    first, *_ = middles = [
        [statistics.median(column) for column in zip(*rows, strict=True)] for rows in figures.values()
    ]
    for tree, middle in zip(figures, middles, strict=True):
        ratios = ", ".join(f"{value / base:.2f}" for value, base in zip(middle, first, strict=True))
        print(f"{tree}: {middle[0]:.2f} s, {middle[1]:.2f} processor s, {middle[2]:.0f} MB; to the first {ratios}")


if __name__ == "__main__":
    main()
