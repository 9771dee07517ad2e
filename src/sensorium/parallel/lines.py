"""Sockets between the ranks of processors, for what is small: gloo hands a collective from thread to thread."""

from __future__ import annotations

import socket
from pathlib import Path

MOST_BYTES = 1 << 16
"""Of a message. One always fits into a socket's buffer, so that all may send before they read."""
PATH_BYTES = 90  # that the system takes for a socket, less what a rank's number takes


def fits(store: Path) -> bool:
    """Whether sockets can have their names beside it."""
    return len(bytes(store)) <= PATH_BYTES


class Lines:
    """One socket to every other rank, in the folder where they meet."""

    def __init__(self, rank: int, size: int, store: Path) -> None:
        """Ready to be called: `meet` when all are so."""
        self._rank, self._size, self._store = rank, size, store
        self._to: dict[int, socket.socket] = {}
        self._listener = socket.socket(socket.AF_UNIX)
        self._listener.bind(str(self._place(rank)))
        self._listener.listen(size)

    def _place(self, rank: int) -> Path:
        return self._store.with_name(f"{self._store.name}.{rank}")

    def meet(self) -> None:
        for other in range(self._rank):
            self._to[other] = line = socket.socket(socket.AF_UNIX)
            line.connect(str(self._place(other)))
            line.sendall(bytes([self._rank]))
        for _ in range(self._rank + 1, self._size):
            line, _ = self._listener.accept()
            self._to[line.recv(1)[0]] = line
        self._listener.close()
        self._place(self._rank).unlink()

    def exchange(self, own: memoryview, others: dict[int, memoryview]) -> None:
        """Sends `own` to all, and fills what is there for each of the others, of the same size: at most `MOST_BYTES`.
        RuntimeError if one is gone."""
        try:
            for line in self._to.values():
                line.sendall(own)
            for rank, room in others.items():
                received = 0
                while received < len(room):
                    count = self._to[rank].recv_into(room[received:])
                    if not count:
                        raise RuntimeError(f"rank {rank} has ended")
                    received += count
        except OSError as error:
            raise RuntimeError(f"another rank has ended: {error}") from error
