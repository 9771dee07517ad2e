"""Named points where tests make the engine stumble: raise, sleep or exit at the k-th pass. Nothing in a normal start.

`SENSORIUM_FAULTS="step:raise:10,tower:sleep:1:5"` is point:action:pass[:seconds]; `pass` may be `*` for every pass. The
command line never sets it; it is read once, by the engine's child.
"""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

VARIABLE = "SENSORIUM_FAULTS"


class InjectedFault(RuntimeError):
    """Raised by a fault point."""


@dataclass(frozen=True, slots=True)
class Fault:
    point: str
    action: str
    at: int | None  # None: every pass
    seconds: float

    @classmethod
    def parse(cls, text: str) -> Fault:
        point, action, at, *rest = text.split(":")
        if action not in _ACTIONS:
            raise ValueError(f"{VARIABLE}: unknown action '{action}'")
        return cls(point, action, None if at == "*" else int(at), float(rest[0]) if rest else 0.0)


def _raise(fault: Fault) -> None:
    raise InjectedFault(f"fault at {fault.point}")


def _sleep(fault: Fault) -> None:
    time.sleep(fault.seconds)


def _exit(fault: Fault) -> None:
    os._exit(70)


_ACTIONS: dict[str, Callable[[Fault], None]] = {"raise": _raise, "sleep": _sleep, "exit": _exit}


class Faults:
    def __init__(self, specification: str = "") -> None:
        self._faults = [Fault.parse(one) for one in specification.split(",") if one]
        self._passes: Counter[str] = Counter()

    def hit(self, point: str) -> None:
        if not self._faults:
            return
        self._passes[point] += 1
        for fault in self._faults:
            if fault.point == point and fault.at in (None, self._passes[point]):
                _ACTIONS[fault.action](fault)
