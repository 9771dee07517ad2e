"""The LoRA adapters of one served model: names that clients ask for like models, and what the engine calls them.

Each that is loaded gets a number of its own, so an adapter that takes another's name is another one: who has acquired
the old one ends with it. The table outlives the engine; whatever engine comes next is given what is in it.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Awaitable, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from sensorium.checkpoint.adapters import adapter_bytes
from sensorium.checkpoint.hub import resolve
from sensorium.errors import RequestError, StartupError

if TYPE_CHECKING:
    from sensorium.ipc.client import EngineClient

MakeRoom = Callable[[int], Awaitable[None]]
"""Until so many bytes more are there for the model's adapters; an error says why there cannot be."""

CheckName = Callable[[str], None]
"""RequestError if the name is another's."""

_numbers = itertools.count(1)
logger = logging.getLogger(__name__)


async def _unbounded(nbytes: int) -> None:
    pass


def _any_name(name: str) -> None:
    pass


@dataclass(slots=True, eq=False)
class ServedAdapter:
    """`path` is as the operator wrote it: a folder or a hub id. `nbytes` are of its file, and of memory once an engine
    has it. `was_loaded`: by any engine so far."""

    name: str
    path: str
    number: int = field(default_factory=lambda: next(_numbers))
    users: int = 0
    created: int = field(default_factory=lambda: int(time.time()))
    folder: Path | None = None
    nbytes: int = 0
    was_loaded: bool = False


class AdapterTable:
    def __init__(self, given: Iterable[tuple[str, str]] = (), download_dir: str | None = None) -> None:
        """`given`: (name, path) of those that are there from the start."""
        self._by_name = {name: ServedAdapter(name, path) for name, path in given}
        self._held = set(self._by_name.values())  # by the engine, while there is one: those in use without a name, too
        self._download_dir = download_dir
        self._changing = asyncio.Lock()
        self._coming: str | None = None  # whose load is under way

    @property
    def listed(self) -> tuple[ServedAdapter, ...]:
        return tuple(self._by_name.values())

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._by_name)

    @property
    def nbytes(self) -> int:
        """What they take of an engine's memory, or will when it has them; 0 of those that were not found yet."""
        return sum(adapter.nbytes for adapter in self._held)

    def find(self, name: str) -> ServedAdapter | None:
        return self._by_name.get(name)

    def has_claim(self, name: str) -> bool:
        """Whether an adapter has this name, or will have it when its load has ended."""
        return name in self._by_name or name == self._coming

    async def find_all(self) -> None:
        """Their folders, fetched if need be, so that `nbytes` is known before there is an engine. StartupError if one
        cannot be had that never was there; one that was and is gone does not keep its model from coming back."""
        for adapter in self.listed:
            with self._may_be_gone(adapter):
                await self._find(adapter)

    async def load_all(self, client: EngineClient) -> None:
        """Into an engine that has none. StartupError says of the first that cannot be loaded why, as above."""
        for adapter in self.listed:
            with self._may_be_gone(adapter):
                adapter.nbytes = await self._load(client, adapter)

    @contextmanager
    def _may_be_gone(self, adapter: ServedAdapter) -> Iterator[None]:
        """One that was loaded before and cannot be again is forgotten, with a line in the log."""
        try:
            yield
        except StartupError as error:
            if not adapter.was_loaded:
                raise
            logger.error("adapter %s is not served any more: %s", adapter.name, error.message)
            self.remove(None, adapter.name)

    async def ensure(self, client: EngineClient, name: str, path: str) -> ServedAdapter:
        """The adapter of this name that was read from this path, loaded if need be. RequestError if it cannot be."""
        async with self._changing:
            found = self._by_name.get(name)
            if found is None or found.path != path:
                found = await self._put(client, name, path, _unbounded)
            return found

    async def add(
        self,
        client: EngineClient,
        name: str,
        path: str,
        *,
        replaces: bool,
        make_room: MakeRoom = _unbounded,
        check_name: CheckName = _any_name,
    ) -> None:
        """Load one more, or one in another's place, which is there until the new one is. RequestError if it cannot be,
        or what `make_room` raises; then nothing has changed. `check_name` is asked when its turn has come: from then on
        the name is claimed."""
        async with self._changing:
            check_name(name)
            if name in self._by_name and not replaces:
                raise RequestError(
                    f"The adapter {name!r} is loaded already; `load_inplace` replaces it.", param="lora_name"
                )
            await self._put(client, name, path, make_room)

    async def _put(self, client: EngineClient, name: str, path: str, make_room: MakeRoom) -> ServedAdapter:
        adapter, self._coming = ServedAdapter(name, path), name
        try:
            await self._find(adapter)
            await self._load_within(client, adapter, make_room)
        except StartupError as error:
            raise RequestError(error.message, param="lora_path") from None
        finally:
            self._coming = None
        before = self._by_name.get(name)
        self._by_name[name] = adapter
        if before is not None:
            self._leave(client, before)
        return adapter

    async def _load_within(self, client: EngineClient, adapter: ServedAdapter, make_room: MakeRoom) -> None:
        """Room for its file first, then for what it has come to: another type, matrices that layers share."""
        await make_room(adapter.nbytes)
        self._held.add(adapter)
        try:
            nbytes = await self._load(client, adapter)
            if nbytes > adapter.nbytes:
                await make_room(nbytes - adapter.nbytes)
            adapter.nbytes = nbytes
        except BaseException:
            self._leave(client, adapter)
            raise

    def remove(self, client: EngineClient | None, name: str) -> None:
        """Those who have it keep it until they are done."""
        self._leave(client, self._by_name.pop(name))

    @contextmanager
    def use(self, adapter: ServedAdapter, client: Callable[[], EngineClient | None]) -> Iterator[None]:
        """It stays loaded within the block, whatever happens to its name."""
        adapter.users += 1
        try:
            yield
        finally:
            adapter.users -= 1
            if self._by_name.get(adapter.name) is not adapter:
                self._leave(client(), adapter)

    async def _find(self, adapter: ServedAdapter) -> None:
        adapter.folder = await asyncio.to_thread(resolve, adapter.path, None, self._download_dir)
        adapter.nbytes = adapter.nbytes or adapter_bytes(adapter.folder)

    async def _load(self, client: EngineClient, adapter: ServedAdapter) -> int:
        """What it takes there."""
        if adapter.folder is None:
            await self._find(adapter)
        try:
            nbytes = await client.load_adapter(adapter.number, str(adapter.folder))
        except StartupError as error:
            raise StartupError(f"adapter {adapter.name}: {error.message}") from None
        adapter.was_loaded = True
        return nbytes

    def _leave(self, client: EngineClient | None, adapter: ServedAdapter) -> None:
        if adapter.users:
            return
        self._held.discard(adapter)
        if client is not None:
            client.unload_adapter(adapter.number)
