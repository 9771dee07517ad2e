"""The process that forks workers: `python -m sensorium.workers.nursery --fd N`. See `system/nursery.py`.

It imports what a worker is made of when the first of its kind is asked for, and never sees what workers are sent.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import signal
import socket
from importlib import import_module

from sensorium.system.collector import no_collection
from sensorium.system.malloc import forget_code
from sensorium.system.parent import Parent


@functools.cache
def prepare(order: bytes) -> None:
    """Import all that such a worker can need, if no other one has."""
    module, *arguments = json.loads(order)
    with no_collection():
        import_module(module).prepare(arguments)
    forget_code()  # takes longer than a fork


def become(order: bytes, sock: socket.socket) -> int:
    module, *arguments = json.loads(order)
    os.dup2(sock.fileno(), 0)
    sock.close()
    import_module(module).main(arguments)
    return 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="inherited socket to the server")
    for number in (signal.SIGINT, signal.SIGTERM):  # of the whole service, which may drain: the parent's to answer
        signal.signal(number, signal.SIG_IGN)
    Parent(socket.socket(fileno=parser.parse_args().fd), become, prepare).run()


if __name__ == "__main__":
    main()
