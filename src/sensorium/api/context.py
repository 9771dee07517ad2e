"""What every route works with: the models behind their names, the limits and everything that is counted per server.

Built once by `server.build_app`; routes receive it and nothing else.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sensorium.api.guards.admission import Admission, KeyLimiter, PendingBytes
from sensorium.api.guards.auth import CacheSalts, Keys
from sensorium.api.guards.in_flight import InFlightRequest, InFlightRequests
from sensorium.api.guards.origin import OriginCheck
from sensorium.api.metrics import Metrics, ModelMetrics
from sensorium.api.playground import read_pages
from sensorium.api.protocol.common import UnknownFields
from sensorium.api.transport.asgi import Call
from sensorium.api.transport.errors import ModelNotFoundError
from sensorium.config import Limits, ServerConfig
from sensorium.errors import RequestError, UnavailableError
from sensorium.serving.model import ServedModel
from sensorium.serving.tasks import TASKS
from sensorium.system.heap import HeapTrimmer

if TYPE_CHECKING:
    from sensorium.api.routes import Route


LATEST = ":latest"
POOLING_REQUESTS = 4
"""Of the largest size, that may be computing or waiting."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One served model and what the edge keeps about it. `names` are all that clients may use; the first is shown.

    Pooled prompts are admitted apart: they are many and short, and none of them holds the engine for long.
    """

    names: tuple[str, ...]
    model: ServedModel
    admission: Admission
    metrics: ModelMetrics
    pooling_admission: Admission

    @property
    def name(self) -> str:
        return self.names[0]

    def need(self, task: str, *, param: str = "model", doing: str | None = None) -> None:
        """RequestError unless the model does this task; `doing` is what the client asked for, if that is another."""
        if task in self.model.tasks:
            return
        wanted = TASKS[doing or task].partition(" (")[0]
        can = "; ".join(TASKS[one] for one in self.model.tasks)
        raise RequestError(
            f"The model {self.name!r} does not {wanted} here. It can: {can}.", param=param, code="unsupported_task"
        )


class Context:
    """See above. `models` maps every name to its model; the first name is the default for requests that bring none."""

    def __init__(self, models: Mapping[str, ServedModel], server: ServerConfig, limits: Limits) -> None:
        self.server = server
        self.limits = limits
        self.keys = Keys(server.api_key)
        self.origin = OriginCheck(
            server.host, has_keys=bool(server.api_key), is_unix=server.uds is not None, allowed=server.allowed_origins
        )
        self.salts = CacheSalts(secrets.token_bytes(32), shared=server.shared_prefix_cache)
        self.signing_key = secrets.token_bytes(32)  # of what clients send back
        self.in_flight = InFlightRequests()
        self.unknown = UnknownFields()
        self.pages = read_pages()
        self.routes: Sequence[Route] = ()  # what the application serves, for its description
        names: dict[int, list[str]] = {}
        for name, model in models.items():
            names.setdefault(id(model), []).append(name)
        self.metrics = Metrics(own[0] for own in names.values())
        self.entries = tuple(self._entry(tuple(own), models[own[0]]) for own in names.values())
        self._by_name = {name: entry for entry in self.entries for name in entry.names}
        self.tenants = KeyLimiter(limits.max_concurrency_per_key, self.entries[0].metrics.refuse)
        self.pending = PendingBytes(limits.max_pending_bytes, self.entries[0].metrics.refuse, HeapTrimmer().after)

    def _entry(self, names: tuple[str, ...], model: ServedModel) -> Entry:
        metrics = self.metrics.models[names[0]]
        running = model.client.config.max_num_seqs
        waiting = 4 * running if self.limits.max_waiting is None else self.limits.max_waiting

        def max_prompt_tokens() -> int:
            ready = model.client.ready
            return 5 * max(ready.kv_tokens, ready.max_model_len) if ready is not None else 0

        limits = self.limits
        pooling = Admission(
            POOLING_REQUESTS * limits.max_embedding_inputs,
            lambda: POOLING_REQUESTS * limits.max_embedding_tokens,
            metrics.refuse,
        )
        return Entry(names, model, Admission(running + waiting, max_prompt_tokens, metrics.refuse), metrics, pooling)

    def entry(self, name: str | None) -> Entry:
        """The model of that name, with or without Ollama's `:latest`; without a name, the first one."""
        if not name:
            return self.entries[0]
        for known in (name, name.removesuffix(LATEST), f"{name}{LATEST}"):
            if known in self._by_name:
                return self._by_name[known]
        raise ModelNotFoundError(f"The model {name!r} does not exist; GET /v1/models lists what does.", param="model")

    @property
    def state(self) -> str:
        """ready, or what stands in the way of it."""
        if self.in_flight.draining:
            return "draining"
        states = (entry.model.client.state for entry in self.entries)
        return next((state for state in states if state != "ready"), "ready")

    def check_ready(self) -> None:
        """Raise unless requests can be answered."""
        match self.state:
            case "ready":
                return
            case "draining":
                raise UnavailableError("The server is shutting down.", retry_after_s=10.0)
            case "loading":
                raise UnavailableError("The model is still loading.", retry_after_s=2.0)
        raise UnavailableError("The engine is being restarted.", retry_after_s=5.0)

    def open_request(self, call: Call) -> InFlightRequest:
        return self.in_flight.open(call.receive, self.limits.request_timeout_s)
