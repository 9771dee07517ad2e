"""The models that are served: by name, each with its own state, and in use by whoever has acquired it."""

from __future__ import annotations

import asyncio
import math
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

from sensorium.errors import ModelNotFoundError, RequestError, StartupError, UnavailableError
from sensorium.serving.entry import LATEST, CatalogEntry, ModelState, spellings
from sensorium.serving.model import ServedModel
from sensorium.serving.residents import Residents, Show

__all__ = ["LATEST", "Catalog", "CatalogEntry", "ModelState"]

LOAD_WAIT_S = 300.0
_WATCH_S = 0.5
_MAX_NAMES = 20


class Catalog:
    """The first entry is the default for requests that bring no name."""

    def __init__(
        self,
        entries: Sequence[CatalogEntry],
        *,
        budget_bytes: int | None = None,
        load_wait_s: float = LOAD_WAIT_S,
        show: Show = lambda name, phase, fraction: None,
    ) -> None:
        """`load_wait_s` is how long a request waits for its model to load. `show` is told how far loads are."""
        self.entries = tuple(entries)
        self.residents = Residents(self.entries, budget_bytes, show)
        self._load_wait_s = load_wait_s
        self._by_name = {name: entry for entry in self.entries for name in entry.names}
        self._has_started = False
        self._is_draining = False

    @classmethod
    def of(cls, models: Mapping[str, ServedModel]) -> Catalog:
        """Of models that are there for as long as the server runs, by all of their names."""
        names: dict[int, list[str]] = {}
        for name, model in models.items():
            names.setdefault(id(model), []).append(name)
        return cls([CatalogEntry(tuple(own), served=models[own[0]]) for own in names.values()])

    def find(self, name: str | None, *tasks: str) -> CatalogEntry:
        """The model of that name, with or without Ollama's `:latest`. Without a name the first that does one of the
        tasks, which are tried in turn; without tasks the first."""
        if not name:
            return self._default(tasks)
        for known in spellings(name):
            if (owner := self.owner(known)) is not None:
                return owner
        names = [entry.name for entry in self.entries]
        more = f" and {len(names) - _MAX_NAMES} more" if len(names) > _MAX_NAMES else ""
        raise ModelNotFoundError(
            f"The model {name!r} does not exist; there are {', '.join(names[:_MAX_NAMES])}{more} (GET /v1/models).",
            param="model",
        )

    def owner(self, name: str) -> CatalogEntry | None:
        """The model of just that name, or the one that has an adapter of that name."""
        if name in self._by_name:
            return self._by_name[name]
        return next((entry for entry in self.entries if entry.adapters.find(name) is not None), None)

    def check_adapter_name(self, base: CatalogEntry, name: str) -> None:
        """RequestError if a model is called so, or another model's adapter, be it loaded or on its way."""
        others = (entry.adapters for entry in self.entries if entry is not base)
        if name in self._by_name or any(table.has_claim(name) for table in others):
            raise RequestError(f"A model, or another model's adapter, is called {name!r}.", param="lora_name")

    def _default(self, tasks: Sequence[str]) -> CatalogEntry:
        for task in tasks:
            able = sorted((entry for entry in self.entries if task in entry.tasks), key=lambda one: bool(one.failure))
            # A model that generates has vectors too, but they were not made to be compared.
            apt = [entry for entry in able if task == "generate" or "generate" not in entry.tasks]
            if able:
                return (apt or able)[0]
        return self.entries[0]

    @asynccontextmanager
    async def acquire(self, name: str | None, *tasks: str) -> AsyncIterator[CatalogEntry]:
        """The model, ready, for as long as it is worked with; loaded first if need be. ModelNotFoundError, or
        UnavailableError."""
        entry = self.find(name, *tasks)
        if not entry.is_usable:
            await self._until_usable(entry)
        self.residents.entered(entry)
        try:
            yield entry
        finally:
            entry.users -= 1
            self.residents.left(entry)

    async def _until_usable(self, entry: CatalogEntry) -> None:
        if entry.source is None:
            entry.check_ready()
        entry.waiting += 1
        try:
            async with asyncio.timeout(self._load_wait_s):
                while not entry.is_usable:
                    await self._step(entry)
        except TimeoutError:
            raise UnavailableError(entry.reason or "Others wait for this model's memory.", retry_after_s=5.0) from None
        finally:
            entry.waiting -= 1

    async def _step(self, entry: CatalogEntry) -> None:
        entry.check_hopeful()
        if entry.state == "restarting":
            entry.check_ready()
        if entry.state in ("unloaded", "failed"):
            self.residents.begin(entry)
        await self.residents.changed.wait()

    async def load(self, entry: CatalogEntry) -> None:
        """As an operator asks for it, whether or not it has just failed. UnavailableError says why it failed."""
        entry.waiting += 1
        try:
            while entry.stage == "unloading":
                await self.residents.changed.wait()
            if entry.source is not None and entry.state not in ("ready", "restarting", "draining"):
                await asyncio.shield(self.residents.begin(entry))
        finally:
            entry.waiting -= 1
        entry.check_ready()

    async def unload(self, entry: CatalogEntry) -> bool:
        """Give back its memory when its last request has ended. False if it stays: it cannot be loaded again, or it is
        pinned. UnavailableError if it is in use for too long."""
        if entry.source is None or entry.keeping.pinned:
            entry.check_ready()
            return False
        try:
            async with asyncio.timeout(self._load_wait_s):
                while entry.stage is not None or entry.users:
                    entry.is_leaving = entry.stage is None
                    await self.residents.changed.wait()
        except TimeoutError:
            raise UnavailableError(f"The model {entry.name!r} is still in use.", retry_after_s=5.0) from None
        finally:
            entry.is_leaving = False
        if entry.served is not None:
            await self.residents.unload(entry)
        return True

    def keep(self, entry: CatalogEntry, seconds: float) -> None:
        """How long it stays without a request from its next one on, if it is one that comes and goes."""
        if entry.keeping.comes_and_goes:
            entry.idle_s = None if math.isinf(seconds) else seconds

    def forget(self, entry: CatalogEntry) -> bool:
        """Unload it as soon as nobody uses it, if it is one that comes and goes; else nothing happens."""
        if not entry.keeping.comes_and_goes:
            return False
        self.keep(entry, 0.0)
        if entry.served is not None and not entry.users:
            self.residents.left(entry)
        return True

    # The server's own state

    def check_any_ready(self) -> None:
        """UnavailableError if no model answers, whichever a request may name, and none can be loaded for it."""
        if self._has_started and not self._is_draining and any(entry.source is not None for entry in self.entries):
            return
        if all(entry.state != "ready" for entry in self.entries):
            self.entries[0].check_ready()

    def check_all_ready(self) -> None:
        """UnavailableError unless those are there that always are, and the rest can be loaded."""
        for entry in self.entries:
            if entry.source is None or entry.keeping.pinned or self._is_draining:
                entry.check_ready()
        wanted = [entry for entry in self.entries if entry.source is not None and not entry.keeping.lazy]
        if wanted and not self._has_started:
            wanted[0].check_ready()
            raise UnavailableError("Models are still being loaded.")

    def drain(self) -> None:
        """No model is given out any more."""
        self._is_draining = True
        for entry in self.entries:
            entry.is_draining = True
        self.residents.changed.fire()

    async def start(self) -> None:
        """Until every model is loaded that is to be there from the start, as far as memory goes. StartupError if there
        is only one and it cannot be, or if none can."""
        given = [entry for entry in self.entries if entry.served is not None]
        await asyncio.gather(*(entry.model.client.wait_ready() for entry in given))
        for entry in given:
            entry.model.check_task()
            await entry.adapters.load_all(entry.model.client)
        wanted = [entry for entry in self.entries if entry.source is not None and not entry.keeping.lazy]
        await asyncio.gather(*(self.residents.begin(entry, may_evict=False) for entry in wanted))
        self._has_started = True
        if wanted and len(wanted) == len(self.entries) and all(entry.failure for entry in wanted):
            raise StartupError(wanted[0].failure)

    async def wait_failed(self) -> None:
        """Until the engine of the only model is lost for good; those of several are started when they are asked for."""
        if any(entry.source is not None for entry in self.entries[1:]) or self.entries[0].keeping.lazy:
            await asyncio.Event().wait()
        while all(entry.state != "failed" for entry in self.entries):
            await asyncio.sleep(_WATCH_S)

    async def aclose(self) -> None:
        await self.residents.aclose()
