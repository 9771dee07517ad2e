"""Calls malloc_trim shortly after large requests to return parser memory to the OS."""

from __future__ import annotations

import asyncio

from sensorium.system.malloc import trim

_MIN_BYTES = 512 * 1024
_PAUSE_S = 0.25
"""So long after the last large body: its answer may still be on its way, and in a crowd one trim is for all."""


class HeapTrimmer:
    def __init__(self) -> None:
        self._timer: asyncio.TimerHandle | None = None

    def after(self, size_bytes: int) -> None:
        """Bodies of so many bytes are gone. Small ones leave nothing worth the milliseconds."""
        if size_bytes >= _MIN_BYTES:
            if self._timer is not None:
                self._timer.cancel()
            self._timer = asyncio.get_running_loop().call_later(_PAUSE_S, self._trim)

    def _trim(self) -> None:
        self._timer = None
        asyncio.get_running_loop().run_in_executor(None, trim)
