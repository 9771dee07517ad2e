"""Rank 0's side of a model that several ranks share: starts the followers, sends them every step, watches over them.

Followers have their end of a socket pair each. One that ends or gives no sign of life takes the engine with it, in a
message that names it; the HTTP process starts all of them again.
"""

from __future__ import annotations

import logging
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING

from sensorium.config import EngineConfig
from sensorium.ipc import messages
from sensorium.ipc import ranks as wire
from sensorium.ipc.channel import Channel
from sensorium.ipc.liveness import BEAT_S, Silence
from sensorium.ipc.messages import Kind, ProtocolError

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from sensorium.parallel.ranks import Ranks

STDERR = 2
BLAME_S = 5.0  # for a socket to say which rank it was, once a collective has failed
LOST = 72  # exit code

logger = logging.getLogger("sensorium.engine")


class FollowerLink(Channel):
    """Rank 0's end of the socket to a follower, whose beats are heard as they arrive."""

    def __init__(self, sock: socket.socket, pid: int | None, hang_after_s: float, lost: Callable[[str], None]) -> None:
        super().__init__(sock)
        self.pid = pid
        self.works = False  # it is in a step, and not waiting for others
        self.loaded: SimpleQueue[wire.Loaded] = SimpleQueue()
        self.adapters: SimpleQueue[tuple[str, int]] = SimpleQueue()  # why one could not be loaded, or "", and its bytes
        self.encoded: SimpleQueue[wire.Encoded] = SimpleQueue()
        self._silence = Silence(hang_after_s)
        self._lost = lost
        self._why = "has ended"

    def _arrived(self, kind: int, payload: memoryview) -> None:
        self._silence.heard()
        if kind == Kind.BEAT:
            self.works = bytes(payload) == b"\1"
        elif kind == Kind.LOADED:
            self.loaded.put(wire.decode_loaded(payload))
        elif kind == Kind.ADAPTER:
            self.adapters.put(messages.decode_adapter(payload)[1:])
        elif kind == Kind.ENCODED:
            self.encoded.put(wire.decode_rows(payload))
        elif kind == Kind.LOST:
            self._why = messages.decode_lost(payload)
        else:
            raise ProtocolError(f"message of kind {kind} from a follower")

    def _ended(self) -> None:
        self._lost(self._why)

    def look(self) -> None:
        """Give it up if it has been silent for too long."""
        seconds = self._silence.too_long_s(self.pid)
        if seconds is not None:
            self._lost(f"has given no sign of life for {seconds:.0f} s")


@dataclass(frozen=True, slots=True)
class FollowerProcess:
    """A follower, and rank 0's end of its socket."""

    process: subprocess.Popen[bytes]
    socket: socket.socket


def start_followers(size: int) -> list[FollowerProcess]:
    """Ranks 1 and up, which import what they need while this process does."""
    return [_start() for _ in range(1, size)]


def _start() -> FollowerProcess:
    ours, theirs = socket.socketpair()
    with theirs:
        command = [sys.executable, "-P", "-m", "sensorium.engine.follower", "--fd", str(theirs.fileno())]
        process = subprocess.Popen(command, pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL, stdout=STDERR)
    return FollowerProcess(process, ours)


class Leader:
    """Rank 0's followers."""

    def __init__(
        self,
        config: EngineConfig,
        followers: Sequence[tuple[socket.socket, int | None]],
        tell: Callable[[str], None] = logger.critical,
        end: Callable[[int], None] = os._exit,
    ) -> None:
        """`followers`: the socket and, where it is another process, the id of ranks 1 and up. A rank that is lost is
        told of by `tell`, then `end` ends the engine."""
        self.size = 1 + len(followers)
        self._tell, self._end = tell, end
        self._ending = threading.Lock()  # taken for good by the first who ends the engine
        self._folder = Path(tempfile.mkdtemp(prefix="sensorium-ranks-"))
        self._pids = [pid for _, pid in followers if pid is not None]
        self._links = [
            FollowerLink(sock, pid, config.hang_after_s, self._loser(rank))
            for rank, (sock, pid) in enumerate(followers, 1)
        ]
        for rank, link in enumerate(self._links, 1):
            link.start()
            link.send(messages.encode_config(config))
            link.send(wire.encode_rank(wire.RankOf(rank, self.size, str(self._store))))

    @property
    def _store(self) -> Path:
        return self._folder / "store"

    def _loser(self, rank: int) -> Callable[[str], None]:
        return lambda why: self._lose(rank, why)

    def _lose(self, rank: int, why: str) -> None:
        if not self._ending.acquire(blocking=False):
            return
        text = f"rank {rank} of {self.size} {why}"
        logger.critical("%s: the engine ends, to be started again", text)
        self._tell(text)
        self._kill()
        self._end(LOST)

    # Watching

    def look(self) -> None:
        """Give up who is silent; every `BEAT_S`."""
        for link in self._links:
            link.look()

    def blame_hanging(self) -> None:
        """Rank 0 has been in a step for too long: if a follower is at something else than waiting, it is that one."""
        for rank, link in enumerate(self._links, 1):
            if link.works:
                self._lose(rank, "hangs in a step")

    def blame_failed(self) -> None:
        """A step failed in the midst of what all ranks do: if one has ended, its socket says so in a moment."""
        deadline = time.monotonic() + BLAME_S
        while time.monotonic() < deadline:
            time.sleep(BEAT_S / 10)

    def close(self) -> None:
        """End all followers; nobody is blamed for it."""
        if self._ending.acquire(blocking=False):
            self._kill()

    def _kill(self) -> None:
        for pid in self._pids:
            try:
                os.kill(pid, signal.SIGKILL)  # a stopped one would hear nothing else
            except ProcessLookupError:
                continue
        shutil.rmtree(self._folder, ignore_errors=True)

    # What followers are told

    def loaded(self) -> list[wire.Loaded]:
        """Of ranks 1 and up, once all have their weights."""
        return [link.loaded.get() for link in self._links]

    def adapters_loaded(self) -> list[tuple[str, int]]:
        """What ranks 1 and up say of the adapter that they were told to load: why they cannot, or "", and its bytes."""
        return [link.adapters.get() for link in self._links]

    @cached_property
    def ranks(self) -> Ranks:
        """Rank 0's own view of all."""
        from sensorium.parallel.ranks import Ranks  # with torch, whose import need not be waited for

        return Ranks(0, self.size)

    def meet(self, device: torch.device, cache: wire.CacheSize) -> None:
        """All ranks have such a cache from now on, and compute together."""
        self.send(wire.encode_cache(cache))
        self.ranks.connect(self._store, device)

    def send(self, frame: bytes) -> None:
        for link in self._links:
            link.send(frame)

    def send_to(self, rank: int, frame: bytes) -> None:
        self._links[rank - 1].send(frame)

    def encoded(self, rank: int) -> wire.Encoded:
        """What a rank's towers say to the last piece that they were told to compute."""
        return self._links[rank - 1].encoded.get()

    def logits(self, rows: NDArray[np.int64] | None) -> None:
        self.send(wire.encode_logits(rows))
