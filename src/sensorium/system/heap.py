"""Calls malloc_trim shortly after large requests to return the memory of parsers and decoded media to the OS."""

from __future__ import annotations

import asyncio

from sensorium.system.malloc import trim

_MIN_BYTES = 512 * 1024
_PAUSE_S = 0.25
"""So long after the last large one: its answer may still be on its way, and in a crowd one trim is for all."""
_LONGEST_PAUSE_S = 5.0  # after the first of a crowd that does not end


class HeapTrimmer:
    def __init__(self) -> None:
        self._timer: asyncio.TimerHandle | None = None
        self._latest_s = 0.0  # of the loop's time, for the trim that is to come

    def after(self, size_bytes: int) -> None:
        """So many bytes are gone. Few leave nothing worth the milliseconds."""
        if size_bytes < _MIN_BYTES:
            return
        loop = asyncio.get_running_loop()
        if self._timer is None:
            self._latest_s = loop.time() + _LONGEST_PAUSE_S
        else:
            self._timer.cancel()
        self._timer = loop.call_at(min(loop.time() + _PAUSE_S, self._latest_s), self._trim)

    def _trim(self) -> None:
        self._timer = None
        asyncio.get_running_loop().run_in_executor(None, trim)
