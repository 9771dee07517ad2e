"""Tunes glibc malloc so that memory freed after a large request returns to the OS. Does nothing with other C libraries.

Left alone it would come to reuse blocks of up to 32 MiB instead of returning them, in an arena per thread.
"""

from __future__ import annotations

import ctypes

from sensorium.units import MiB

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of malloc.h


def return_large_blocks() -> None:
    """For this process, from now on: a freed block of some megabytes goes back to the system at once."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for option, value in ((_MMAP_THRESHOLD, 2 * MiB), (_TRIM_THRESHOLD, 8 * MiB), (_ARENA_MAX, 2)):
            mallopt(option, value)


def trim() -> None:
    """Return pages in which nothing lives any more: millions of small pieces end like that. Takes milliseconds."""
    malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if malloc_trim is not None:
        malloc_trim(0)
