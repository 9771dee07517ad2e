"""From options to what Ray Serve is told: how many replicas, where, when another one is started, how one leaves."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from typing import Any

from sensorium.config import DeployConfig, ServeOptions, ServePlan
from sensorium.errors import StartupError
from sensorium.startup.model import adapters_of, check_names, names_of

BUSY = 0.6
"""Part of the sequences that a replica computes at a time, from which on another one is worth its start."""
WAITING_TURNS = 4  # sequences that may wait for each that is computed, unless --max-waiting says otherwise
ABOVE_PERMITS = 64  # requests beside those that have a permit: health, metrics, and refusals on their way
DRAIN_S = 10.0  # beyond --drain-timeout-s, for what ends after the last answer
HEALTH_PERIOD_S = 5.0
STARTS = 3  # of a replica that does not come up, until the deployment counts as failed
METRICS_PERIOD_S = 5.0


@dataclass(frozen=True, slots=True)
class ModelPlan:
    """One model: `names` are all that requests may call it and its adapters by, `settings` the arguments of Ray
    Serve's `Deployment.options`."""

    deployment: str
    names: tuple[str, ...]
    options: ServeOptions
    settings: dict[str, Any]


def model_plans(plan: ServePlan, config: DeployConfig, cluster_gpus: float) -> tuple[ModelPlan, ...]:
    """StartupError if two models would have one name, or an option makes no sense where there are replicas.
    `cluster_gpus` is how many GPUs all machines have together."""
    server = plan.common.server
    for flag, is_set in (("--models-dir", server.models_dir), ("--uds", server.uds), ("--memory", server.memory)):
        if is_set is not None:
            raise StartupError(f"{flag} is for one server; with replicas name each model, and Ray places it")
    plans = tuple(_model_plan(options, config, cluster_gpus) for options in plan.models)
    if not plans:
        raise StartupError("there is no model to deploy: name one")
    check_names(plan.models)
    for index, one in enumerate(plans):
        for other in plans[:index]:
            if one.deployment == other.deployment:
                names = f"{other.names[0]} and {one.names[0]}"
                raise StartupError(
                    f"{names} are too alike: Ray would call both {one.deployment}; rename one in --config"
                )
    return plans


def _model_plan(options: ServeOptions, config: DeployConfig, cluster_gpus: float) -> ModelPlan:
    gpus = _gpus(options, config, cluster_gpus)
    engine, server = options.engine, options.server
    if not gpus and engine.threads is None:
        engine = replace(engine, threads=max(1, math.floor(config.cpus_per_replica)))
    server = replace(server, metrics_port=None)  # replicas of one machine cannot share it
    options = replace(options, engine=engine, server=server)
    names = (*names_of(options), *(name for name, _ in adapters_of(options.load)))
    deployment = re.sub(r"[^A-Za-z0-9_.-]+", "-", names[0]).strip("-") or "model"
    return ModelPlan(deployment, names, options, _settings(options, config, gpus))


def _gpus(options: ServeOptions, config: DeployConfig, cluster_gpus: float) -> float:
    """Of one replica."""
    if config.gpus_per_replica is not None:
        return config.gpus_per_replica
    return float(options.engine.tensor_parallel_size) if cluster_gpus and options.engine.device != "cpu" else 0.0


def _settings(options: ServeOptions, config: DeployConfig, gpus: float) -> dict[str, Any]:
    computing = options.engine.max_num_seqs
    waiting = options.limits.max_waiting
    permits = computing + (WAITING_TURNS * computing if waiting is None else waiting)
    least, most = config.replicas.least, config.replicas.most
    target = config.target_requests or max(1, int(BUSY * computing))
    scaling: dict[str, Any] = {"num_replicas": least}
    if most > least:
        scaling = {
            "autoscaling_config": {
                "min_replicas": least,
                "initial_replicas": max(1, least),
                "max_replicas": most,
                "target_ongoing_requests": target,
                "upscale_delay_s": config.scale_up_s,
                "downscale_delay_s": config.scale_down_s,
            }
        }
    return {
        **scaling,
        # Above our own permits, so that what is too much is told so by us, with a time to come back.
        "max_ongoing_requests": permits + ABOVE_PERMITS,
        "graceful_shutdown_timeout_s": options.limits.drain_timeout_s + DRAIN_S,
        "health_check_period_s": HEALTH_PERIOD_S,
        "max_constructor_retry_count": STARTS,
        "ray_actor_options": {"num_cpus": config.cpus_per_replica, "num_gpus": gpus},
    }
