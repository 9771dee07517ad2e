"""The process that forks engines: `python -m sensorium.engine.nursery --fd N`. See `system/nursery.py`."""

from __future__ import annotations

import argparse
import socket

from sensorium.engine.loop import prepare_process, serve_at
from sensorium.system.collector import no_collection
from sensorium.system.malloc import forget_code
from sensorium.system.parent import Parent


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--fd", type=int, required=True, help="inherited socket to the server")
    arguments = parser.parse_args()
    prepare_process()
    with no_collection():
        import sensorium.engine.loading  # noqa: F401
    forget_code()
    Parent(socket.socket(fileno=arguments.fd), lambda order, engine: serve_at(engine)).run()


if __name__ == "__main__":
    main()
