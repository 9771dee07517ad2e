"""Replicas on Ray Serve: one model is an application of its own, several stand behind a relay (docs: scaling).

Ray is imported when it is needed: the extra `ray` has it. Everything that Ray starts from here must find this package
installed on its machine, of the same version.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

from sensorium.api.status import engine_numbers
from sensorium.api.transport.asgi import Message, Scope
from sensorium.cli.flags import parse_replicas, words_of
from sensorium.cli.main import read_serve
from sensorium.cli.serve import log_to_stderr
from sensorium.cluster.numbers import SEEN, exported, gather, mirrored, page_of
from sensorium.cluster.plan import METRICS_PERIOD_S, ModelPlan, model_plans
from sensorium.cluster.relay import Backend, Relay
from sensorium.cluster.replica import Replica
from sensorium.config import DeployConfig, ServePlan
from sensorium.errors import StartupError, UnavailableError
from sensorium.system.malloc import return_large_blocks

if TYPE_CHECKING:
    from ray.serve import Application

log = logging.getLogger("sensorium.cluster")
ROUTER = "sensorium.cluster.sessions:SessionRouter"
RELAY = "sensorium-relay"
RELAY_CPUS = 0.5
RELAY_TARGET = 64  # requests in flight of a relay, at which another one is started
RELAY_MOST = 8
MISSING = "Ray Serve is not installed: pip install 'sensorium[ray]'"


def app(model: str | Sequence[str] | None = None, *, haproxy: bool = False, **arguments: Any) -> Application:
    """An application for `ray.serve.run`, or for Ray's own files of applications (see `builder`).

    `model` is a folder or hub id, several of them, or None for the built-in model. `arguments` are the flags of
    `sensorium deploy ray` and `sensorium serve` with underscores, as `LLM` takes them: `replicas="1..8"`,
    `max_num_seqs=128`. `haproxy`: Ray's proxies are HAProxy (RAY_SERVE_ENABLE_HA_PROXY=1). Raises StartupError for what
    the command would refuse, or where Ray is not installed.
    """
    own = {field.name for field in fields(DeployConfig)}
    given = {name: value for name, value in arguments.items() if name in own}
    if "replicas" in given:
        given["replicas"] = parse_replicas(str(given["replicas"]))
    words = [word for name, value in arguments.items() if name not in own for word in words_of(name, value)]
    options = read_serve(["serve", *words], "app")
    models = (model,) if model is None or isinstance(model, str) else tuple(model)
    plan = ServePlan(options, tuple(replace(options, model=one) for one in models))
    return application(plan, DeployConfig(**given), haproxy=haproxy)


def builder(arguments: Mapping[str, Any]) -> Application:
    """`app` as Ray's files of applications call it: `import_path: sensorium.cluster.ray:builder`, its keywords under
    `args`."""
    return app(**arguments)


def application(plan: ServePlan, config: DeployConfig, *, haproxy: bool) -> Application:
    """The same from options that were read."""
    serve = installed()
    models = model_plans(plan, config, _cluster_gpus())
    if len(models) > 1:
        return _relayed(serve, plan, models)
    settings = models[0].settings
    if not haproxy:  # which balances by itself, and whose users say by what
        settings = {**settings, "request_router_config": _router()}
    deployment = serve.deployment(serve.ingress()(RayReplica))
    return deployment.options(name=models[0].deployment, **settings).bind(_one(plan, models[0]))


def _relayed(serve: Any, plan: ServePlan, models: Sequence[ModelPlan]) -> Application:
    handles: dict[str, Application] = {}
    names: dict[str, str] = {}
    for one in models:
        settings = {**one.settings, "request_router_config": _router()}
        deployment = serve.deployment(RayReplica).options(name=one.deployment, **settings)
        handles[one.deployment] = deployment.bind(_one(plan, one))
        names |= dict.fromkeys(one.names, one.deployment)
    scaling = {"min_replicas": 1, "max_replicas": RELAY_MOST, "target_ongoing_requests": RELAY_TARGET}
    relay = serve.deployment(serve.ingress()(RayRelay)).options(
        name=RELAY,
        autoscaling_config=scaling,
        max_ongoing_requests=RELAY_TARGET * RELAY_MOST,
        graceful_shutdown_timeout_s=max(one.settings["graceful_shutdown_timeout_s"] for one in models),
        ray_actor_options={"num_cpus": RELAY_CPUS},
    )
    return relay.bind(plan, names, handles)


def _one(plan: ServePlan, model: ModelPlan) -> ServePlan:
    return ServePlan(replace(plan.common, server=model.options.server), (model.options,))


def _router() -> Any:
    from ray.serve.config import RequestRouterConfig

    return RequestRouterConfig(request_router_class=ROUTER)


def installed() -> Any:
    """Ray Serve. StartupError where it is not installed."""
    try:
        from ray import serve
    except ImportError:
        raise StartupError(MISSING) from None
    return serve


def serve_error() -> type[Exception]:
    """What Ray Serve raises of its own."""
    from ray.serve.exceptions import RayServeException

    error: type[Exception] = RayServeException
    return error


def ray_error() -> type[Exception]:
    """What Ray raises of its own, such as for an actor that has died."""
    from ray.exceptions import RayError

    error: type[Exception] = RayError
    return error


def _cluster_gpus() -> float:
    """Of all machines together; 0 before this process is connected to Ray."""
    import ray

    return float(ray.cluster_resources().get("GPU", 0)) if ray.is_initialized() else 0.0


def agents() -> list[str]:
    """Where each machine of the cluster shows its figures."""
    import ray

    alive = [node for node in ray.nodes() if node["Alive"]]
    return [f"{node['NodeManagerAddress']}:{node['MetricsExportPort']}" for node in alive]


async def metrics_page() -> bytes:
    return page_of(await gather(await asyncio.to_thread(agents)))


class RayReplica:
    """The class of a model's deployment: our server's application in one of Ray's processes."""

    async def __init__(self, plan: ServePlan) -> None:  # type: ignore[misc]  # Ray awaits it
        log_to_stderr()
        return_large_blocks()
        self._replica = Replica(plan, metrics_page)
        await self._replica.start()
        self._mirroring = asyncio.create_task(self._mirror())
        self._mirroring.add_done_callback(_say_if_failed)

    def __serve_build_asgi_app__(self) -> Replica:
        return self._replica

    async def check_health(self) -> None:
        """Ray starts another replica in the place of one whose engine is lost for good."""
        self._replica.check()

    async def answer(self, scope: Scope, body: bytes) -> AsyncIterator[list[Message]]:
        """For the relay."""
        async for lot in self._replica.answer(scope, body):
            yield lot

    async def _mirror(self) -> None:
        """Show our figures where Ray shows its own, with this replica's name."""
        from ray import serve

        context, gauges = self._replica.context, {}
        while True:
            rows = [*mirrored(context.metrics.families(engine_numbers(context))), (exported(SEEN), {}, time.time())]
            for name, labels, value in rows:
                if name not in gauges:
                    gauges[name] = serve.metrics.Gauge(name, tag_keys=tuple(labels))
                gauges[name].set(value, tags=labels)
            await asyncio.sleep(METRICS_PERIOD_S)


def _say_if_failed(mirroring: asyncio.Task[None]) -> None:
    if not mirroring.cancelled() and (error := mirroring.exception()) is not None:
        log.error("this replica's figures are not mirrored any more", exc_info=error)


class RayRelay:
    """The class of what stands before several models."""

    def __init__(self, plan: ServePlan, names: Mapping[str, str], handles: Mapping[str, Any]) -> None:
        """`names`: of each name the deployment."""
        backends = {name: _Handle(handle) for name, handle in handles.items()}
        common = plan.common
        by_name: dict[str, Backend] = {name: backends[deployment] for name, deployment in names.items()}
        self._relay = Relay(by_name, common.server, common.limits, metrics_page)

    def __serve_build_asgi_app__(self) -> Relay:
        return self._relay


class _Handle:
    """A `Backend` over Ray's handle of a deployment."""

    def __init__(self, handle: Any) -> None:
        self._handle = handle.options(method_name="answer", stream=True)

    async def answer(self, scope: Scope, body: bytes, session: str) -> AsyncIterator[list[Message]]:
        from ray.exceptions import RayError
        from ray.serve.exceptions import RayServeException

        lots = self._handle.options(session_id=session).remote(scope, body)
        try:
            async for lot in lots:
                yield lot
        except (RayError, RayServeException) as error:
            raise UnavailableError("The replica that worked on this request was lost.") from error
        finally:
            lots.cancel()
