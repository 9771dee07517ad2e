"""Where engines come from that share what they import: `engine/nursery.py` as the HTTP process sees it."""

from __future__ import annotations

import os

from sensorium.system.nursery import Nursery

ONE_THREAD = {"OPENBLAS_NUM_THREADS": "1"}
"""numpy's library starts its threads when it is imported, and a process that forks should have none but its own."""


def engine_nursery() -> Nursery:
    return Nursery("sensorium.engine.nursery", ONE_THREAD | os.environ)
