"""The memory of a GPU, asked of its driver: for processes that never import torch."""

from __future__ import annotations

import ctypes
import functools

_LIBRARY = "libnvidia-ml.so.1"


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


@functools.cache
def gpu_memory_bytes() -> int | None:
    """All of the first GPU's, asked once; None where there is none."""
    try:
        library = ctypes.CDLL(_LIBRARY)
    except OSError:
        return None
    device, memory = ctypes.c_void_p(), _Memory()
    if library.nvmlInit_v2() != 0:
        return None
    try:
        if library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(device)) != 0:
            return None
        failed = library.nvmlDeviceGetMemoryInfo(device, ctypes.byref(memory)) != 0
        return None if failed else int(memory.total)
    finally:
        library.nvmlShutdown()
