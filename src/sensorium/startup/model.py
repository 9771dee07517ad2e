"""Puts one model together: checkpoint, engine process, prompts, media. The one place where all of that meets.

The engine process is started first and loads while this one imports what it serves with. What is wrong with the model
or an option is a StartupError, raised before anything is answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sensorium.checkpoint.configs import Checkpoint, open_checkpoint
from sensorium.checkpoint.hub import resolve, text_model_of
from sensorium.config import ServeOptions
from sensorium.errors import StartupError
from sensorium.ipc.client import EngineClient, Progress
from sensorium.serving.tasks import TASK_FLAGS
from sensorium.startup.fit import fitted
from sensorium.startup.translate import as_meant, with_sampling_defaults
from sensorium.system.memory import free_memory_bytes

if TYPE_CHECKING:
    from sensorium.media.loader import MediaLoader
    from sensorium.serving.model import ServedModel

DEMO_NAME = "sensorium-demo"
DEMO_FOLDER = Path(__file__).parents[1] / "demo"


@dataclass(frozen=True, slots=True)
class Starting:
    """A checkpoint that was read and checked, and its engine process, which loads it. `options` are as they are meant
    and as they fit this machine."""

    options: ServeOptions
    checkpoint: Checkpoint
    client: EngineClient

    @property
    def names(self) -> tuple[str, ...]:
        return self.options.server.served_model_name or (self.options.model or DEMO_NAME,)


def start(options: ServeOptions, on_progress: Progress) -> Starting:
    """Find the model, check the options against it and start its engine process. Needs no event loop."""
    load = options.load
    folder = DEMO_FOLDER if options.model is None else resolve(options.model, load.revision, load.download_dir)
    named = load.text_model or text_model_of(folder)  # where the language model is a repository of its own
    text_folder = resolve(named, None, load.download_dir) if named else None
    checkpoint = open_checkpoint(folder, text_folder, options.engine.hf_overrides)
    options = as_meant(options, folder, checkpoint.family.modalities)
    checkpoint = replace(with_sampling_defaults(checkpoint, options.server), pooling=options.engine.pooling)
    _check(options, checkpoint)
    options = fitted(options, [folder, *([text_folder] if text_folder else [])], free_memory_bytes())
    engine = replace(options.engine, model=str(folder), text_model=str(text_folder or ""))
    client = EngineClient(engine, on_progress=on_progress)
    client.start()
    return Starting(replace(options, engine=engine), checkpoint, client)


def _check(options: ServeOptions, checkpoint: Checkpoint) -> None:
    """Options that do not go with the checkpoint, told before anything is loaded."""
    known = checkpoint.family
    if not set(TASK_FLAGS[options.load.task].families) & set(known.tasks):
        raise StartupError(f"--task {options.load.task}: {known.title} can only {', '.join(known.tasks)}")
    length = options.engine.max_model_len
    if length is not None and length > checkpoint.max_model_len:
        raise StartupError(f"--max-model-len {length}: the checkpoint ends at {checkpoint.max_model_len} tokens")


def _media_loader(options: ServeOptions, checkpoint: Checkpoint) -> MediaLoader:
    from sensorium.media.loader import MediaLoader

    root, limits = options.server.allowed_local_media_path, options.limits
    if "transcribe" in checkpoint.family.tasks:
        limits = replace(limits, max_audio_seconds=limits.max_recording_seconds)
    return MediaLoader(
        limits,
        allowed_domains=options.server.allowed_media_domains,
        local_root=Path(root) if root else None,
        workers=options.server.media_workers,
    )


@asynccontextmanager
async def opened(starting: Starting) -> AsyncIterator[ServedModel]:
    """The model, whose engine may still be loading. Everything that belongs to it ends with the block."""
    # Imported only now: the engine is loading meanwhile, and so does the process that renders templates.
    from sensorium.prompt.renderer import RenderPool

    options, client = starting.options, starting.client
    renderer = RenderPool()
    try:
        renderer.start_early()
        from sensorium.serving.model import ServedModel

        loader = _media_loader(options, starting.checkpoint)
        model = ServedModel.open(
            starting.checkpoint,
            names=starting.names,
            server=options.server,
            limits=options.limits,
            loader=loader,
            client=client,
            max_model_len=options.engine.max_model_len,
            task=options.load.task,
            renderer=renderer,
        )
        warming = asyncio.create_task(loader.warm()) if model.processor.modalities else None
        try:
            yield model
        finally:
            if warming is not None:
                warming.cancel()
            await model.aclose()
            await loader.aclose()
    finally:
        await renderer.aclose()
        await client.aclose()
