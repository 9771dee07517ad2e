"""Tunes glibc malloc so that memory freed after a large request returns to the OS. Does nothing with other C libraries.

Left alone it would come to reuse blocks of up to 32 MiB instead of returning them, in an arena per thread.
"""

from __future__ import annotations

import ctypes
import mmap
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from sensorium.units import MiB

_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8  # of malloc.h
_MAPPING = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ \d+ +(/.+)\n")


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


def forget_code() -> None:
    """Return pages of libraries that nobody has written to. Most of what an import reads is never run again; what is
    comes back from the page cache, 16 pages for a fault. Takes milliseconds."""
    if sys.platform != "linux":
        return
    madvise = ctypes.CDLL(None).madvise
    for start, end in _unwritten(Path("/proc/self/smaps").read_text()):
        madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def _unwritten(smaps: str) -> Iterator[tuple[int, int]]:
    """Mappings of programs and libraries, not of weights, that have no page of their own."""
    found = [(match, smaps[match.end() : smaps.find("VmFlags:", match.end())]) for match in _MAPPING.finditer(smaps)]
    programs = {match[4] for match, _ in found if "x" in match[3]}
    for match, sizes in found:
        if match[4] in programs and match[3][1:] in ("-xp", "--p") and re.search(r"^Anonymous: +0 kB$", sizes, re.M):
            yield int(match[1], 16), int(match[2], 16)
