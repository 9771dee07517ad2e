"""Memory that this process and those it starts can still take."""

from __future__ import annotations

import re
from pathlib import Path

from sensorium.system import cgroups
from sensorium.units import GiB


def free_memory_bytes() -> int:
    """The machine's, or what the tightest limit around this process leaves."""
    found = re.search(r"MemAvailable:\s+(\d+) kB", _meminfo())
    free = int(found[1]) * 1024 if found else 4 * GiB
    allowed = cgroups.free_memory_bytes()
    return free if allowed is None else min(free, allowed)


def _meminfo() -> str:
    try:
        return Path("/proc/meminfo").read_text()
    except OSError:  # no Linux
        return ""
