"""`sensorium bench throughput|latency|startup`: a model without a server around it, in this process, and its start."""

from __future__ import annotations

import asyncio
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Any

from sensorium.cli.bench import Sample, errors_of, loop_factory, percentile, send, spread_ms, words_per_token
from sensorium.cli.client import Endpoint, Remote, RemoteError
from sensorium.cli.loads import Load, Request
from sensorium.cli.progress import counting
from sensorium.cli.serve import loading_bar, log_to_stderr
from sensorium.config import ModelBenchConfig, ServePlan
from sensorium.errors import StartupError
from sensorium.startup.catalog import catalog_of, prepare

READY = re.compile(r"ready after .* at (http://[^\s,]+):\s")
Figures = dict[str, Any]


def bench_throughput(config: ModelBenchConfig, plan: ServePlan) -> int:
    """All requests at once: how many tokens a second. The exit code is 1 if one failed."""
    return _told(config, _with_model(config, plan, _throughput))


def bench_latency(config: ModelBenchConfig, plan: ServePlan) -> int:
    """A few requests together, again and again: how long they take."""
    return _told(config, _with_model(config, plan, _latency))


def bench_startup(config: ModelBenchConfig, argv: Sequence[str]) -> int:
    """A server is started again and again. `argv` is the model and flags of serve."""
    ready, answered = zip(*(_start(argv) for _ in range(config.iterations)), strict=True)
    figures = {"ready_s": [round(one, 3) for one in ready], "first_answer_s": [round(one, 3) for one in answered]}
    print(f"ready after {percentile(ready, 50):.2f} s, first answer after {percentile(answered, 50):.2f} s (medians of")
    print(f"{config.iterations} starts; {min(ready):.2f} to {max(ready):.2f} s until ready)")
    return _told(config, figures)


class _Bench:
    """A model that answers, and what asks it."""

    def __init__(self, config: ModelBenchConfig, server: Any, load: Load, most: int) -> None:
        self.config = config
        self.load = load
        self._server = server
        self._most = most

    async def ask(self, requests: Sequence[Request]) -> list[Sample]:
        """All of them, as many at a time as keep the engine full."""
        queue, samples = iter(requests), list[Sample]()
        with counting(len(requests)) as count:

            async def worker() -> None:
                for request in queue:
                    sample = await send(self._server, request)
                    samples.append(sample)
                    count(tokens=sample.output_tokens, failed=bool(sample.error))

            await asyncio.gather(*(worker() for _ in range(min(self._most, len(requests)))))
        return samples


async def _throughput(bench: _Bench) -> Figures:
    requests = [bench.load.request() for _ in range(bench.config.requests)]
    begun_s = time.perf_counter()
    samples = await bench.ask(requests)
    seconds = time.perf_counter() - begun_s
    prompt, output = sum(one.prompt_tokens for one in samples), sum(one.output_tokens for one in samples)
    rates = {
        "requests_per_s": round(len(samples) / seconds, 3),
        "output_tokens_per_s": round(output / seconds, 2),
        "total_tokens_per_s": round((prompt + output) / seconds, 2),
    }
    print(
        f"{rates['output_tokens_per_s']:.1f} output tok/s, {rates['total_tokens_per_s']:.1f} total tok/s, "
        f"{rates['requests_per_s']:.2f} requests/s: {len(samples)} requests in {seconds:.2f} s, "
        f"{prompt} prompt tokens, {output} output tokens"
    )
    return {"wall_s": round(seconds, 4), **rates, "errors": errors_of(samples)}


async def _latency(bench: _Bench) -> Figures:
    seconds, samples = [], list[Sample]()
    for number in range(bench.config.iterations + 1):
        requests = [bench.load.request() for _ in range(bench.config.together)]
        begun_s = time.perf_counter()
        found = await bench.ask(requests)
        if number:  # the first one is to warm up
            seconds.append(time.perf_counter() - begun_s)
            samples += found
    spread = spread_ms(seconds)
    told = ", ".join(f"{name} {value:.1f} ms" for name, value in spread.items())
    print(f"{bench.config.together} requests together, {bench.config.iterations} times: {told}")
    return {"batch_ms": spread, "errors": errors_of(samples)}


def _with_model(config: ModelBenchConfig, plan: ServePlan, measure: Callable[[_Bench], Awaitable[Figures]]) -> Figures:
    from sensorium.cli.in_process import AppServer, alone, at_once, started_app

    log_to_stderr()
    with loading_bar() as show:
        prepared = prepare(alone(plan), show)

        async def run() -> Figures:
            async with catalog_of(prepared, lambda name, phase, fraction: show(phase, fraction, name)) as catalog:
                server = AppServer(await started_app(catalog, prepared))
                show.close()
                name, seed = catalog.entries[0].name, prepared.sources[0].options.engine.seed
                words = await words_per_token(server, Load(config, name))
                return await measure(_Bench(config, server, Load(config, name, words, seed=seed), at_once(prepared)))

        try:
            with asyncio.Runner(loop_factory=loop_factory()) as runner:
                return runner.run(run())
        except RemoteError as error:
            raise StartupError(error.message) from None


def _start(argv: Sequence[str]) -> tuple[float, float]:
    """Seconds until a server is ready, and until it has answered for the first time."""
    command = [sys.executable, "-m", "sensorium", "serve", *argv, "--port", "0"]
    begun_s = time.perf_counter()
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as process:
        try:
            url = _until_ready(process)
            ready_s = time.perf_counter() - begun_s
            asyncio.run(_first_answer(url))
            return ready_s, time.perf_counter() - begun_s
        finally:
            process.terminate()


def _until_ready(process: subprocess.Popen[str]) -> str:
    line = ""
    for line in process.stderr or ():
        if found := READY.search(line):
            return found[1]
    raise StartupError(line.strip().removeprefix("sensorium: ") or "the server ended before it was ready")


async def _first_answer(url: str) -> None:
    async with Remote(Endpoint.parse(url)) as remote:
        await remote.models()
        load = Load(ModelBenchConfig(), (await remote.models())[0])
        sample = await send(remote, load.probe(4))
    if sample.error:
        raise StartupError(sample.error)


def _told(config: ModelBenchConfig, figures: Figures) -> int:
    """Written to the file that is wanted; the exit code."""
    if config.json:
        Path(config.json).write_text(json.dumps(figures, indent=2) + os.linesep)
    for message, count in figures.get("errors", {}).items():
        print(f"{count} failed: {message}")
    return 1 if figures.get("errors") else 0
