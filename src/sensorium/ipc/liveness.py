"""Signs of life between the two processes, and who ends an engine that hangs. Torch-free.

Two faults look alike from outside, so each is watched where it shows. A process that is stopped, or waits for a device
that never answers, sends no beat: the client sees that, whether there are requests or not. A main loop that is caught
in one step while the rest of the process lives is seen by the thread that sends the beats, which knows what the loop is
at and how long such work takes.
"""

from __future__ import annotations

import faulthandler
import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from time import monotonic

from sensorium.system.processes import activity

BEAT_S = 1.0
MAX_BUSY_SILENCE_S = 120.0
FACTOR = 20  # times the 99th percentile of like work counts as hung
SLOW_FACTOR = 30  # times the least bound for what reads and writes files
UNMEASURED_PACE_S = 1e-9  # per multiply-add, a fifth as fast as the slowest processors that serve
KEPT_TIMES = 256  # of each size of work
HUNG = 71  # exit code

logger = logging.getLogger("sensorium.engine")


class WatchedTime:
    """Seconds since the last reset, as somebody counts them who looks once in `interval_s`.

    One interval counts for twice its length at most: while the watcher itself is stopped, or its machine suspended, it
    cannot say that another process was silent.
    """

    def __init__(self, interval_s: float) -> None:
        self._most_s = 2 * interval_s
        self.reset()

    def reset(self) -> None:
        self._seconds = 0.0
        self._looked_s = monotonic()

    def look(self) -> float:
        now = monotonic()
        self._seconds += min(now - self._looked_s, self._most_s)
        self._looked_s = now
        return self._seconds


class Silence:
    """How long another process has given no sign of life. One that computes or reads, but whose threads do not get to
    say so, is given more time."""

    def __init__(self, hang_after_s: float) -> None:
        self._hang_after_s = hang_after_s
        self._spent = WatchedTime(BEAT_S)
        self._activity = 0  # of the process, when it was last looked at

    def heard(self) -> None:
        self._spent.reset()

    def too_long_s(self, pid: int | None) -> float | None:
        """Seconds since it was heard, where they are too many. Ask about every `BEAT_S`."""
        seconds = self._spent.look()
        if seconds <= BEAT_S:
            return None
        before, self._activity = self._activity, 0 if pid is None else activity(pid)
        if self._activity != before and seconds <= MAX_BUSY_SILENCE_S:
            return None
        return seconds if seconds > self._hang_after_s else None


class StepTimes:
    """How long work of a size takes here, by what was measured. Sizes are multiply-adds, in powers of two."""

    def __init__(self) -> None:
        self._times: dict[int, deque[float]] = {}

    def add(self, work: float, seconds: float) -> None:
        size = int(work).bit_length()
        times = self._times.get(size)
        if times is None:
            times = self._times[size] = deque(maxlen=KEPT_TIMES)
        times.append(seconds)

    def expected_s(self, work: float) -> float:
        """The 99th percentile of like work. Of sizes never met, what the next smaller one says, in proportion: more
        work takes less time for each part."""
        size = int(work).bit_length()
        known = sorted(self._times)
        smaller = [one for one in known if one <= size]
        if not smaller and not known:
            return work * UNMEASURED_PACE_S
        nearest = smaller[-1] if smaller else known[0]
        times = sorted(self._times[nearest])
        return times[int(0.99 * len(times))] * float(2 ** (max(size - nearest, 0)))


class Pulse:
    """The engine's thread that beats, and ends the process when its main loop stays in one piece of work for too long.

    The main loop says `begin` before every piece and `end` when it is about to wait for the other process.
    """

    def __init__(self, beat: Callable[[], None], least_s: float, blame: Callable[[], None] | None = None) -> None:
        """A piece of work may take `least_s` in any case. `blame` ends the process if somebody else is why it hangs."""
        self._beat = beat
        self._blame = blame
        self._least_s = least_s
        self._times = StepTimes()
        self._piece: tuple[float, float, bool] | None = None  # (when it began, work, slow)
        self._is_stopped = threading.Event()

    def start(self) -> None:
        threading.Thread(target=self._run, name="engine-pulse", daemon=True).start()

    def stop(self) -> None:
        """The main loop is through; its process may have other things to do."""
        self._is_stopped.set()

    def begin(self, work: float = 0.0, *, slow: bool = False) -> None:
        """A piece of about `work` multiply-adds begins, and the one before it is done. `slow`: it waits for files."""
        self.end()
        self._piece = (monotonic(), work, slow)

    def end(self) -> None:
        piece, self._piece = self._piece, None
        if piece is not None and piece[1]:
            self._times.add(piece[1], monotonic() - piece[0])

    @property
    def is_busy(self) -> bool:
        """Whether the main loop is in a piece of work."""
        return self._piece is not None

    def bound_s(self, work: float, *, slow: bool = False) -> float:
        """How long a piece may take before the loop counts as hung."""
        least_s = self._least_s * (SLOW_FACTOR if slow else 1)
        return max(least_s, FACTOR * self._times.expected_s(work)) if work else least_s

    def _run(self) -> None:
        spent = WatchedTime(BEAT_S)
        watched = None
        while not self._is_stopped.wait(min(BEAT_S, self._least_s / 4)):
            self._beat()
            piece = self._piece
            if piece is not watched:
                watched = piece
                spent.reset()
            elif piece is not None:
                seconds, bound_s = spent.look(), self.bound_s(piece[1], slow=piece[2])
                if seconds > bound_s:
                    if self._blame is not None:
                        self._blame()
                    _give_up(seconds, bound_s)


def _give_up(seconds: float, bound_s: float) -> None:
    logger.critical(
        "the engine hangs: it has been in one step for %.0f s, which may take %.0f s; it ends itself, to "
        "be replaced. This is where it is:",
        seconds,
        bound_s,
    )
    faulthandler.dump_traceback()
    os._exit(HUNG)
