"""Puts one model together: checkpoint, engine process, prompts, media. The one place where all of that meets.

The engine process is started first and loads while this one imports what it serves with. What is wrong with the model
or an option is a StartupError, raised before anything is answered.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterable
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sensorium.checkpoint.adapters import read_adapter_config
from sensorium.checkpoint.configs import Checkpoint, open_checkpoint
from sensorium.checkpoint.families import load_class
from sensorium.checkpoint.hub import resolve, text_model_of
from sensorium.checkpoint.ranks import check_ranks
from sensorium.config import LoadConfig, ServeOptions
from sensorium.errors import CheckpointError, StartupError
from sensorium.ipc.client import EngineClient, Progress
from sensorium.serving.tasks import TASK_FLAGS
from sensorium.startup.drafts import open_draft
from sensorium.startup.fit import fitted
from sensorium.startup.translate import as_meant, with_sampling_defaults
from sensorium.system.malloc import trim
from sensorium.system.memory import free_memory_bytes
from sensorium.system.nursery import Nursery

if TYPE_CHECKING:
    from sensorium.media.loader import MediaLoader
    from sensorium.prompt.renderer import RenderPool
    from sensorium.serving.model import ServedModel

DEMO_NAME = "sensorium-demo"
DEMO_FOLDER = Path(__file__).parents[1] / "demo"


@dataclass(frozen=True, slots=True)
class Found:
    """A checkpoint that was found, read and checked. `options` are as they are meant."""

    options: ServeOptions
    checkpoint: Checkpoint
    folders: tuple[Path, ...]  # the model's, those of a language model that is a repository of its own and of `draft`
    draft: Checkpoint | None = None  # the model that guesses for it


@dataclass(frozen=True, slots=True)
class Starting:
    """The same with its engine process, which loads it."""

    options: ServeOptions
    checkpoint: Checkpoint
    client: EngineClient

    @property
    def names(self) -> tuple[str, ...]:
        return names_of(self.options)


def names_of(options: ServeOptions) -> tuple[str, ...]:
    """What clients call the model."""
    return options.server.served_model_name or (options.model or DEMO_NAME,)


def adapters_of(load: LoadConfig) -> list[tuple[str, str]]:
    """(name, folder or hub id) of each --lora."""
    return [(name, path) for name, _, path in (one.partition("=") for one in load.lora)]


def check_names(models: Iterable[ServeOptions]) -> None:
    """StartupError if requests cannot tell two models or adapters apart by their names."""
    taken: dict[str, str] = {}
    for options in models:
        model = f"the model {options.model or DEMO_NAME}"
        named = [(name, model) for name in dict.fromkeys(names_of(options))]
        named += [(name, f"the adapter {path}") for name, path in adapters_of(options.load)]
        for name, what in named:
            if name in taken:
                twice = f"{what} is there twice" if taken[name] == what else f"{taken[name]} and {what} have one name"
                raise StartupError(f"{twice}, {name}: give each a name of its own, models in the tables of --config")
            taken[name] = what


def find(options: ServeOptions, *, fetch: bool = True, on_progress: Progress | None = None) -> Found:
    """Find the model and check the options against it. Without `fetch` only on this machine."""

    def fetching(fraction: float) -> None:
        if on_progress is not None:
            on_progress("fetching", fraction)

    load = options.load
    folder = DEMO_FOLDER
    if options.model is not None and options.model != DEMO_NAME:
        where = load.revision, load.download_dir
        folder = resolve(options.model, *where, fetch=fetch, on_progress=fetching, mmproj=load.mmproj)
    elif load.mmproj is not None:
        raise StartupError(f"--mmproj goes with a GGUF file, and {DEMO_NAME} is none")
    named = load.text_model or text_model_of(folder)  # where the language model is a repository of its own
    text_folder = resolve(named, None, load.download_dir, fetch=fetch, on_progress=fetching) if named else None
    checkpoint = open_checkpoint(folder, text_folder, options.engine.hf_overrides)
    options = as_meant(options, folder, checkpoint.family.modalities)
    checkpoint = replace(with_sampling_defaults(checkpoint, options.server), pooling=options.engine.pooling)
    _check(options, checkpoint)
    draft_folder, draft, named = None, None, options.load.draft_model
    if named is not None:
        own = named == DEMO_NAME
        draft_folder = (
            DEMO_FOLDER if own else resolve(named, None, load.download_dir, fetch=fetch, on_progress=fetching)
        )
        draft = open_draft(named, draft_folder, checkpoint, options.engine)
    engine = replace(
        options.engine, model=str(folder), text_model=str(text_folder or ""), draft_model=str(draft_folder or "")
    )
    folders = tuple(one for one in (folder, text_folder, draft_folder) if one is not None)
    return Found(replace(options, engine=engine), checkpoint, folders, draft)


def launch(found: Found, on_progress: Progress, nursery: Nursery | None = None) -> Starting:
    """Start its engine process. Needs no event loop."""
    client = EngineClient(found.options.engine, on_progress=on_progress, nursery=nursery)
    client.start()
    return Starting(found.options, found.checkpoint, client)


def start(options: ServeOptions, on_progress: Progress) -> Starting:
    """The only model of a program: found, with limits that fit this machine, its engine started."""
    found = find(options, on_progress=on_progress)
    return launch(replace(found, options=fitted(found.options, found.folders, free_memory_bytes())), on_progress)


def _check(options: ServeOptions, checkpoint: Checkpoint) -> None:
    """Options that do not go with the checkpoint, told before anything is loaded."""
    known = checkpoint.family
    if not set(TASK_FLAGS[options.load.task].families) & set(known.tasks):
        raise StartupError(f"--task {options.load.task}: {known.title} can only {', '.join(known.tasks)}")
    check_ranks(checkpoint, options.engine.tensor_parallel_size)
    for name, path in adapters_of(options.load):
        if Path(path).is_dir():  # else it is looked for when the model is loaded
            try:
                read_adapter_config(Path(path))
            except CheckpointError as error:
                raise StartupError(f"--lora {name}: {error.message}") from None
    length = options.engine.max_model_len
    if length is not None and length > checkpoint.max_model_len:
        raise StartupError(f"--max-model-len {length}: the checkpoint ends at {checkpoint.max_model_len} tokens")


def media_loader(options: ServeOptions, nursery: Nursery | None = None) -> MediaLoader:
    """One for all models of a server."""
    from sensorium.media.loader import MediaLoader

    root = options.server.allowed_local_media_path
    return MediaLoader(
        options.limits,
        allowed_domains=options.server.allowed_media_domains,
        local_root=Path(root) if root else None,
        workers=options.server.media_workers,
        nursery=nursery,
    )


@asynccontextmanager
async def opened(starting: Starting, loader: MediaLoader, nursery: Nursery | None = None) -> AsyncIterator[ServedModel]:
    """The model, whose engine may still be loading. Everything that belongs to it alone ends with the block. `nursery`
    is where its workers come from, if several models have them."""
    # Imported only now: the engine is loading meanwhile, and so does the process that renders templates.
    from sensorium.prompt.renderer import RenderPool

    client = starting.client
    renderer = RenderPool(memory_bytes=starting.options.limits.prompt_memory, nursery=nursery)
    try:
        if starting.checkpoint.chat_template is not None:
            renderer.start_early()  # else it is started when a template turns up
        # Tokenizers are read and templates looked at in a thread: other models' answers are being written.
        model = await asyncio.to_thread(_served, starting, loader, renderer, nursery)
        warming = asyncio.create_task(loader.warm()) if model.processor.modalities else None
        try:
            yield model
        finally:
            if warming is not None:
                warming.cancel()
            await model.aclose()
    finally:
        try:
            await renderer.aclose()
        finally:
            await client.aclose()


def _served(starting: Starting, loader: MediaLoader, renderer: RenderPool, nursery: Nursery | None) -> ServedModel:
    from sensorium.serving.model import ServedModel

    options = starting.options
    if load_class(starting.checkpoint.family.processor).takes_recordings:
        loader = loader.of_recordings()
    model = ServedModel.open(
        starting.checkpoint,
        names=starting.names,
        server=options.server,
        limits=options.limits,
        loader=loader,
        client=starting.client,
        max_model_len=options.engine.max_model_len,
        task=options.load.task,
        renderer=renderer,
        nursery=nursery,
    )
    trim()  # reading a vocabulary leaves as much again
    return model
