"""What this program's processes weigh, read from /proc; nothing is reported where there is none."""

from __future__ import annotations

import resource
from collections.abc import Iterable
from pathlib import Path

_PROC = Path("/proc")
_PAGE_BYTES = resource.getpagesize()


def family(pid: int) -> list[int]:
    """A process and everything it started that still runs."""
    parents: dict[int, int] = {}
    for entry in _PROC.glob("[0-9]*"):
        try:
            fields = (entry / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it ended while we looked
            continue
        parents[int(entry.name)] = int(fields[1])
    found = [pid]
    for process in found:  # grows while it is walked
        found += [child for child, parent in parents.items() if parent == process]
    return found


def start_ticks(pid: int) -> int | None:
    """When a process began, by the kernel's clock: with its id it is one process for good. None if it is not there, or
    has ended and was not waited for."""
    try:
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] in ("Z", "X") else int(fields[19])


def activity(pid: int) -> int:
    """A number that grows while a process computes, waits for pages or reads; 0 where nothing is known of it."""
    try:
        fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
        read = (_PROC / str(pid) / "io").read_text().split("\n", 1)[0].split()[1]
    except (OSError, IndexError):
        return 0
    return int(fields[9]) + int(fields[11]) + int(fields[12]) + int(read)  # major faults, user and system time


def resident_bytes(pids: Iterable[int]) -> int:
    """Resident memory of these processes together; pages that they share count once (PSS)."""
    return sum(_rollup(pid, "Pss:") for pid in pids)


def unshared_sum_bytes(pids: Iterable[int]) -> int:
    """The same as the sum of every process's RSS, where shared pages count once per process."""
    return sum(_rollup(pid, "Rss:") for pid in pids)


def rss_bytes(pid: int) -> int:
    """Resident memory of one process, shared pages included: as quick as it can be had."""
    try:
        return int((_PROC / str(pid) / "statm").read_text().split()[1]) * _PAGE_BYTES
    except (OSError, IndexError):
        return 0


def _rollup(pid: int, name: str) -> int:
    try:
        text = (_PROC / str(pid) / "smaps_rollup").read_text()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in text.splitlines() if line.startswith(name)), 0)
