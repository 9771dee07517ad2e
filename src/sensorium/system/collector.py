"""Python's collector of garbage: not while a process starts, and when something large has ended."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager

from sensorium.system.malloc import forget_code, trim


@contextmanager
def no_collection() -> Iterator[None]:
    """Around imports: torch alone makes a million objects, and every full collection looks at all again, for 90 ms.

    What is there at the end counts as staying: no later collection looks at it.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def give_back() -> None:
    """Return to the system what something large has left, now: in it are circles of references, which Python finds when
    enough others were made, and its memory is torn by what came meanwhile. Takes some tens of milliseconds."""
    gc.collect()
    trim()
    forget_code()
