"""`python -m sensorium` and `sensorium` are the command line; what stands above `cli` adds its commands here."""

import argparse
import sys
from collections.abc import Mapping, Sequence

from sensorium.cli.flags import build
from sensorium.cli.main import deploy_plan, main
from sensorium.cli.servers import runtime_folder
from sensorium.config import StatusConfig


def _deploy_ray(found: argparse.Namespace, environment: Mapping[str, str], argv: Sequence[str]) -> int:
    from sensorium.cluster.command import deploy

    config, plan = deploy_plan(found, environment, argv)
    return deploy(plan, config, haproxy=environment.get("RAY_SERVE_ENABLE_HA_PROXY") == "1")


def _status(found: argparse.Namespace, environment: Mapping[str, str], argv: Sequence[str]) -> int:
    from sensorium.cluster.command import status

    return status(build(StatusConfig, found), runtime_folder(environment))


def run() -> int:
    return main(others={"deploy ray": _deploy_ray, "status": _status})


if __name__ == "__main__":
    sys.exit(run())
