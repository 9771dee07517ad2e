"""Python's collector of garbage, while a process starts."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


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
