"""Puts the catalogue of a server together: what is named, what a folder has, and the memory that all of them share."""

from __future__ import annotations

import asyncio
import logging
import sys
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from sensorium.checkpoint.adapters import adapter_bytes
from sensorium.checkpoint.ollama import is_ollama_store, ollama_models
from sensorium.config import ServeOptions, ServePlan
from sensorium.errors import StartupError
from sensorium.ipc import ahead
from sensorium.ipc.nursery import engine_nursery
from sensorium.startup.fit import EnginePlan, budget_of, engine_plan, fitted
from sensorium.startup.model import (
    Found,
    Starting,
    adapters_of,
    check_names,
    find,
    launch,
    media_loader,
    names_of,
    opened,
)
from sensorium.system.collector import give_back
from sensorium.system.gpu import gpu_memory_bytes
from sensorium.system.memory import free_memory_bytes
from sensorium.system.nursery import Nursery
from sensorium.workers.process import worker_nursery

if TYPE_CHECKING:
    from sensorium.ipc.client import Progress
    from sensorium.media.loader import MediaLoader
    from sensorium.serving.catalog import Catalog
    from sensorium.serving.entry import Outline
    from sensorium.serving.model import ServedModel

CONFIG_FILE = "config.json"
log = logging.getLogger("sensorium")


@dataclass(frozen=True, slots=True)
class Nurseries:
    """Where the processes of several models come from, so that they share what they import. Engines do not on a GPU,
    whose libraries do not all bear to be forked."""

    engines: Nursery | None = None
    workers: Nursery | None = None


class ModelSource:
    """One model of the plan, as often as it is loaded. A `Source` of the catalogue."""

    loader: MediaLoader  # of all models; there before the first is opened

    def __init__(self, options: ServeOptions, budget_bytes: int | None, nurseries: Nurseries | None = None) -> None:
        """`nurseries` are where the processes of all models come from."""
        self.options = options
        self._nurseries = nurseries or Nurseries()
        self.names = names_of(options)
        self._budget_bytes = budget_bytes
        self._known: tuple[Found, EnginePlan] | None = None
        self._starting: Starting | None = None
        self._on_progress: Progress = lambda phase, fraction: None

    @property
    def max_num_seqs(self) -> int:
        return self.options.engine.max_num_seqs

    @property
    def folders(self) -> tuple[Path, ...]:
        return () if self._known is None else self._known[0].folders

    @property
    def outline(self) -> Outline | None:
        return None if self._known is None else _outline(*self._known)

    def look(self, *, fetch: bool, on_progress: Progress | None = None) -> tuple[Found, EnginePlan]:
        """Find its files and check the options against them. StartupError if there is no such model."""
        if self._known is None:
            found = find(self.options, fetch=fetch, on_progress=on_progress)
            adapters = sum(adapter_bytes(Path(path)) for _, path in adapters_of(found.options.load))
            plan = engine_plan(found.options.engine, found.checkpoint, self._budget_bytes, adapters, found.draft)
            self._known = replace(found, options=replace(found.options, engine=plan.engine)), plan
        return self._known

    def start(self, on_progress: Progress) -> Starting:
        """Start its engine now; `open` goes on from there."""
        found, _ = self.look(fetch=True)
        self._on_progress = on_progress
        self._starting = starting = launch(found, self._tell, self._nurseries.engines)
        return starting

    def _tell(self, phase: str, fraction: float) -> None:
        """To whoever listens by now."""
        self._on_progress(phase, fraction)

    def fit(self, common: ServeOptions) -> None:
        """Take limits and workers that were found to fit this machine."""
        self.options = _fitted(self.options, common)
        if self._known is not None:
            found, plan = self._known
            self._known = replace(found, options=_fitted(found.options, common)), plan

    async def find(self, on_progress: Progress) -> Outline:
        return _outline(*await asyncio.to_thread(self.look, fetch=True, on_progress=on_progress))

    @asynccontextmanager
    async def open(self, on_progress: Progress) -> AsyncIterator[ServedModel]:
        self._on_progress = on_progress
        starting = self._starting
        if starting is None:
            starting = await asyncio.to_thread(self.start, on_progress)
        self._starting = None
        async with opened(starting, self.loader, self._nurseries.workers) as model:
            yield model
        del model
        await asyncio.to_thread(give_back)

    async def aclose(self) -> None:
        """End an engine that was started and never opened."""
        if self._starting is not None:
            await self._starting.client.aclose()


def _outline(found: Found, plan: EnginePlan) -> Outline:
    from sensorium.serving.entry import Outline

    return Outline.of(
        found.checkpoint,
        found.options.load.task,
        weight_bytes=plan.weight_bytes,
        engine_bytes=plan.engine_bytes,
        cache_bytes=plan.cache_bytes,
    )


def _fitted(options: ServeOptions, common: ServeOptions) -> ServeOptions:
    server = replace(options.server, media_workers=common.server.media_workers)
    return replace(options, limits=common.limits, server=server)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A plan whose models were looked for. `common` has limits that fit this machine."""

    common: ServeOptions
    sources: tuple[ModelSource, ...]
    budget_bytes: int | None
    nurseries: Nurseries


def prepare(plan: ServePlan, on_progress: Progress) -> Prepared:
    """Find what is on this machine and start the first engine at once. StartupError if two models have one name, or the
    only one cannot be served."""
    models = (*plan.models, *_models_of_folder(plan.common))
    if not models:
        raise StartupError("there is no model to serve: name one, or a --models-dir that has some")
    check_names(models)
    budget = _budget_bytes(plan.common, models)
    nurseries = _nurseries(plan.common, len(models))
    sources = tuple(ModelSource(_kept(options, len(models)), budget, nurseries) for options in models)
    for source in sources:
        _look(source, on_progress, is_alone=len(sources) == 1)
    present = [folder for source in sources for folder in source.folders]
    common = fitted(plan.common, present, free_memory_bytes(), None if _is_on_gpu(plan.common) else budget)
    for source in sources:
        source.fit(common)
    first = sources[0]
    if first.folders and not first.options.load.lazy:
        first.start(on_progress)
    ahead.discard()  # several models have another, or none is loaded yet
    return Prepared(common, sources, budget, nurseries)


def _kept(options: ServeOptions, count: int) -> ServeOptions:
    """The only model of a server stays, unless something else is said."""
    load = options.load
    stays = count == 1 and not load.lazy and load.idle_unload_s is None
    return replace(options, load=replace(load, pinned=load.pinned or stays))


def _look(source: ModelSource, on_progress: Progress, *, is_alone: bool) -> None:
    """What is wrong with one of several models is told when it is loaded: the others are served."""
    lazy = source.options.load.lazy
    try:
        source.look(fetch=is_alone and not lazy, on_progress=on_progress)
    except StartupError as error:
        if is_alone and not lazy:
            raise
        log.info("%s is not there yet, or cannot be served: %s", source.names[0], error.message)


def _models_of_folder(common: ServeOptions) -> list[ServeOptions]:
    """The checkpoints of --models-dir, by their paths in there: of folders, and of folders in folders. Of Ollama's
    store its models, by their names there."""
    if common.server.models_dir is None:
        return []
    root = Path(common.server.models_dir)
    if not root.is_dir():
        raise StartupError(f"--models-dir {root}: there is no such folder")
    stored = ollama_models(root) if is_ollama_store(root) else []
    return [
        *(_of_folder(common, root, folder) for folder in folders_of_models(root)),
        *(_lazy(common, str(one.file), one.name, None if one.tower is None else str(one.tower)) for one in stored),
    ]


def folders_of_models(root: Path) -> list[Path]:
    """The checkpoints in a folder, and in the folders in it that are none."""
    folders = sorted(file.parent for pattern in ("*", "*/*") for file in root.glob(f"{pattern}/{CONFIG_FILE}"))
    return [folder for folder in folders if folder.parent == root or not (folder.parent / CONFIG_FILE).exists()]


def _of_folder(common: ServeOptions, root: Path, folder: Path) -> ServeOptions:
    return _lazy(common, str(folder), folder.relative_to(root).as_posix())


def _lazy(common: ServeOptions, model: str, name: str, mmproj: str | None = None) -> ServeOptions:
    server = replace(common.server, served_model_name=(name,))
    load = replace(common.load, lazy=True, lora=(), mmproj=mmproj)
    return replace(common, model=model, server=server, load=load)


def _budget_bytes(common: ServeOptions, models: Sequence[ServeOptions]) -> int | None:
    """What the engines may take together; None where there is only one and nothing is said."""
    if common.server.memory is not None:
        return common.server.memory
    if len(models) < 2:
        return None
    gpu = gpu_memory_bytes() if _is_on_gpu(common) else None
    return budget_of(free_memory_bytes()) if gpu is None else int(gpu * common.engine.gpu_memory_utilization)


def _nurseries(common: ServeOptions, count: int) -> Nurseries:
    if count == 1 or sys.platform != "linux":
        return Nurseries()
    return Nurseries(None if _is_on_gpu(common) else engine_nursery(), worker_nursery())


def _is_on_gpu(common: ServeOptions) -> bool:
    return common.engine.device != "cpu" and gpu_memory_bytes() is not None


@asynccontextmanager
async def catalog_of(prepared: Prepared, show: Callable[[str, str, float], None]) -> AsyncIterator[Catalog]:
    """The catalogue, of which nothing is loaded yet; it ends with the block. `show` is told how far loads are."""
    from sensorium.serving.adapters import AdapterTable
    from sensorium.serving.catalog import Catalog, CatalogEntry
    from sensorium.serving.entry import Keeping

    loader = media_loader(prepared.common, prepared.nurseries.workers)
    entries = []
    for source in prepared.sources:
        source.loader, load = loader, source.options.load
        keeping = Keeping(load.lazy, load.pinned, load.idle_unload_s)
        adapters = AdapterTable(adapters_of(load), load.download_dir)
        entries.append(CatalogEntry(source.names, source, keeping, adapters=adapters))
    server = prepared.common.server
    catalog = Catalog(entries, budget_bytes=prepared.budget_bytes, load_wait_s=server.load_wait_s, show=show)
    try:
        yield catalog
    finally:
        await catalog.aclose()
        for source in prepared.sources:
            await source.aclose()
        await loader.aclose()
