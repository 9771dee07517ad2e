"""The LoRA adapters of one served model: names that clients ask for like models, and what the engine calls them.

Each that is loaded gets a number of its own, so an adapter that takes another's name is another one: who has acquired
the old one ends with it. The table outlives the engine; whatever engine comes next is given what is in it.
"""

from __future__ import annotations

import asyncio
import itertools
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sensorium.checkpoint.hub import resolve
from sensorium.errors import RequestError, StartupError

if TYPE_CHECKING:
    from sensorium.ipc.client import EngineClient

_numbers = itertools.count(1)


@dataclass(slots=True, eq=False)
class ServedAdapter:
    """`path` is as the operator wrote it: a folder or a hub id."""

    name: str
    path: str
    number: int = field(default_factory=lambda: next(_numbers))
    users: int = 0
    created: int = field(default_factory=lambda: int(time.time()))


class AdapterTable:
    def __init__(self, given: Iterable[tuple[str, str]] = (), download_dir: str | None = None) -> None:
        """`given`: (name, path) of those that are there from the start."""
        self._by_name = {name: ServedAdapter(name, path) for name, path in given}
        self._download_dir = download_dir
        self._changing = asyncio.Lock()

    @property
    def listed(self) -> tuple[ServedAdapter, ...]:
        return tuple(self._by_name.values())

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._by_name)

    def find(self, name: str) -> ServedAdapter | None:
        return self._by_name.get(name)

    async def load_all(self, client: EngineClient) -> None:
        """Into an engine that has none. StartupError says of the first that cannot be loaded why."""
        for adapter in self.listed:
            await self._load(client, adapter)

    async def ensure(self, client: EngineClient, name: str, path: str) -> ServedAdapter:
        """The adapter of this name that was read from this path, loaded if need be. RequestError if it cannot be."""
        async with self._changing:
            found = self._by_name.get(name)
            if found is None or found.path != path:
                found = await self._put(client, name, path)
            return found

    async def add(self, client: EngineClient, name: str, path: str, *, replaces: bool) -> None:
        """Load one more, or one in another's place. RequestError if it cannot be; then nothing has changed."""
        async with self._changing:
            if name in self._by_name and not replaces:
                raise RequestError(
                    f"The adapter {name!r} is loaded already; `load_inplace` replaces it.", param="lora_name"
                )
            await self._put(client, name, path)

    async def _put(self, client: EngineClient, name: str, path: str) -> ServedAdapter:
        adapter = ServedAdapter(name, path)
        try:
            await self._load(client, adapter)
        except StartupError as error:
            raise RequestError(error.message, param="lora_path") from None
        before = self._by_name.get(name)
        self._by_name[name] = adapter
        if before is not None:
            self._leave(client, before)
        return adapter

    def remove(self, client: EngineClient | None, name: str) -> None:
        """Those who have it keep it until they are done."""
        adapter = self._by_name.pop(name)
        if client is not None:
            self._leave(client, adapter)

    @contextmanager
    def use(self, adapter: ServedAdapter, client: Callable[[], EngineClient | None]) -> Iterator[None]:
        """It stays loaded within the block, whatever happens to its name."""
        adapter.users += 1
        try:
            yield
        finally:
            adapter.users -= 1
            engine = client()
            if engine is not None and self._by_name.get(adapter.name) is not adapter:
                self._leave(engine, adapter)

    async def _load(self, client: EngineClient, adapter: ServedAdapter) -> None:
        folder = await asyncio.to_thread(resolve, adapter.path, None, self._download_dir)
        try:
            await client.load_adapter(adapter.number, str(folder))
        except StartupError as error:
            raise StartupError(f"adapter {adapter.name}: {error.message}") from None

    def _leave(self, client: EngineClient, adapter: ServedAdapter) -> None:
        if not adapter.users:
            client.unload_adapter(adapter.number)
