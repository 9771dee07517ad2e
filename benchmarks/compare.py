"""Two servers, one checkpoint, the same loads in turn: a table of medians and ratios.

    python benchmarks/compare.py CHECKPOINT --theirs "COMMAND" [--preset tiny|2b] [--rounds 3] [--into FILE]

Every round starts each server afresh, measures how long it takes until it answers, sends the loads, reads the memory of
all its processes and stops it. Commands may contain {model} and {port}. See docs/benchmarks.md.
"""

from __future__ import annotations

import argparse
import asyncio
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from sensorium.cli import bench
from sensorium.cli.client import Endpoint, Remote, RemoteError
from sensorium.cli.loads import chat_request
from sensorium.config import BenchConfig
from sensorium.system.processes import family, resident_bytes

OURS = f"{shlex.quote(sys.executable)} -m sensorium serve {{model}} --port {{port}}"
PRESETS = {
    "tiny": ("text:4:1:64", "text:128:32:64", "image:64:32:32"),
    "2b": ("text:2:1:32", "image:2:1:32", "text:8:8:32", "image:8:8:32"),
}
START_TIMEOUT_S = 900.0


@dataclass(frozen=True, slots=True)
class Load:
    """`KIND:REQUESTS:CONCURRENCY:OUTPUT_TOKENS`."""

    kind: str
    requests: int
    concurrency: int
    output_tokens: int

    @classmethod
    def parse(cls, text: str) -> Load:
        kind, *numbers = text.split(":")
        return cls(kind, *map(int, numbers))

    @property
    def title(self) -> str:
        return f"{self.kind}, {self.requests} requests, {self.concurrency} at a time, {self.output_tokens} tokens each"


@dataclass(slots=True)
class Figures:
    """What one server showed, over all rounds."""

    ready_s: list[float] = field(default_factory=list)
    first_answer_s: list[float] = field(default_factory=list)
    idle_bytes: list[int] = field(default_factory=list)
    loaded_bytes: list[int] = field(default_factory=list)
    loads: dict[Load, list[dict[str, Any]]] = field(default_factory=dict)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@contextmanager
def running(command: str, model: Path, log: Path) -> Iterator[tuple[int, str]]:
    """(pid, address) of a server in its own session; stopped, all of it, at the end."""
    port = free_port()
    words = [word.replace("{model}", str(model)).replace("{port}", str(port)) for word in shlex.split(command)]
    with log.open("ab") as output:
        process = subprocess.Popen(words, stdout=output, stderr=output, start_new_session=True)
    try:
        yield process.pid, f"http://127.0.0.1:{port}"
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def until(try_once: Callable[[], bool], pid: int, log: Path) -> float:
    """Seconds until something works; ends the program when the server died."""
    start_s = time.perf_counter()
    while time.perf_counter() - start_s < START_TIMEOUT_S:
        if try_once():
            return time.perf_counter() - start_s
        if not Path(f"/proc/{pid}/exe").exists():
            break
        time.sleep(0.02)
    sys.exit(f"the server did not start:\n{log.read_text(errors='replace')[-2000:]}")


def lists_models(address: str) -> bool:
    async def ask() -> bool:
        async with Remote(Endpoint.parse(address), timeout_s=5) as remote:
            return bool(await remote.models())

    try:
        return asyncio.run(ask())
    except RemoteError:
        return False


def answers(address: str) -> bool:
    async def ask() -> bool:
        async with Remote(Endpoint.parse(address), timeout_s=300) as remote:
            body = chat_request((await remote.models())[0], "hello", 1)
            return not (await bench.send(remote, body)).error

    return asyncio.run(ask())


@dataclass(slots=True)
class Side:
    """One of the two servers: how it is started, and what it showed."""

    name: str
    command: str
    log: Path
    figures: Figures = field(default_factory=Figures)
    pid: int = 0
    address: str = ""

    @contextmanager
    def started(self, model: Path, settle_s: float) -> Iterator[None]:
        with running(self.command, model, self.log) as (self.pid, self.address):
            ready_s = until(lambda: lists_models(self.address), self.pid, self.log)
            self.figures.ready_s.append(ready_s)
            self.figures.first_answer_s.append(ready_s + until(lambda: answers(self.address), self.pid, self.log))
            self.figures.idle_bytes.append(resident_bytes(family(self.pid)))
            time.sleep(settle_s)
            yield
            self.figures.loaded_bytes.append(resident_bytes(family(self.pid)))

    def bear(self, load: Load, seed: int) -> None:
        config = BenchConfig(
            base_url=self.address,
            kind=load.kind,
            requests=load.requests,
            input_tokens=120,
            warmup=1,
            concurrency=load.concurrency,
            output_tokens=load.output_tokens,
            seed=seed,
        )
        result = asyncio.run(bench.run(config))
        self.figures.loads.setdefault(load, []).append(result)
        print(
            f"    {self.name}: {load.title}: {result['output_tokens_per_s']} tok/s, "
            f"TTFT {result['ttft_ms']['p50']} ms, TPOT {result['tpot_ms']['p50']} ms, "
            f"errors {result['errors'] or 'none'}",
            flush=True,
        )


def in_turn(sides: list[Side], found: argparse.Namespace, loads: list[Load]) -> None:
    """Each starts, bears all loads and stops, then the other."""
    for number in range(found.rounds):
        print(f"round {number + 1}", flush=True)
        for side in sides:
            with side.started(found.checkpoint, found.settle):
                for index, load in enumerate(loads):
                    side.bear(load, 100 * number + index)


def together(sides: list[Side], found: argparse.Namespace, loads: list[Load]) -> None:
    """Both are there all the time and take turns load by load, each first in every other round."""
    with ExitStack() as stack:
        for side in sides:
            stack.enter_context(side.started(found.checkpoint, found.settle))
        for number in range(found.rounds):
            print(f"round {number + 1}", flush=True)
            for index, load in enumerate(loads):
                for side in sides[:: -1 if number % 2 else 1]:
                    side.bear(load, 100 * number + index)


METRICS: tuple[tuple[str, Callable[[dict[str, Any]], float], bool], ...] = (
    ("TTFT p50, ms", lambda r: r["ttft_ms"]["p50"], False),
    ("TPOT p50, ms", lambda r: r["tpot_ms"]["p50"], False),
    ("output tok/s", lambda r: r["output_tokens_per_s"], True),
)


def short(value: float) -> str:
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def table(ours: Figures, theirs: Figures, name: str) -> str:
    """Markdown: medians, and the median of the rounds' ratios. Above 1 is in our favour, whatever the figure."""
    rows = [f"| | | sensorium | {name} | ratio |", "|---|---|---|---|---|"]

    def row(load: str, title: str, a: list[float], b: list[float], more_is_better: bool) -> None:
        ratios = [x / y if more_is_better else y / x for x, y in zip(a, b, strict=True) if x and y]
        rows.append(f"| {load} | {title} | {short(median(a))} | {short(median(b))} | {median(ratios or [0.0]):.2f} |")

    for title, values, scale in (
        ("listens after, s", "ready_s", 1.0),
        ("first answer after, s", "first_answer_s", 1.0),
        ("resident before the loads, MB", "idle_bytes", 1e-6),
        ("resident after the loads, MB", "loaded_bytes", 1e-6),
    ):
        mine, others = ([value * scale for value in getattr(side, values)] for side in (ours, theirs))
        row("", title, mine, others, False)
    for load, results in ours.loads.items():
        for title, figure, more in METRICS:
            row(load.title, title, [*map(figure, results)], [*map(figure, theirs.loads[load])], more)
    return "\n".join(rows)


def write_into(file: Path, marker: str, text: str) -> None:
    """Replace what stands between the markers of this table."""
    pattern = re.compile(rf"(<!-- begin {marker} -->\n).*?(\n<!-- end {marker} -->)", re.DOTALL)
    changed, count = pattern.subn(lambda match: match[1] + text + match[2], file.read_text())
    if count != 1:
        raise SystemExit(f"{file} has no markers for {marker}")
    file.write_text(changed)


def main() -> None:
    parser = argparse.ArgumentParser(description="Compare two servers on one checkpoint.")
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--theirs", required=True, help="start command of the other server, with {model} and {port}")
    parser.add_argument("--ours", default=OURS, help="start command of this server")
    parser.add_argument("--name", default="vLLM", help="the other server's name in the table")
    parser.add_argument("--preset", choices=PRESETS, default="tiny", help="which loads")
    parser.add_argument("--load", action="append", help="KIND:REQUESTS:CONCURRENCY:OUTPUT_TOKENS, instead of a preset")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--together",
        action="store_true",
        help="both servers run all the time and take turns load by load: fair where the machine's "
        "speed changes, if memory is enough and neither computes while it has nothing to do",
    )
    parser.add_argument("--settle", type=float, default=0, help="seconds between first answer and loads")
    parser.add_argument("--into", type=Path, help="write the table between this file's <!-- begin PRESET --> markers")
    found = parser.parse_args()
    loads = [Load.parse(text) for text in found.load or PRESETS[found.preset]]
    with tempfile.TemporaryDirectory() as folder:
        sides = [
            Side("Sensorium", found.ours, Path(folder) / "ours"),
            Side(found.name, found.theirs, Path(folder) / "theirs"),
        ]
        (together if found.together else in_turn)(sides, found, loads)
    text = table(sides[0].figures, sides[1].figures, found.name)
    print(text)
    if found.into:
        write_into(found.into, found.preset, text)


if __name__ == "__main__":
    main()
