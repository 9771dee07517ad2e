"""The figures of all replicas, through Ray's own export: every replica mirrors its page there, each machine's agent
shows what its replicas said, and here all agents' pages are put together again under our names."""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import httpx

if TYPE_CHECKING:
    from prometheus_client.core import Metric

SEEN = "sensorium:replica_seen_seconds"
"""When a replica last mirrored its figures, by the clock: agents show those of a replica for a while after its end."""
STALE_S = 45.0
ASK_TIMEOUT_S = 5.0
_PREFIXES = {"ray_vllm_": "vllm:", "ray_sensorium_": "sensorium:", "ray_http_request": "http_request"}
_LINE = re.compile(r"(?P<name>\w+)\{(?P<labels>.*)\} (?P<value>\S+)")
_LABEL = re.compile(r'(\w+)="((?:[^"\\]|\\.)*)"')
_RAYS = re.compile(r"otel_\w+|Component|SessionName|Version|WorkerId|NodeAddress|engine")


@dataclass(frozen=True, slots=True)
class Sample:
    """One figure of one replica."""

    name: str
    labels: dict[str, str]  # values are escaped, as pages have them
    value: float

    @property
    def replica(self) -> str:
        return self.labels.get("replica", "")

    def line(self) -> str:
        labels = ",".join(f'{name}="{value}"' for name, value in self.labels.items())
        return f"{self.name}{{{labels}}} {self.value!r}"


def exported(name: str) -> str:
    """What Ray is told a metric is called; it puts `ray_` before it."""
    return name.replace(":", "_")


def mirrored(families: Iterable[Metric]) -> Iterator[tuple[str, dict[str, str], float]]:
    """(name, labels, value) of every figure; of histograms those that counted something. Figures of one name have the
    same labels, as Ray wants them: empty ones where ours have none."""
    for family in families:
        total = sum(sample.value for sample in family.samples if sample.name.endswith("_count"))
        if family.type == "histogram" and not total:
            continue
        labels = dict.fromkeys((label for sample in family.samples for label in sample.labels), "")
        for sample in family.samples:
            yield exported(sample.name), {**labels, **sample.labels}, float(sample.value)


async def gather(agents: Iterable[str]) -> list[Sample]:
    """The figures of every replica that is there, from the pages of all machines' agents (host:port). An agent that
    does not answer has none."""
    async with httpx.AsyncClient(timeout=ASK_TIMEOUT_S, trust_env=False) as http:
        pages = await asyncio.gather(*(_page(http, agent) for agent in agents))
    return present([sample for page in pages for sample in read(page)], time.time())


async def _page(http: httpx.AsyncClient, agent: str) -> str:
    try:
        reply = await http.get(f"http://{agent}/metrics")
    except httpx.HTTPError:
        return ""
    return reply.text if reply.status_code == 200 else ""


def read(page: str) -> Iterator[Sample]:
    """Our figures on an agent's page."""
    for line in page.splitlines():
        for prefix, ours in _PREFIXES.items():
            if line.startswith(prefix) and (match := _LINE.fullmatch(line)):
                found = _LABEL.findall(match["labels"])
                labels = {name: value for name, value in found if value and not _RAYS.fullmatch(name)}
                yield Sample(ours + match["name"].removeprefix(prefix), labels, float(match["value"]))


def present(samples: Iterable[Sample], now_s: float) -> list[Sample]:
    """Those of replicas that were heard of lately."""
    samples = list(samples)
    seen = {sample.replica for sample in samples if sample.name == SEEN and now_s - sample.value < STALE_S}
    return [sample for sample in samples if sample.replica in seen]


def page_of(samples: Iterable[Sample]) -> bytes:
    """For Prometheus: a page of untyped figures, those of one name together."""
    lines = [sample.line() for sample in sorted(samples, key=lambda sample: sample.name)]
    return "".join(f"{line}\n" for line in lines).encode()
