"""The process that forks engines: `python -m sensorium.engine.nursery --fd N`. See `ipc/nursery.py`.

It has one thread, imports what every engine needs, and touches none of it afterwards: the pages stay shared.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import socket
import sys
from contextlib import suppress
from typing import NoReturn

from sensorium.engine.loop import prepare_process, serve_at
from sensorium.ipc.nursery import NUMBER
from sensorium.system.collector import no_collection

logger = logging.getLogger("sensorium.engine")


class Parent:
    """Of the engines that run. `client` is the socket to the HTTP process, which decides when this one ends."""

    def __init__(self, client: socket.socket) -> None:
        self._client = client
        self._news: dict[int, socket.socket] = {}  # to who waits for an engine's end, by process id

    def run(self) -> None:
        signal.signal(signal.SIGCHLD, lambda number, frame: self._reap())
        while True:
            data, descriptors, _, _ = socket.recv_fds(self._client, 1, 2)
            if not data:
                return
            engine, news = (socket.socket(fileno=one) for one in descriptors)
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGCHLD})  # it may end before it is written down
            pid = os.fork()
            if pid == 0:
                self._become(engine, news)
            engine.close()
            self._news[pid] = news
            _tell(news, pid)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})

    def _become(self, engine: socket.socket, news: socket.socket) -> NoReturn:
        """An engine, which has nothing of the others."""
        code = 1
        try:
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGCHLD})
            for one in (self._client, news, *self._news.values()):
                one.close()
            os.setsid()
            code = serve_at(engine)
        except BaseException:
            logger.exception("the engine cannot go on")
        finally:
            sys.stderr.flush()
            os._exit(code)

    def _reap(self) -> None:
        while self._news:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                return
            with self._news.pop(pid) as news:
                _tell(news, os.waitstatus_to_exitcode(status))


def _tell(news: socket.socket, number: int) -> None:
    with suppress(OSError):  # nobody waits any more
        news.sendall(NUMBER.pack(number))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="inherited socket to the server")
    arguments = parser.parse_args()
    prepare_process()
    with no_collection():
        import sensorium.engine.loading  # noqa: F401
    Parent(socket.socket(fileno=arguments.fd)).run()


if __name__ == "__main__":
    main()
