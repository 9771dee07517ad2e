"""Compiling a GPU's kernels beside an engine that serves: a process of its own, and a thread that waits for it."""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from threading import Thread
from time import monotonic

from sensorium.config import EngineConfig
from sensorium.ipc import messages

NOT_CAPTURED = 3  # exit: the kernels are there, but decodes cannot be graphs

logger = logging.getLogger(__name__)


class Warming:
    """Fills Triton's cache with what an engine starts. If that ends meanwhile, the next one finds the cache filled."""

    def __init__(self, config: EngineConfig, arch: int, dtype: str, kv_bytes: int, max_len: int) -> None:
        """`kv_bytes` and `max_len` are what the engine has: sizes, which kernels are compiled for."""
        self._config = replace(config, kv_cache_memory=kv_bytes, max_model_len=max_len, dtype="auto", map_weights=False)
        self._command = [sys.executable, "-m", "sensorium.engine.rehearsal", "--arch", str(arch), "--dtype", dtype]
        self._code: int | None = None
        self._started = 0.0

    def start(self, on_end: Callable[[], None]) -> None:
        """`on_end` is called by another thread when the kernels are there, or cannot be had."""
        Thread(target=self._run, args=(on_end,), name="warming", daemon=True).start()

    @property
    def is_over(self) -> bool:
        return self._code is not None

    @property
    def has_succeeded(self) -> bool:
        return self._code in (0, NOT_CAPTURED)

    @property
    def can_capture(self) -> bool:
        """Whether decodes wait for nothing of the device."""
        return self._code == 0

    def _run(self, on_end: Callable[[], None]) -> None:
        self._started = monotonic()
        ours, theirs = socket.socketpair()
        with ours:
            with theirs:
                child = subprocess.Popen(
                    [*self._command, "--fd", str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},  # it needs no GPU, and would take memory of it
                )
            ours.sendall(messages.encode_config(self._config))
            self._code = child.wait()
        if not self.has_succeeded:
            logger.error("kernels for this GPU could not be compiled (exit %d): torch alone computes", self._code)
        else:
            logger.info("kernels for this GPU are there after %.1f s", monotonic() - self._started)
        on_end()
