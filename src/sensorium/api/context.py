"""What every route works with: the models behind their names, the limits and everything that is counted per server.

Built once by `server.build_app`; routes receive it and nothing else.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from sensorium.api.guards.admission import Admission, KeyLimiter, PendingBytes
from sensorium.api.guards.auth import CacheSalts, Keys
from sensorium.api.guards.in_flight import InFlightRequest, InFlightRequests
from sensorium.api.guards.origin import OriginCheck
from sensorium.api.metrics import Metrics, ModelMetrics
from sensorium.api.playground import read_pages
from sensorium.api.protocol.common import UnknownFields
from sensorium.api.transport.asgi import Call
from sensorium.config import Limits, ServerConfig
from sensorium.errors import RequestError
from sensorium.serving.adapters import ServedAdapter
from sensorium.serving.catalog import Catalog, CatalogEntry
from sensorium.serving.model import ServedModel
from sensorium.serving.tasks import TASKS, task_text
from sensorium.system.heap import HeapTrimmer

if TYPE_CHECKING:
    from sensorium.api.routes import Route


LOOPBACK = ("127.0.0.1", "::1", "localhost")
POOLING_REQUESTS = 4
"""Of the largest size, that may be computing or waiting."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One served model and what the edge keeps about it.

    Pooled prompts are admitted apart: they are many and short, and none of them holds the engine for long.
    """

    listed: CatalogEntry
    admission: Admission
    pooling_admission: Admission
    metrics: ModelMetrics
    adapter: ServedAdapter | None = None  # of the model, that the request named

    @property
    def model(self) -> ServedModel:
        return self.listed.model

    @property
    def names(self) -> tuple[str, ...]:
        return self.listed.names

    @property
    def name(self) -> str:
        return self.listed.name if self.adapter is None else self.adapter.name

    @property
    def adapter_number(self) -> int:
        return 0 if self.adapter is None else self.adapter.number

    def need(self, task: str, *, param: str = "model", doing: str | None = None) -> None:
        """RequestError unless the model does this task; `doing` is what the client asked for, if that is another."""
        if task in self.model.tasks:
            return
        wanted = TASKS[doing or task].partition(" (")[0]
        can = "; ".join(task_text(one, compares=self.model.is_embedder) for one in self.model.tasks)
        raise RequestError(
            f"The model {self.name!r} does not {wanted} here. It can: {can}.", param=param, code="unsupported_task"
        )


class Context:
    """See above."""

    def __init__(self, catalog: Catalog, server: ServerConfig, limits: Limits) -> None:
        self.server = server
        self.limits = limits
        is_local = server.uds is not None or server.host in LOOPBACK
        self.keys = Keys(server.api_key, server.operator_key, is_local=is_local)
        self.origin = OriginCheck(
            server.host, has_keys=bool(server.api_key), is_unix=server.uds is not None, allowed=server.allowed_origins
        )
        self.salts = CacheSalts(secrets.token_bytes(32), shared=server.shared_prefix_cache)
        self.signing_key = secrets.token_bytes(32)  # of what clients send back
        self.in_flight = InFlightRequests()
        self.unknown = UnknownFields()
        self.pages = read_pages()
        self.routes: Sequence[Route] = ()  # what the application serves, for its description
        self.descriptions: asyncio.Future[tuple[bytes, bytes]] | None = None  # once they were asked for
        self.catalog = catalog
        self.metrics = Metrics(entry.name for entry in self.catalog.entries)
        self._by_name = {listed.name: self._entry(listed) for listed in self.catalog.entries}
        self.tenants = KeyLimiter(limits.max_concurrency_per_key, self.metrics.refuse)
        self.pending = PendingBytes(limits.max_pending_bytes, self.metrics.refuse, HeapTrimmer().after)

    def _entry(self, listed: CatalogEntry) -> Entry:
        metrics, running = self.metrics.models[listed.name], listed.max_num_seqs
        waiting = 4 * running if self.limits.max_waiting is None else self.limits.max_waiting

        def max_prompt_tokens() -> int:
            ready = listed.model.client.ready
            return 5 * max(ready.kv_tokens, ready.max_model_len) if ready is not None else 0

        limits = self.limits
        pooling = Admission(
            POOLING_REQUESTS * limits.max_embedding_inputs,
            lambda: POOLING_REQUESTS * limits.max_embedding_tokens,
            metrics.refuse,
        )
        return Entry(listed, Admission(running + waiting, max_prompt_tokens, metrics.refuse), pooling, metrics)

    def at_the_edge(self, name: str) -> Entry:
        """What is kept here about the model of that name, its first."""
        return self._by_name[name]

    @asynccontextmanager
    async def acquire(self, name: str | None, *tasks: str) -> AsyncIterator[Entry]:
        """The model, ready, for as long as it is worked with; see `Catalog.acquire`."""
        async with self.catalog.acquire(name, *tasks) as listed:
            entry, adapter = self.at_the_edge(listed.name), listed.adapter_of(name)
            if adapter is None:
                yield entry
                return
            with listed.adapters.use(adapter, lambda: listed.client):
                yield replace(entry, adapter=adapter)

    async def drain(self) -> None:
        """Let nothing new in, and wait for what is there."""
        self.catalog.drain()
        await self.in_flight.drain(self.limits.drain_timeout_s)

    def abort(self) -> None:
        """End what is in flight."""
        self.catalog.drain()
        self.in_flight.abort()

    def open_request(self, call: Call) -> InFlightRequest:
        return self.in_flight.open(call.receive, self.limits.request_timeout_s)
