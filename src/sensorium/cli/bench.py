"""`sensorium bench serve`: load any OpenAI-compatible server and say how fast it answers.

Closed loop (`--concurrency`) or open loop (`--rate`, Poisson arrivals). Every request is different, so that no cache
can help. All bodies are made before the clock starts; the client does nothing per token but take the time.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import random
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import msgspec

from sensorium.cli.client import Endpoint, OnEvent, Remote, RemoteError
from sensorium.cli.loads import Load, Request
from sensorium.cli.progress import counting
from sensorium.config import BenchConfig
from sensorium.errors import StartupError


@dataclass(slots=True)
class Sample:
    """What one request showed. Times are of one monotonic clock."""

    start_s: float = 0.0
    end_s: float = 0.0
    chunk_times_s: list[float] = field(default_factory=list)  # arrival of every piece of text
    prompt_tokens: int = 0
    output_tokens: int = 0
    cached_tokens: int = 0
    error: str = ""

    @property
    def ttft_s(self) -> float:
        return (self.chunk_times_s[0] if self.chunk_times_s else self.end_s) - self.start_s

    @property
    def tpot_s(self) -> float:
        """Time per output token after the first."""
        if len(self.chunk_times_s) < 2:
            return 0.0
        return (self.chunk_times_s[-1] - self.chunk_times_s[0]) / max(1, self.output_tokens - 1)

    @property
    def gaps_s(self) -> list[float]:
        return [late - early for early, late in zip(self.chunk_times_s, self.chunk_times_s[1:], strict=False)]


class _Delta(msgspec.Struct):
    content: str | None = None
    reasoning_content: str | None = None
    tool_calls: list[msgspec.Raw] | None = None

    @property
    def says_something(self) -> bool:
        return bool(self.content or self.reasoning_content or self.tool_calls)


class _Choice(msgspec.Struct):
    delta: _Delta = msgspec.field(default_factory=_Delta)


class _Details(msgspec.Struct):
    cached_tokens: int | None = None


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    prompt_tokens_details: _Details | None = None


class _Chunk(msgspec.Struct):
    choices: list[_Choice] = []
    usage: _Usage | None = None
    error: dict[str, Any] | None = None


class _Whole(msgspec.Struct):
    usage: _Usage


_WHOLE = msgspec.json.Decoder(_Whole)
_CHUNK = msgspec.json.Decoder(_Chunk)


# The load


class Server(Protocol):
    """Whoever answers requests."""

    async def send(self, path: str, body: bytes) -> bytes:
        """The whole answer. RemoteError if it is an error."""

    async def stream(self, path: str, body: bytes, on_event: OnEvent) -> None: ...


async def words_per_token(remote: Server, load: Load) -> float:
    """How many of our words make a token of this model: two prompts of different length tell it, short ones where a
    model's context is shorter (CLIP takes 77 tokens)."""
    error = ""
    for few, many in ((32, 160), (2, 8)):
        samples = [await send(remote, load.probe(num_words)) for num_words in (many, few)]
        error = next((sample.error for sample in samples if sample.error), "")
        if not error:
            more = samples[0].prompt_tokens - samples[1].prompt_tokens
            return (many - few) / more if more > 0 else 1.0
    raise RemoteError(error)


async def send(remote: Server, request: Request) -> Sample:
    """Send one request and take the time of everything that comes back. Never raises for what the server does."""
    sample = Sample(start_s=time.perf_counter())
    try:
        if request.streams:
            await remote.stream(request.path, request.body, lambda data: _take_event(sample, data))
        else:
            usage = _WHOLE.decode(await remote.send(request.path, request.body)).usage
            sample.prompt_tokens, sample.output_tokens = usage.prompt_tokens, usage.completion_tokens
    except RemoteError as error:
        sample.error = error.message
    except msgspec.DecodeError as error:
        sample.error = f"an answer is not as OpenAI's API says: {error}"
    sample.end_s = time.perf_counter()
    if request.streams:
        sample.output_tokens = sample.output_tokens or len(sample.chunk_times_s)
        if not sample.error and not sample.output_tokens:
            sample.error = "an answer without tokens"
    return sample


def _take_event(sample: Sample, data: bytes) -> None:
    now = time.perf_counter()
    chunk = _CHUNK.decode(data)
    if chunk.error is not None:
        sample.error = str(chunk.error.get("message", chunk.error))
    if chunk.usage is not None:
        sample.prompt_tokens = chunk.usage.prompt_tokens
        sample.output_tokens = chunk.usage.completion_tokens
        details = chunk.usage.prompt_tokens_details
        sample.cached_tokens = (details.cached_tokens if details else None) or 0
    if chunk.choices and chunk.choices[0].delta.says_something:
        sample.chunk_times_s.append(now)


async def closed_loop(
    remote: Server, requests: Sequence[Request], concurrency: int, on_sample: Callable[[Sample], None]
) -> None:
    queue = iter(requests)

    async def worker() -> None:
        for request in queue:
            on_sample(await send(remote, request))

    await asyncio.gather(*(worker() for _ in range(min(concurrency, len(requests)))))


async def open_loop(
    remote: Remote, requests: Sequence[Request], rate: float, seed: int, on_sample: Callable[[Sample], None]
) -> None:
    rng = random.Random(seed)  # noqa: S311
    due_s = time.perf_counter()

    async def one(request: Request, at_s: float) -> None:
        await asyncio.sleep(max(0.0, at_s - time.perf_counter()))
        on_sample(await send(remote, request))

    async with asyncio.TaskGroup() as group:
        for request in requests:
            group.create_task(one(request, due_s))
            due_s += rng.expovariate(rate)


# The figures


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear between the two nearest ranks; 0 of nothing."""
    ordered = sorted(values)
    if not ordered:
        return 0.0
    place = (len(ordered) - 1) * percent / 100
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


def spread_ms(values_s: Sequence[float]) -> dict[str, float]:
    figures = {f"p{p}": percentile(values_s, p) for p in (50, 90, 99)}
    figures["mean"] = sum(values_s) / len(values_s) if values_s else 0.0
    figures["max"] = max(values_s, default=0.0)
    return {name: round(1e3 * value, 3) for name, value in figures.items()}


def report(config: BenchConfig, model: str, samples: Sequence[Sample], wall_s: float) -> dict[str, Any]:
    """All figures of a run, as they go into the JSON file. Failed requests count only as errors."""
    good = [sample for sample in samples if not sample.error]
    prompt, output = sum(s.prompt_tokens for s in good), sum(s.output_tokens for s in good)
    load = {key: value for key, value in dataclasses.asdict(config).items() if key not in ("api_key", "json")}
    load["concurrency" if config.rate else "rate"] = None
    return {
        "load": {**load, "model": model},
        "wall_s": round(wall_s, 4),
        "completed": len(good),
        "errors": errors_of(samples),
        "prompt_tokens": prompt,
        "cached_tokens": sum(s.cached_tokens for s in good),
        "output_tokens": output,
        "requests_per_s": round(len(good) / wall_s, 3),
        "output_tokens_per_s": round(output / wall_s, 2),
        "total_tokens_per_s": round((prompt + output) / wall_s, 2),
        "ttft_ms": spread_ms([s.ttft_s for s in good]),
        "tpot_ms": spread_ms([s.tpot_s for s in good if s.output_tokens > 1]),
        "itl_ms": spread_ms([gap for s in good for gap in s.gaps_s]),
        "e2e_ms": spread_ms([s.end_s - s.start_s for s in good]),
    }


def errors_of(samples: Sequence[Sample]) -> dict[str, int]:
    """How often each was met."""
    return dict(Counter(sample.error for sample in samples if sample.error).most_common())


def print_report(figures: dict[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    load = figures["load"]
    how = f"rate {load['rate']:g}/s" if load["rate"] else f"concurrency {load['concurrency']}"
    table = Table(title=f"{load['model']}: {load['kind']}, {load['requests']} requests, {how}", title_justify="left")
    for column in ("milliseconds", "p50", "p90", "p99", "mean", "max"):
        table.add_column(column, justify="left" if column == "milliseconds" else "right")
    of_tokens = (("time to first token", "ttft_ms"), ("time per output token", "tpot_ms"), ("between chunks", "itl_ms"))
    generates = figures["output_tokens"] > 0
    for title, key in (*(of_tokens if generates else ()), ("whole request", "e2e_ms")):
        table.add_row(title, *(f"{figures[key][name]:.2f}" for name in ("p50", "p90", "p99", "mean", "max")))
    console = Console(highlight=False)
    console.print(table)
    output = f"{figures['output_tokens_per_s']:.2f} output tok/s, " if generates else ""
    made = f" ({figures['cached_tokens']} cached), {figures['output_tokens']} output tokens" if generates else ""
    console.print(
        f"{output}{figures['total_tokens_per_s']:.1f} total tok/s, {figures['requests_per_s']:.2f} requests/s; "
        f"{figures['completed']} completed in {figures['wall_s']:.2f} s, "
        f"{figures['prompt_tokens']} prompt tokens{made}",
        soft_wrap=True,
    )
    for message, count in figures["errors"].items():
        console.print(f"{count} failed: {message}", style="red", markup=False, soft_wrap=True)


# The run


async def run(config: BenchConfig) -> dict[str, Any]:
    """Warm up, send the load, return the figures."""
    async with Remote(Endpoint.parse(config.base_url, config.api_key), timeout_s=config.timeout_s) as remote:
        model = config.model or (await remote.models())[0]
        load = Load(config, model, await words_per_token(remote, Load(config, model)), seed=config.seed)
        warmup = [load.request() for _ in range(config.warmup)]
        requests = [load.request() for _ in range(config.requests)]
        for sample in [await send(remote, request) for request in warmup]:
            if sample.error:
                raise RemoteError(sample.error)
        samples: list[Sample] = []
        start_s = time.perf_counter()
        with counting(config.requests) as count:

            def on_sample(sample: Sample) -> None:
                samples.append(sample)
                count(tokens=sample.output_tokens, failed=bool(sample.error))

            if config.rate:
                await open_loop(remote, requests, config.rate, config.seed, on_sample)
            else:
                await closed_loop(remote, requests, config.concurrency, on_sample)
        return report(config, model, samples, time.perf_counter() - start_s)


def bench(config: BenchConfig) -> int:
    """The command: exit code 0 when every request was answered, 1 otherwise."""
    try:
        with asyncio.Runner(loop_factory=loop_factory()) as runner:
            figures = runner.run(run(config))
    except RemoteError as error:
        raise StartupError(f"{config.base_url}: {error.message}") from None
    print_report(figures)
    if config.json:
        Path(config.json).write_text(json.dumps(figures, indent=2) + "\n")
    return 1 if figures["errors"] else 0


def loop_factory() -> Callable[[], asyncio.AbstractEventLoop] | None:
    try:
        import uvloop
    except ImportError:  # not made for Windows
        return None
    factory: Callable[[], asyncio.AbstractEventLoop] = uvloop.new_event_loop
    return factory
