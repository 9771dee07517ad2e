"""`sensorium serve`: a model behind HTTP, and what the operator sees of it."""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sensorium.cli.servers import listed
from sensorium.config import ServePlan
from sensorium.startup.catalog import Prepared, catalog_of, prepare
from sensorium.system.collector import no_collection
from sensorium.system.malloc import return_large_blocks
from sensorium.system.processes import family, resident_bytes
from sensorium.units import decimal_text

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

    from sensorium.serving.catalog import Catalog

PHASES = {
    "fetching": "fetching it from the hub",
    "imports": "starting the engine",
    "weights": "loading weights",
    "cache": "setting up the KV cache",
}

THREADS_GRACE_S = 3.0
SAY_EVERY_S = 10.0  # of a phase that takes long

log = logging.getLogger("sensorium")


def serve(plan: ServePlan, folder: Path) -> int:
    """The command; its exit code. `folder` is where `sensorium ps` looks for servers."""
    start_s = time.perf_counter()
    log_to_stderr()
    for note in plan.common.notes:
        log.info("%s", note)
    return_large_blocks()
    with loading_bar() as show:
        prepared = prepare(plan, show)
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            code = runner.run(_serve(prepared, show, start_s, folder))
            end_without_threads(code)
            return code


def end_without_threads(code: int, after_s: float = THREADS_GRACE_S) -> None:
    """From here on the process ends, in so many seconds at the latest: Python waits for threads that may never end."""
    timer = threading.Timer(after_s, os._exit, (code,))
    timer.daemon = True
    timer.start()


async def _serve(prepared: Prepared, show: LoadingBar, start_s: float, folder: Path) -> int:
    common, is_alone = prepared.common, len(prepared.sources) == 1

    def show_one(name: str, phase: str, fraction: float) -> None:
        show(phase, fraction, "" if is_alone else name)

    async with catalog_of(prepared, show_one) as catalog:
        with no_collection():
            from sensorium.api.transport import server

        listener = server.listen(common.server)

        def on_ready(url: str) -> None:
            show.close()
            say = _say_ready if is_alone else _say_all_ready
            say(prepared, catalog, url, time.perf_counter() - start_s)

        names = [entry.name for entry in catalog.entries]
        with _listed(folder, server.url_of(listener, common.server), names):
            return await server.serve(catalog, common.server, common.limits, on_ready, listener=listener)


@contextmanager
def _listed(folder: Path, url: str, names: Sequence[str]) -> Iterator[None]:
    """Where that cannot be, the server serves all the same."""
    with ExitStack() as stack:
        try:
            stack.enter_context(listed(folder, url, names))
        except OSError as error:
            log.info("`sensorium ps` will not list this server: %s", error)
        yield


# What the operator sees


def log_to_stderr() -> None:
    logging.basicConfig(stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(levelname)s %(message)s")
    log.setLevel(logging.INFO)


class LoadingBar:
    """How far loading is: while the server starts a bar on a terminal; elsewhere, and for what is loaded later, a line
    at the start of each phase and every few seconds of it."""

    def __init__(self) -> None:
        self._bar: Progress | None = None
        self._tasks: dict[str, TaskID] = {}
        self._at: dict[str, str] = {}  # by model: what it was at
        self._said_s = 0.0
        self._has_bar = sys.stderr.isatty()

    def __call__(self, phase: str, fraction: float, name: str = "") -> None:
        title = (f"{name}: " if name else "") + PHASES.get(phase, phase)
        is_new, self._at[name] = self._at.get(name) != phase, phase
        if self._has_bar:
            self._show(title, fraction)
        elif is_new or time.monotonic() - self._said_s >= SAY_EVERY_S:
            log.info("%s" if is_new else "%s: %.0f %%", *((title,) if is_new else (title, 100 * fraction)))
            self._said_s = time.monotonic()

    def close(self) -> None:
        """From here on lines."""
        self._has_bar = False
        if self._bar is not None:
            self._bar.stop()

    def _show(self, title: str, fraction: float) -> None:
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
        if title not in self._tasks:
            for earlier in self._bar.task_ids:
                self._bar.update(earlier, completed=1.0)
            self._tasks[title] = self._bar.add_task(title, total=1.0)
        self._bar.update(self._tasks[title], completed=fraction)


@contextmanager
def loading_bar() -> Iterator[LoadingBar]:
    show = LoadingBar()
    try:
        yield show
    finally:
        show.close()


def _say_all_ready(prepared: Prepared, catalog: Catalog, url: str, seconds: float) -> None:
    here = os.getpid()
    budget = prepared.budget_bytes
    log.info(
        "ready after %.1f s at %s: %d models (%s), resident %s (HTTP %s); together their engines may take %s",
        seconds,
        url,
        len(catalog.entries),
        ", ".join(f"{entry.name} {entry.state}" for entry in catalog.entries),
        decimal_text(resident_bytes(family(here))),
        decimal_text(resident_bytes([here])),
        "what they like" if budget is None else decimal_text(budget),
    )


def _say_ready(prepared: Prepared, catalog: Catalog, url: str, seconds: float) -> None:
    options, served = prepared.sources[0].options, catalog.entries[0].served
    if served is None:
        log.info("ready after %.1f s at %s: %s is loaded when it is asked for", seconds, url, catalog.entries[0].name)
        return
    client = served.client
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
    engine = resident_bytes(family(client.pid)) if client.pid else 0
    ranks = len(ready.rank_weight_bytes)
    log.info(
        "ready after %.1f s at %s: %s on %s in %s, up to %d tokens; weights %s, KV cache %s (%d tokens), resident "
        "%s (HTTP %s, engine %s, workers %s)",
        seconds,
        url,
        catalog.entries[0].name,
        ready.device if ranks <= 1 else f"{ranks} ranks of {ready.device}",
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
