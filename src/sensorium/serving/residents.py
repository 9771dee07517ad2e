"""Which models are in memory: loads them, makes room for one that comes, gives back what nobody uses.

A model with requests in flight is never unloaded. Where all that could make room are in use, the one that was asked for
longest ago takes nobody in, and is unloaded when its last request has ended; who asks for it meanwhile waits.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Coroutine, Sequence
from time import monotonic
from typing import Any

from sensorium.errors import RequestError, SensoriumError, StartupError, UnavailableError
from sensorium.serving.entry import USED_LATELY_S, CatalogEntry
from sensorium.units import size_text

Show = Callable[[str, str, float], None]
"""Of a model's name, what it is at, and how far that is."""

_log = logging.getLogger("sensorium")


class Signal:
    """Wakes everybody who waits for any change."""

    def __init__(self) -> None:
        self._event = asyncio.Event()

    def fire(self) -> None:
        event, self._event = self._event, asyncio.Event()
        event.set()

    async def wait(self) -> None:
        await self._event.wait()


class Residents:
    """`budget_bytes` is what the engines of all models may take together; None: whatever they take."""

    def __init__(self, entries: Sequence[CatalogEntry], budget_bytes: int | None, show: Show) -> None:
        self.changed = Signal()
        self.budget_bytes = budget_bytes
        self._entries = entries
        self._show = show
        self._room = asyncio.Lock()
        self._loads: dict[CatalogEntry, asyncio.Task[None]] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._timers: dict[CatalogEntry, asyncio.TimerHandle] = {}

    @property
    def taken_bytes(self) -> int:
        return sum(entry.taken_bytes for entry in self._entries)

    # Loading

    def begin(self, entry: CatalogEntry, *, may_evict: bool = True) -> asyncio.Task[None]:
        """Load it, unless that is under way. The task ends without an error: `entry.failure` says why it failed."""
        if (running := self._loads.get(entry)) is not None:
            return running
        entry.stage, entry.failure, entry.progress = "loading", "", ("", 0.0)
        task = self._spawn(self._load(entry, may_evict))
        self._loads[entry] = task
        return task

    async def _load(self, entry: CatalogEntry, may_evict: bool) -> None:
        begun_s, is_loaded, failure = monotonic(), False, "an error inside the server, which its log has"
        try:
            is_loaded = await self._is_loaded(entry, may_evict)
            failure = ""
        except SensoriumError as error:
            failure = self._told(entry, error.message)
        finally:
            if not is_loaded:
                await entry.close()
            entry.stage, entry.failure = None, failure
            del self._loads[entry]
            if failure:
                entry.failed_s = monotonic()
            elif is_loaded:
                entry.loaded_s, entry.load_s = monotonic(), monotonic() - begun_s
                self.left(entry)
            if may_evict or len(self._entries) > 1:  # else the only model's start, of which the program tells itself
                _say(entry)
            self.changed.fire()

    async def _is_loaded(self, entry: CatalogEntry, may_evict: bool) -> bool:
        """Whether it is there now: not if there is no room and none may be made. Else SensoriumError says why not."""
        if entry.source is None:
            return entry.served is not None

        def on_progress(phase: str, fraction: float) -> None:
            entry.progress = phase, fraction
            self._show(entry.name, phase, fraction)

        await entry.close()  # of an engine that was lost
        outline = entry.outline = await entry.source.find(on_progress)
        await entry.adapters.find_all()
        if not await self._has_room(entry, outline.engine_bytes, may_evict):
            return False
        entry.served = await entry.stack.enter_async_context(entry.source.open(on_progress))
        ready = await entry.served.client.wait_ready()
        entry.reserved_bytes -= max(outline.cache_bytes - ready.kv_bytes, 0)  # less than it might have taken
        entry.served.check_task()
        await entry.adapters.load_all(entry.served.client)
        entry.learn()
        return True

    def _told(self, entry: CatalogEntry, message: str) -> str:
        """What clients may read of why it failed: without where its files are."""
        checkpoint = entry.checkpoint
        return message.replace(str(checkpoint.folder), entry.name) if checkpoint is not None else message

    # Room

    async def _has_room(self, entry: CatalogEntry, engine_bytes: int, may_evict: bool) -> bool:
        """Reserve its memory, after unloading others if that is allowed. StartupError if that would not do."""
        async with self._room:
            try:
                while (budget := self.budget_bytes) is not None:
                    wanted = engine_bytes + entry.adapters.nbytes
                    if self.taken_bytes + wanted <= budget:
                        break
                    if wanted > budget:
                        raise StartupError(
                            f"it takes about {size_text(wanted)}, and all models together may take "
                            f"{size_text(budget)} (--memory; less context or --quantization makes it smaller)"
                        )
                    if not may_evict or not entry.waiting:  # nobody wants it any more: others keep their memory
                        return False
                    await self._shrink(entry)
                entry.reserved_bytes = engine_bytes
                return True
            finally:
                for one in self._entries:
                    one.is_leaving = False
                self.changed.fire()

    async def make_room(self, entry: CatalogEntry, nbytes: int) -> None:
        """For an adapter of a model that is in use: idle models make room, if that is enough. RequestError if the
        memory would not do whatever is unloaded, UnavailableError if others use it."""
        while (budget := self.budget_bytes) is not None and self.taken_bytes + nbytes > budget:
            idle = [one for one in self._unloadable() if one is not entry and not self._is_busy(one)]
            if self.taken_bytes - sum(one.taken_bytes for one in idle) + nbytes > budget:
                raise self._no_room_beside(entry, nbytes, budget)
            victim = min(idle, key=lambda one: one.used_s)
            if (stays_s := victim.stays_s()) > 0:
                await self._wait(min(stays_s, USED_LATELY_S))
            else:
                _log.info("%s is unloaded to make room for an adapter of %s", victim.name, entry.name)
                await self.unload(victim)

    def _no_room_beside(self, entry: CatalogEntry, nbytes: int, budget: int) -> SensoriumError:
        staying = sum(one.taken_bytes for one in self._entries if one is entry or one.keeping.pinned)
        message = (
            f"the adapter takes about {size_text(nbytes)}, and all models together may take {size_text(budget)} "
            f"(--memory), of which {entry.name!r} and models that stay (pinned) have {size_text(staying)}"
        )
        if staying + nbytes > budget:
            return RequestError(f"{message}: unload another adapter", param="lora_path", code="memory")
        return UnavailableError(f"{message}; the rest is in use", retry_after_s=5.0)

    def _unloadable(self) -> list[CatalogEntry]:
        return [one for one in self._entries if one.stage is None and one.served and not one.keeping.pinned]

    async def _shrink(self, comer: CatalogEntry) -> None:
        """One step towards more room: unload a model, or wait until one can be."""
        loaded = self._unloadable()
        victim = min(loaded, key=lambda one: (self._is_busy(one), one.used_s), default=None)
        if victim is None and not any(one.stage for one in self._entries if one is not comer):
            raise StartupError(
                "models that stay (pinned) take the memory that all may take together: --memory can be more"
            )
        if victim is None:
            await self.changed.wait()
        elif (stays_s := victim.stays_s()) > 0:
            await self._wait(min(stays_s, USED_LATELY_S))
        elif not self._is_busy(victim):
            _log.info("%s is unloaded to make room for %s", victim.name, comer.name)
            await self.unload(victim)
        elif not victim.users:
            await asyncio.sleep(0)  # those who waited for it go in now
        else:
            victim.is_leaving = not any(one.is_leaving for one in loaded if one is not victim)
            await self.changed.wait()

    def _is_busy(self, entry: CatalogEntry) -> bool:
        return entry.users > 0 or (entry.waiting > 0 and not entry.is_leaving)

    async def _wait(self, most_s: float) -> None:
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(most_s):
                await self.changed.wait()

    # Unloading

    async def unload(self, entry: CatalogEntry) -> None:
        """Nobody may be using it."""
        self._stop_timer(entry)
        entry.stage, entry.idle_s = "unloading", entry.keeping.idle_unload_s
        try:
            await entry.close()
        finally:
            entry.stage = None
            self.changed.fire()

    def entered(self, entry: CatalogEntry) -> None:
        entry.users += 1
        entry.used_s = monotonic()
        self._stop_timer(entry)

    def left(self, entry: CatalogEntry) -> None:
        """Nobody has it now, perhaps: then its idle time begins."""
        entry.used_s = monotonic()
        self._stop_timer(entry)
        if entry.users:
            return
        self.changed.fire()
        if entry.idle_s is not None and not entry.keeping.pinned and entry.source is not None:
            loop = asyncio.get_running_loop()
            self._timers[entry] = loop.call_later(entry.idle_s, self._expired, entry)

    def _expired(self, entry: CatalogEntry) -> None:
        self._timers.pop(entry, None)
        if entry.stage is None and entry.served is not None and not self._is_busy(entry):
            _log.info("%s is unloaded: nobody asked for it for %.0f s", entry.name, entry.idle_s or 0.0)
            self._spawn(self.unload(entry))

    def _stop_timer(self, entry: CatalogEntry) -> None:
        if (timer := self._timers.pop(entry, None)) is not None:
            timer.cancel()

    def expires_in_s(self, entry: CatalogEntry) -> float | None:
        """Until it is unloaded if nobody asks for it; None where that is never."""
        timer = self._timers.get(entry)
        return entry.idle_s if timer is None else max(timer.when() - asyncio.get_running_loop().time(), 0.0)

    async def aclose(self) -> None:
        """End loads, and give back everything."""
        for entry in tuple(self._timers):
            self._stop_timer(entry)
        tasks = tuple(self._tasks)
        for task in tasks:
            if not task.cancelling():  # else it is giving back what it took, which a second time would interrupt
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await asyncio.gather(*(entry.close() for entry in self._entries))

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def _ended(self, task: asyncio.Task[Any]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            _log.error("a model could not be loaded or unloaded", exc_info=error)


def _say(entry: CatalogEntry) -> None:
    if entry.failure:
        _log.error("%s cannot be loaded: %s", entry.name, entry.failure)
    elif entry.served is not None:
        _log.info("%s is loaded after %.1f s", entry.name, entry.load_s)
    else:
        _log.info("%s is not loaded now: others have the memory", entry.name)
