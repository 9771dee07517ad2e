"""`sensorium deploy ray` and `sensorium status`: what the operator sees of replicas."""

from __future__ import annotations

import asyncio
import re
import time
from collections import defaultdict
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import httpx

from sensorium.cli.servers import ps
from sensorium.cluster import ray as cluster
from sensorium.cluster.numbers import Sample, gather
from sensorium.config import DeployConfig, ServePlan, StatusConfig
from sensorium.errors import StartupError

ASK_TIMEOUT_S = 30.0
PROXY_WAIT_S = 60.0  # for Ray's proxies, once the replicas are there
NO_CLUSTER = (
    "there is no Ray cluster{at}: `ray start --head` starts one on this machine, `ray start --address=HOST:6379` adds "
    "others to it"
)
FIGURES = {"RUNNING": "vllm:num_requests_running", "WAITING": "vllm:num_requests_waiting"}
_LAST_WORDS = re.compile(r"[\w.]+(?:Error|Exception): (.+)")
_PROXIES = {"every": "EveryNode", "head": "HeadOnly"}
KV_CACHE = "vllm:kv_cache_usage_perc"


def deploy(plan: ServePlan, config: DeployConfig, *, haproxy: bool) -> int:
    """The command; returns when the replicas answer. StartupError says why they do not."""
    serve, server = cluster.installed(), plan.common.server
    _connect(config.ray_address)
    if config.delete:
        serve.delete(config.app)
        print(f"{config.app} has ended")
        return 0
    application = cluster.application(plan, config, haproxy=haproxy)
    with suppress(cluster.ray_error()):  # a proxy that was slow to come up: Ray puts another one in its place
        serve.start(_PROXIES[config.proxies], http_options={"host": server.host, "port": server.port})
    prefix = server.root_path.rstrip("/") or "/"
    try:
        serve.run(application, name=config.app, route_prefix=prefix)
    except (RuntimeError, cluster.serve_error()) as error:
        raise StartupError(
            f"{config.app} does not come up: {_reason(_told(serve, config.app) or str(error))}"
        ) from None
    url = f"http://{server.host}:{server.port}{prefix.rstrip('/')}"
    _check_answers(url)
    print(f"{config.app} answers at {url}/v1; `sensorium status` shows its replicas, --delete ends them")
    return 0


def _connect(address: str) -> None:
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level="warning", ignore_reinit_error=True)
    except ConnectionError:
        raise StartupError(NO_CLUSTER.format(at="" if address == "auto" else f" at {address}")) from None


def _told(serve: Any, app: str) -> str:
    """What Ray Serve knows of deployments that failed."""
    application = serve.status().applications.get(app)
    deployments = () if application is None else application.deployments.values()
    return "\n".join(one.message for one in deployments if one.message)


def _reason(text: str) -> str:
    """Of a traceback in Ray's message the last error's words; else the message's first line."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [match[1] for line in lines if (match := _LAST_WORDS.fullmatch(line))]
    return errors[-1] if errors else next(iter(lines), "Ray does not say why")


def _check_answers(url: str) -> None:
    """StartupError unless it does before long."""
    end_s = time.monotonic() + PROXY_WAIT_S
    while (wrong := _wrong_with(url)) and time.monotonic() < end_s:
        time.sleep(1.0)
    if wrong:
        raise StartupError(
            f"the replicas are there, but {url} {wrong}: did Ray Serve run already? It keeps the host and port that it "
            "was started with, until the cluster is stopped"
        )


def _wrong_with(url: str) -> str:
    try:
        status = httpx.get(f"{url}/readyz", timeout=ASK_TIMEOUT_S, trust_env=False).status_code
    except httpx.HTTPError as error:
        return f"does not answer ({error})"
    return "" if status == 200 else f"answers {status}"


def status(config: StatusConfig, folder: Path) -> int:
    """The command: the servers of this machine, then what Ray Serve has, replica by replica."""
    ps(folder, config.api_key)
    try:
        serve = cluster.installed()
        _connect(config.ray_address)
    except StartupError as error:
        if config.ray_address != "auto":
            raise
        print(f"Ray: {error.message}")
        return 0
    samples = asyncio.run(gather(cluster.agents()))
    for line in status_lines(serve.status().applications, samples):
        print(line)
    return 0


def status_lines(applications: Any, samples: Iterable[Sample]) -> list[str]:
    """`applications` are Ray Serve's, by name. A line for each, for each of its deployments and each of its replicas
    that has figures by now."""
    by_deployment: dict[tuple[str, str], list[Sample]] = defaultdict(list)
    for sample in samples:
        by_deployment[sample.labels.get("application", ""), sample.labels.get("deployment", "")].append(sample)
    lines = [] if applications else ["Ray Serve runs nothing"]
    for name, application in applications.items():
        lines.append(f"{name}: {_word(application.status)} {application.message}".rstrip())
        for deployment, state in application.deployments.items():
            counts = ", ".join(f"{count} {_word(kind)}" for kind, count in state.replica_states.items())
            lines.append(
                f"  {deployment}: {_word(state.status)}, replicas: {counts or 'none'} {state.message}".rstrip()
            )
            lines += [f"    {line}" for line in _replica_lines(by_deployment[name, deployment])]
    return lines


def _word(state: Any) -> str:
    """ApplicationStatus.RUNNING or "RUNNING" -> running"""
    return str(getattr(state, "value", state)).lower().replace("_", " ")


def _replica_lines(samples: Sequence[Sample]) -> list[str]:
    by_replica: dict[str, dict[str, float]] = defaultdict(lambda: defaultdict(float))
    for sample in samples:
        by_replica[sample.replica][sample.name] += sample.value
    return [
        f"{replica}: {found[FIGURES['RUNNING']]:.0f} running, {found[FIGURES['WAITING']]:.0f} waiting, "
        f"KV cache {found[KV_CACHE]:.0%}"
        for replica, found in sorted(by_replica.items())
    ]
