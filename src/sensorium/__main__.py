"""`python -m sensorium` and `sensorium` are the command line; what stands above `cli` adds its commands here."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse

# Everything else is imported when it is known that no engine is to be started first, or when it was.

_ELSEWHERE = ("-h", "--help", "--config", "--models-dir", "--lazy")
"""With these no engine is started at once, or several from one process."""


def _deploy_ray(found: argparse.Namespace, environment: Mapping[str, str], argv: Sequence[str]) -> int:
    from sensorium.cli.main import deploy_plan
    from sensorium.cluster.command import deploy

    config, plan = deploy_plan(found, environment, argv)
    return deploy(plan, config, haproxy=environment.get("RAY_SERVE_ENABLE_HA_PROXY") == "1")


def _status(found: argparse.Namespace, environment: Mapping[str, str], argv: Sequence[str]) -> int:
    from sensorium.cli.flags import build
    from sensorium.cli.servers import runtime_folder
    from sensorium.cluster.command import status
    from sensorium.config import StatusConfig

    return status(build(StatusConfig, found), runtime_folder(environment))


def run() -> int:
    if _starts_engine(sys.argv[1:]):
        from sensorium.ipc.ahead import start_ahead

        start_ahead()
    from sensorium.cli.main import main

    return main(others={"deploy ray": _deploy_ray, "status": _status})


def _starts_engine(argv: Sequence[str]) -> bool:
    """Whether these words look like one model that is to be loaded at once. A wrong guess costs a process that ends."""
    return argv[:1] == ["serve"] and not any(word.partition("=")[0] in _ELSEWHERE for word in argv)


if __name__ == "__main__":
    sys.exit(run())
