"""Processes that compute beside streams: what they get of a processor, and of memory when there is none."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

NICENESS = 5  # a third of the share of a processor that streams have: they go on beside it, and it ends in time
ENDED_FIRST = "1000"  # oom_score_adj


def stand_back(pid: int = 0) -> None:
    """The niceness of a process, 0 is this one, grows by `NICENESS`."""
    with suppress(OSError):  # it has ended, or may not be told
        os.setpriority(os.PRIO_PROCESS, pid, min(os.getpriority(os.PRIO_PROCESS, pid) + NICENESS, 19))


def end_first() -> None:
    """Whoever makes memory run out, this process is what can be done without."""
    with suppress(OSError):  # no Linux
        Path("/proc/self/oom_score_adj").write_text(ENDED_FIRST)
