"""What a process does that forks others: see `system/nursery.py`, which starts it.

It has one thread, imports what every child needs, and touches none of it afterwards: the pages stay shared.
"""

from __future__ import annotations

import logging
import os
import signal
import socket
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

from sensorium.system.nursery import BORN, ENDED, NEWS

MAX_ORDER_BYTES = 1 << 16
logger = logging.getLogger("sensorium")


class Parent:
    """Of the children that run. `client` is the socket to the HTTP process, which decides when this one ends. Each
    child is told by `order` and its own socket what it is; `prepare` is called before it is forked, `become` in it."""

    def __init__(
        self,
        client: socket.socket,
        become: Callable[[bytes, socket.socket], int],
        prepare: Callable[[bytes], None] = lambda order: None,
    ) -> None:
        self._client = client
        self._become, self._prepare = become, prepare
        self._news: dict[int, socket.socket] = {}  # to who waits for a child's end, by process id

    def run(self) -> None:
        signal.signal(signal.SIGCHLD, lambda number, frame: self._reap())
        while True:
            order, descriptors, _, _ = socket.recv_fds(self._client, MAX_ORDER_BYTES, 2)
            if not order:
                return
            sock, news = (socket.socket(fileno=one) for one in descriptors)
            self._prepare(order)
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})  # it may end before it is written down
            pid = os.fork()
            if pid == 0:
                self._begin(order, sock, news)
            sock.close()
            self._news[pid] = news
            _tell(news, BORN, pid)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})

    def _begin(self, order: bytes, sock: socket.socket, news: socket.socket) -> NoReturn:
        """A child, which has nothing of the others."""
        code = 1
        try:
            _tell(news, BORN, os.getpid())  # before anything that it says at its socket
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
            for one in (self._client, news, *self._news.values()):
                one.close()
            os.setsid()
            code = self._become(order, sock)
        except BaseException:
            logger.exception("a process cannot go on")
        finally:
            sys.stderr.flush()
            os._exit(code)

    def _reap(self) -> None:
        while self._news:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            with self._news.pop(pid) as news:
                _tell(news, ENDED, os.waitstatus_to_exitcode(status))


def _tell(news: socket.socket, kind: int, number: int) -> None:
    with suppress(OSError):  # nobody waits any more
        news.sendall(NEWS.pack(kind, number))
