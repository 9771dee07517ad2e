"""`sensorium serve`: a model behind HTTP, and what the operator sees of it."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from sensorium.config import ServeOptions
from sensorium.startup.model import Starting, opened, start
from sensorium.system.malloc import return_large_blocks
from sensorium.system.processes import family, resident_bytes
from sensorium.units import decimal_text

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

PHASES = {"imports": "starting the engine", "weights": "loading weights", "cache": "setting up the KV cache"}

THREADS_GRACE_S = 3.0

log = logging.getLogger("sensorium")


def serve(options: ServeOptions) -> int:
    """The command; its exit code."""
    start_s = time.perf_counter()
    _log_to_stderr()
    for note in options.notes:
        log.info("%s", note)
    return_large_blocks()
    with _progress() as show:
        starting = start(options, show)
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            code = runner.run(_serve(starting, show, start_s))
            end_without_threads(code)
            return code


def end_without_threads(code: int, after_s: float = THREADS_GRACE_S) -> None:
    """From here on the process ends, in so many seconds at the latest: Python waits for threads that may never end."""
    timer = threading.Timer(after_s, os._exit, (code,))
    timer.daemon = True
    timer.start()


async def _serve(starting: Starting, show: LoadingBar, start_s: float) -> int:
    options = starting.options
    async with opened(starting) as model:
        from sensorium.api.transport import server

        listener = server.listen(options.server)

        def on_ready(url: str) -> None:
            show.close()
            _say_ready(starting, url, time.perf_counter() - start_s)

        models = dict.fromkeys(starting.names, model)
        return await server.serve(models, options.server, options.limits, on_ready, listener=listener)


# What the operator sees


def _log_to_stderr() -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    log.setLevel(logging.INFO)


class LoadingBar:
    """How far loading is: a bar on a terminal, a line at the start of each phase elsewhere."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._tasks: dict[str, TaskID | None] = {}

    def __call__(self, phase: str, fraction: float) -> None:
        if phase not in self._tasks:
            self._begin(phase)
        task = self._tasks[phase]
        if self._bar is not None and task is not None:
            self._bar.update(task, completed=fraction)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.stop()

    def _begin(self, phase: str) -> None:
        title = PHASES.get(phase, phase)
        if not sys.stderr.isatty():
            log.info("%s", title)
            self._tasks[phase] = None
            return
        if self._bar is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

            self._bar = Progress(
                TextColumn("{task.description:<24}"),
                BarColumn(),
                TaskProgressColumn(),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._bar.start()
        for earlier in self._bar.task_ids:
            self._bar.update(earlier, completed=1.0)
        self._tasks[phase] = self._bar.add_task(title, total=1.0)


@contextmanager
def _progress() -> Iterator[LoadingBar]:
    show = LoadingBar()
    try:
        yield show
    finally:
        show.close()


def _say_ready(starting: Starting, url: str, seconds: float) -> None:
    options, client = starting.options, starting.client
    if options.load.trust_remote_code:
        log.info("--trust-remote-code is not needed: code of a checkpoint is never run")
    if options.model is None:
        log.warning(
            "no model was named: serving the built-in demonstration, which knows drawn shapes, simple "
            "audio and a few hundred words"
        )
    if (ready := client.ready) is None:
        return
    here = os.getpid()
    own, everybody = resident_bytes([here]), resident_bytes(family(here))
    engine = resident_bytes([client.pid]) if client.pid else 0
    log.info(
        "ready after %.1f s at %s: %s on %s in %s, up to %d tokens; weights %s, KV cache %s (%d tokens), resident "
        "%s (HTTP %s, engine %s, workers %s)",
        seconds,
        url,
        starting.names[0],
        ready.device,
        ready.dtype,
        ready.max_model_len,
        decimal_text(ready.weight_bytes),
        decimal_text(ready.kv_bytes),
        ready.kv_tokens,
        decimal_text(everybody),
        decimal_text(own),
        decimal_text(engine),
        decimal_text(everybody - own - engine),
    )
