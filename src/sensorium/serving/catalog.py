"""The models that are served: by name, each with its own state, and in use by whoever has acquired it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Literal

from sensorium.errors import ModelNotFoundError, UnavailableError
from sensorium.serving.model import ServedModel

ModelState = Literal["loading", "ready", "restarting", "draining", "failed"]
LATEST = ":latest"
_WATCH_S = 0.5
_UNAVAILABLE: dict[ModelState, tuple[str, float]] = {
    "loading": ("The model is still loading.", 2.0),
    "restarting": ("The engine is being restarted.", 5.0),
    "draining": ("The server is shutting down.", 10.0),
    "failed": ("The engine was lost and could not be started again.", 5.0),
}
"""What a client is told, and after how many seconds to come again."""


class CatalogEntry:
    """One model. `names` are all that clients may use; the first is shown. `users` have acquired it."""

    def __init__(self, names: tuple[str, ...], model: ServedModel) -> None:
        self.names = names
        self.model = model
        self.users = 0
        self.is_draining = False

    @property
    def name(self) -> str:
        return self.names[0]

    @property
    def state(self) -> ModelState:
        if self.is_draining:
            return "draining"
        state = self.model.client.state
        return "failed" if state == "closed" else state

    def check_ready(self) -> None:
        """UnavailableError unless the model answers."""
        if self.state != "ready":
            message, retry_after_s = _UNAVAILABLE[self.state]
            raise UnavailableError(message, retry_after_s=retry_after_s)


class Catalog:
    """`models` maps every name to its model; the first name is the default for requests that bring none."""

    def __init__(self, models: Mapping[str, ServedModel]) -> None:
        names: dict[int, list[str]] = {}
        for name, model in models.items():
            names.setdefault(id(model), []).append(name)
        self.entries = tuple(CatalogEntry(tuple(own), models[own[0]]) for own in names.values())
        self._by_name = {name: entry for entry in self.entries for name in entry.names}

    def find(self, name: str | None) -> CatalogEntry:
        """The model of that name, with or without Ollama's `:latest`; without a name, the first one."""
        if not name:
            return self.entries[0]
        for known in (name, name.removesuffix(LATEST), f"{name}{LATEST}"):
            if known in self._by_name:
                return self._by_name[known]
        raise ModelNotFoundError(f"The model {name!r} does not exist; GET /v1/models lists what does.", param="model")

    @asynccontextmanager
    async def acquire(self, name: str | None) -> AsyncIterator[CatalogEntry]:
        """The model, ready, for as long as it is worked with. ModelNotFoundError, or UnavailableError."""
        entry = self.find(name)
        entry.check_ready()
        entry.users += 1
        try:
            yield entry
        finally:
            entry.users -= 1

    def check_any_ready(self) -> None:
        """UnavailableError if no model answers, whichever a request may name."""
        if all(entry.state != "ready" for entry in self.entries):
            self.entries[0].check_ready()

    def check_all_ready(self) -> None:
        for entry in self.entries:
            entry.check_ready()

    def drain(self) -> None:
        """No model is given out any more."""
        for entry in self.entries:
            entry.is_draining = True

    async def wait_ready(self) -> None:
        """Until every model is loaded. StartupError if one cannot be, or does not do its --task."""
        await asyncio.gather(*(entry.model.client.wait_ready() for entry in self.entries))
        for entry in self.entries:
            entry.model.check_task()

    async def wait_failed(self) -> None:
        """Until an engine is lost for good."""
        while all(entry.state != "failed" for entry in self.entries):
            await asyncio.sleep(_WATCH_S)
