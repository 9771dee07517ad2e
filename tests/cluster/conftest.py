"""Replicas on a real Ray cluster of two nodes on this machine. Without Ray these tests are skipped: `make test-ray`."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.api_support import free_port

from sensorium.cluster.numbers import Sample, read

DEADLINE_S = 240.0
# Two of Ray's proxies on one machine would share their ports.
SMALL = (
    "--proxies",
    "head",
    "--kv-cache-memory",
    "32MiB",
    "--max-num-seqs",
    "16",
    "--cpus-per-replica",
    "0.5",
    "--threads",
    "1",
)
INGRESSES = {
    "python": {},
    "haproxy": {  # as docs/scaling.md has it
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BALANCE_ALGORITHM": "hdr(x-session-id)",
        "RAY_SERVE_RUN_USER_CODE_IN_SEPARATE_THREAD": "0",
        "RAY_worker_niceness": "0",
    },
}


@dataclass
class RayCluster:
    """`url` is where Ray Serve listens, whatever is deployed there."""

    address: str
    port: int
    environment: dict[str, str]
    head: Any
    deployed: tuple[str, ...] = ()  # with these words

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def run(self, *words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "sensorium", *words, "--ray-address", self.address],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=DEADLINE_S,
            check=False,
        )

    def deploy(self, *words: str) -> None:
        """Where it is not there already: Ray would replace every replica by one like it."""
        if self.deployed == words:
            return
        done = self.run("deploy", "ray", *words, "--port", str(self.port), *SMALL)
        assert done.returncode == 0, done.stdout + done.stderr
        self.deployed = words

    def delete(self) -> None:
        self.deployed = ()
        self.run("deploy", "ray", "--delete")

    def replicas(self) -> list[int]:
        """Process ids."""
        titles = {}
        for folder in Path("/proc").iterdir():
            if folder.name.isdecimal():
                try:
                    titles[int(folder.name)] = (folder / "cmdline").read_bytes()
                except OSError:
                    continue
        mine = [pid for pid, title in titles.items() if title.startswith(b"ray::ServeReplica:sensorium:")]
        return sorted(pid for pid in mine if _session_of(pid) == self.head.get_session_dir_path())

    async def figures(self) -> list[Sample]:
        async with httpx.AsyncClient(timeout=60) as http:
            page = (await http.get(f"{self.url}/metrics")).text
        return [sample for line in page.splitlines() for sample in read(_as_ray_has_it(line))]

    async def total(self, name: str, **labels: str) -> float:
        return sum(
            one.value
            for one in await self.figures()
            if one.name == name and all(one.labels.get(key) == value for key, value in labels.items())
        )


def _session_of(pid: int) -> str:
    """The folder of the Ray session that a process belongs to, by the files that it logs to."""
    try:
        return str(Path(f"/proc/{pid}/fd/2").readlink().parents[1])
    except OSError:
        return ""


def _as_ray_has_it(line: str) -> str:
    name, brace, rest = line.partition("{")
    return f"ray_{name.replace(':', '_')}{brace}{rest}"


@pytest.fixture(scope="session", params=INGRESSES)
def cluster(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayCluster]:
    pytest.importorskip("ray", reason="Ray is not installed: make test-ray")
    from ray.cluster_utils import Cluster

    own_ports = {f"RAY_SERVE_HAPROXY_{name}_PORT": str(free_port()) for name in ("STATS", "METRICS")}
    ours = {"RAY_USAGE_STATS_ENABLED": "0", **own_ports, **INGRESSES[request.param]}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in ours.items():
            patch.setenv(name, value)
        patch.delenv("RAY_ADDRESS", raising=False)
        node = {"num_cpus": 2, "object_store_memory": 120_000_000, "include_dashboard": False}
        made = Cluster(initialize_head=True, head_node_args=node)
        try:
            made.add_node(num_cpus=2, object_store_memory=120_000_000)
            yield RayCluster(made.address, free_port(), dict(os.environ), made.head_node)
        finally:
            made.shutdown()


@pytest.fixture
def pair(cluster: RayCluster) -> RayCluster:
    """Two replicas of the built-in model."""
    cluster.deploy("--replicas", "2")
    return cluster


async def until(condition: Callable[[], Awaitable[bool]], timeout_s: float = DEADLINE_S) -> None:
    end_s = time.monotonic() + timeout_s
    while not await condition():
        assert time.monotonic() < end_s, "it does not happen"
        await asyncio.sleep(0.5)


@dataclass
class Load:
    """Streams that are asked for one after the other by several clients, and what became of them."""

    url: str
    tokens: int = 48
    whole: int = 0
    failed: list[str] = field(default_factory=list)
    in_flight: int = 0

    async def one(self, http: httpx.AsyncClient, number: int) -> None:
        body = {
            "model": "sensorium-demo",
            "messages": [{"role": "user", "content": f"tell me about {number}"}],
            "max_tokens": self.tokens,
            "stream": True,
            "ignore_eos": True,
        }
        self.in_flight += 1
        try:
            async with http.stream("POST", f"{self.url}/v1/chat/completions", json=body) as reply:
                lines = [line async for line in reply.aiter_lines() if line.startswith("data: ")]
            chunks = [json.loads(line[6:]) for line in lines if line != "data: [DONE]"]
            ends = [one["choices"][0]["finish_reason"] for one in chunks if one.get("choices")]
            if reply.status_code == 200 and lines[-1] == "data: [DONE]" and ends[-1] == "length":
                self.whole += 1
            else:
                self.failed.append(f"{reply.status_code} {lines[-2:]}")
        except (httpx.HTTPError, IndexError) as error:
            self.failed.append(repr(error))
        finally:
            self.in_flight -= 1

    @asynccontextmanager
    async def running(self, clients: int) -> AsyncIterator[None]:
        """So many clients within the block; what they have asked for is waited for at its end."""
        stop = asyncio.Event()

        async def client(number: int) -> None:
            async with httpx.AsyncClient(timeout=DEADLINE_S) as http:
                while not stop.is_set():
                    await self.one(http, number)

        tasks = [asyncio.create_task(client(number)) for number in range(clients)]
        try:
            yield
        finally:
            stop.set()
            await asyncio.gather(*tasks)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
