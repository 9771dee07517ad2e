"""`sensorium run-batch`: a file of requests answered by a model of this process, or by a server that runs."""

from __future__ import annotations

import asyncio
import logging
import signal
import tempfile
import time
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sensorium.cli.batch import FILE_URL, Ask, Batch
from sensorium.cli.batch_lines import InputFile, Journal
from sensorium.cli.bench import loop_factory
from sensorium.cli.client import Endpoint, Remote
from sensorium.cli.progress import counting
from sensorium.cli.serve import LoadingBar, loading_bar, log_to_stderr
from sensorium.config import BatchConfig, ServePlan
from sensorium.errors import StartupError
from sensorium.media.source import MediaSource
from sensorium.startup.catalog import Prepared, catalog_of, prepare
from sensorium.startup.model import media_loader

if TYPE_CHECKING:
    from sensorium.media.loader import MediaLoader

REMOTE_CONCURRENCY = 64
ANSWER_TIMEOUT_S = 86_400.0  # of a server, whose own deadline comes first

log = logging.getLogger("sensorium")


def run_batch(config: BatchConfig, plan: ServePlan) -> int:
    """The command; its exit code is 0 when every line has its answer, be it an error."""
    log_to_stderr()
    output = Path(config.output_file)
    journal_path = output.with_name(output.name + ".journal")
    if output.exists() and not journal_path.exists() and not config.overwrite:
        raise StartupError(f"--output-file {output} exists: name another one, delete it, or give --overwrite")
    with _input(config.input_file) as lines:
        journal = Journal(journal_path, _about(lines, config, plan), len(lines))
        try:
            if journal.done:
                log.info("%d of %d lines have their answers in %s", len(journal.done), len(lines), journal_path)
            if len(journal.done) < len(lines):
                _answer_rest(config, plan, lines, journal)
            journal.write_output(output)
        finally:
            journal.close()
    log.info("%s has the answers to %d lines", output, len(lines))
    return 0


def _about(lines: InputFile, config: BatchConfig, plan: ServePlan) -> dict[str, object]:
    models = [] if config.url is not None else [options.model for options in plan.models]
    return {"input": lines.digest, "lines": len(lines), "models": models}


@contextmanager
def _input(named: str) -> Iterator[InputFile]:
    """A file, or what a URL leads to, kept while it is read."""
    if not named.startswith(("http://", "https://")):
        yield InputFile(Path(named))
        return
    with tempfile.TemporaryDirectory(prefix="sensorium-") as folder:
        path = Path(folder) / "input.jsonl"
        _download(named, path)
        yield InputFile(path)


def _download(url: str, path: Path) -> None:
    import httpx

    try:
        with httpx.stream("GET", url, follow_redirects=True, timeout=60) as answer, path.open("wb") as file:
            answer.raise_for_status()
            for piece in answer.iter_bytes():
                file.write(piece)
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise StartupError(f"--input-file {url} cannot be fetched: {error}") from None


def _answer_rest(config: BatchConfig, plan: ServePlan, lines: InputFile, journal: Journal) -> None:
    with asyncio.Runner(loop_factory=loop_factory()) as runner:
        if config.url is not None:
            runner.run(_until_stopped(_ask_server(config, plan, lines, journal)))
            return
        from sensorium.cli.in_process import alone

        with loading_bar() as show:
            prepared = prepare(alone(plan), show)
            runner.run(_until_stopped(_ask_models(config, prepared, show, lines, journal)))


async def _until_stopped(work: Coroutine[None, None, None]) -> None:
    """SIGTERM ends it as Ctrl-C does."""
    task = asyncio.ensure_future(work)
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        log.warning("stopped: what is answered is kept, and the rest is asked when it is run again")
        raise KeyboardInterrupt from None


async def _ask_server(config: BatchConfig, plan: ServePlan, lines: InputFile, journal: Journal) -> None:
    server = plan.common.server
    endpoint = Endpoint.parse(config.url or "", server.api_key[0] if server.api_key else None)
    loader = media_loader(plan.common)
    try:
        async with Remote(endpoint, timeout_s=ANSWER_TIMEOUT_S) as remote:
            await _run(lines, journal, remote.ask, loader, config.concurrency or REMOTE_CONCURRENCY)
    finally:
        await loader.aclose()


async def _ask_models(
    config: BatchConfig, prepared: Prepared, show: LoadingBar, lines: InputFile, journal: Journal
) -> None:
    async with catalog_of(prepared, lambda name, phase, fraction: show(phase, fraction, name)) as catalog:
        from sensorium.cli.in_process import AppCaller, at_once, started_app

        app = await started_app(catalog, prepared)
        show.close()
        most = config.concurrency or at_once(prepared)
        running = asyncio.create_task(_run(lines, journal, AppCaller(app), prepared.sources[0].loader, most))
        failing = asyncio.create_task(catalog.wait_failed())
        try:
            await asyncio.wait((running, failing), return_when=asyncio.FIRST_COMPLETED)
            if not running.done():
                raise StartupError("the engine was lost and could not be started again; what is answered is kept")
            await running
        finally:
            running.cancel()
            failing.cancel()
            await asyncio.wait((running, failing))


async def _run(lines: InputFile, journal: Journal, ask: Ask, loader: MediaLoader, most: int) -> None:
    async def fetch(url: str) -> bytes:
        raw = await loader.of_recordings().fetch(MediaSource("audio", FILE_URL, url=url))
        return raw.payload

    batch = Batch(lines, journal, ask, fetch, most=most)
    start_s, before = time.perf_counter(), len(journal.done)
    with counting(len(lines), done=before, say=log.info) as count:
        await batch.run(count)
    seconds, answered = time.perf_counter() - start_s, len(lines) - before
    log.info(
        "%d lines in %.1f s (%.1f a second), %d output tokens (%.1f a second), %d failed",
        answered,
        seconds,
        answered / seconds,
        batch.tokens,
        batch.tokens / seconds,
        batch.failed,
    )
