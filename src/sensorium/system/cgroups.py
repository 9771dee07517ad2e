"""Limits of the control groups that a process lives in: a container's, a systemd unit's, a Slurm job's. Torch-free.

Groups are nested, and every one of them limits what is inside it: the process's own group may say "max" while one above
it does not. Versions 1 and 2 of the kernel's files are read, side by side where a machine has both.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

_MEMORY = (  # (limits, usage, what of memory.stat can be had back at once) of version 2, then 1
    (("memory.max", "memory.high"), "memory.current", "inactive_file"),
    (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
)
_CPU_SETS = ("cpuset.cpus.effective", "cpuset.effective_cpus", "cpuset.cpus")


def free_memory_bytes(root: Path = Path("/")) -> int | None:
    """What the tightest group leaves, counting files that nobody uses now as free; None without any limit."""
    found = [left for folder in _folders(root) for left in _left(folder)]
    return max(min(found), 0) if found else None


def cores(root: Path = Path("/")) -> int | None:
    """Whole cores that the tightest group allows, at least 1; None without any limit."""
    found = [count for folder in _folders(root) for count in (_quota(folder), _set(folder)) if count is not None]
    return max(min(found), 1) if found else None


def _folders(root: Path) -> Iterator[Path]:
    """Every group around this process and the one that started it, which ends when its group does, from within."""
    mount = root / "sys/fs/cgroup"
    seen: dict[Path, None] = {}
    for process in ("self", str(os.getppid())):
        for controllers, path in _paths(root / "proc" / process / "cgroup"):
            # Version 1 has one tree for each set of controllers. A container sees its own group as the top of a tree.
            names = (controllers, *controllers.split(",")) if controllers else ("", "unified")
            for top in (mount / name for name in names):
                inner = top / path.lstrip("/")
                seen.update(dict.fromkeys(one for one in (inner, *inner.parents) if one.is_relative_to(top)))
    seen.update(dict.fromkeys((mount, mount / "memory", mount / "cpu", mount / "cpuset")))
    yield from seen


def _paths(file: Path) -> Iterator[tuple[str, str]]:
    """(controllers, path) of each line of a `cgroup` file; no controllers in version 2."""
    for line in _text(file).splitlines():
        _, _, rest = line.partition(":")
        controllers, _, path = rest.partition(":")
        if ".." not in path.split("/"):  # outside the namespace's top
            yield controllers.removeprefix("name="), path


def _left(folder: Path) -> Iterator[int]:
    for limits, usage, reclaimable in _MEMORY:
        used = _number(folder / usage)
        if used is None:
            continue
        stat = dict(line.split()[:2] for line in _text(folder / "memory.stat").splitlines() if " " in line)
        used -= min(used, int(stat.get(reclaimable, 0)))
        yield from (bound - used for name in limits if (bound := _number(folder / name)) is not None)


def _quota(folder: Path) -> int | None:
    """Cores that the group may use on average."""
    quota, _, period = _text(folder / "cpu.max").partition(" ")
    if not quota:
        quota, period = _text(folder / "cpu.cfs_quota_us"), _text(folder / "cpu.cfs_period_us")
    try:
        return int(quota) // int(period) if int(quota) > 0 and int(period) > 0 else None
    except ValueError:  # "max", or no such file
        return None


def _set(folder: Path) -> int | None:
    """Cores that the group is pinned to."""
    listed = next((text for name in _CPU_SETS if (text := _text(folder / name))), "")
    try:
        ends = [part.partition("-") for part in listed.split(",") if part]
        return sum(int(last or first) - int(first) + 1 for first, _, last in ends) or None
    except ValueError:
        return None


def _number(file: Path) -> int | None:
    try:
        return int(_text(file))
    except ValueError:  # "max", or no such file
        return None


def _text(file: Path) -> str:
    try:
        return file.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
