"""Puts one server together: checkpoint, engine process, served model, HTTP. The one place where all parts meet.

The engine process is started first and loads while this one imports what it serves with. What is wrong with the model
or a flag is a StartupError, raised before anything is answered.
"""

from __future__ import annotations

import asyncio
import logging
import os
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from sensorium.checkpoint.configs import Checkpoint, open_checkpoint
from sensorium.checkpoint.hub import resolve, text_model_of
from sensorium.cli.fit import fitted
from sensorium.cli.translate import as_meant, with_sampling_defaults
from sensorium.config import ServeOptions
from sensorium.errors import StartupError
from sensorium.ipc.client import EngineClient
from sensorium.serving.tasks import TASK_FLAGS
from sensorium.system.malloc import return_large_blocks
from sensorium.system.memory import free_memory_bytes
from sensorium.system.processes import family, resident_bytes
from sensorium.units import size_text

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

DEMO_NAME = "sensorium-demo"
DEMO_FOLDER = Path(__file__).parents[1] / "demo"
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
    folder = (
        DEMO_FOLDER
        if options.model is None
        else resolve(options.model, options.load.revision, options.load.download_dir)
    )
    text_folder = _text_folder(options, folder)
    checkpoint = open_checkpoint(folder, text_folder, options.engine.hf_overrides)
    options = as_meant(options, folder, checkpoint.family.modalities)
    checkpoint = replace(with_sampling_defaults(checkpoint, options.server), pooling=options.engine.pooling)
    _check(options, checkpoint)
    options = fitted(options, [folder, *([text_folder] if text_folder else [])], free_memory_bytes())
    with _progress() as show:
        config = replace(options.engine, model=str(folder), text_model=str(text_folder or ""))
        client = EngineClient(config, on_progress=show)
        client.start()
        import uvloop

        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            code = runner.run(_serve(options, checkpoint, client, show, start_s))
            end_without_threads(code)
            return code


def end_without_threads(code: int, after_s: float = THREADS_GRACE_S) -> None:
    """From here on the process ends, in so many seconds at the latest: Python waits for threads that may never end."""
    timer = threading.Timer(after_s, os._exit, (code,))
    timer.daemon = True
    timer.start()


async def _serve(
    options: ServeOptions, checkpoint: Checkpoint, client: EngineClient, show: LoadingBar, start_s: float
) -> int:
    # Imported only now: the engine is loading meanwhile, and so does the process that renders templates.
    from sensorium.prompt.renderer import RenderPool

    renderer = RenderPool()
    try:
        renderer.start_early()
        from sensorium.api.transport import server
        from sensorium.media.loader import MediaLoader
        from sensorium.serving.model import ServedModel

        listener = server.listen(options.server)
        root = options.server.allowed_local_media_path
        loader = MediaLoader(
            options.limits,
            allowed_domains=options.server.allowed_media_domains,
            local_root=Path(root) if root else None,
            workers=options.server.media_workers,
        )
        names = options.server.served_model_name or (options.model or DEMO_NAME,)
        model = ServedModel.open(
            checkpoint,
            names=names,
            server=options.server,
            limits=options.limits,
            loader=loader,
            client=client,
            max_model_len=options.engine.max_model_len,
            task=options.load.task,
            renderer=renderer,
        )
        warming = asyncio.create_task(loader.warm()) if model.processor.modalities else None

        def on_ready(url: str) -> None:
            show.close()
            _say_ready(options, client, names[0], url, time.perf_counter() - start_s)

        try:
            models = dict.fromkeys(names, model)
            return await server.serve(models, options.server, options.limits, on_ready, listener=listener)
        finally:
            if warming is not None:
                warming.cancel()
            await model.aclose()
            await loader.aclose()
    finally:
        await renderer.aclose()
        await client.aclose()


def _text_folder(options: ServeOptions, folder: Path) -> Path | None:
    """Where the language model is, if it is a repository of its own."""
    named = options.load.text_model or text_model_of(folder)
    return resolve(named, None, options.load.download_dir) if named else None


def _check(options: ServeOptions, checkpoint: Checkpoint) -> None:
    """Flags that do not go with the checkpoint, told before anything is loaded."""
    known = checkpoint.family
    if not set(TASK_FLAGS[options.load.task].families) & set(known.tasks):
        raise StartupError(f"--task {options.load.task}: {known.title} can only {', '.join(known.tasks)}")
    length = options.engine.max_model_len
    if length is not None and length > checkpoint.max_model_len:
        raise StartupError(f"--max-model-len {length}: the checkpoint ends at {checkpoint.max_model_len} tokens")


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


def _say_ready(options: ServeOptions, client: EngineClient, name: str, url: str, seconds: float) -> None:
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
        name,
        ready.device,
        ready.dtype,
        ready.max_model_len,
        size_text(ready.weight_bytes),
        size_text(ready.kv_bytes),
        ready.kv_tokens,
        size_text(everybody),
        size_text(own),
        size_text(engine),
        size_text(everybody - own - engine),
    )
