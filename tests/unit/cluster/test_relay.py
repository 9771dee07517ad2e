"""A replica without a port, and what stands before replicas of several models: the same answers, to the right model."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest.mock import patch

import httpx
import pytest
from prometheus_client.core import GaugeMetricFamily
from support.api_support import FakeEngine, make_model, speak, until

from sensorium.api.app import App
from sensorium.api.context import Context
from sensorium.api.guards.in_flight import InFlightRequests
from sensorium.api.metrics import EngineNumbers, Metrics
from sensorium.api.transport.asgi import Message, Scope
from sensorium.cluster.numbers import SEEN, exported, mirrored, page_of, present, read
from sensorium.cluster.relay import Relay
from sensorium.cluster.replica import Replica, replica_routes
from sensorium.config import Limits, ServePlan, ServerConfig
from sensorium.errors import UnavailableError
from sensorium.serving.catalog import Catalog
from sensorium.types import EngineOutput, EngineRequest, EngineStats

CHAT = {"messages": [{"role": "user", "content": "hi"}]}


async def page() -> bytes:
    return b"all figures\n"


@dataclass(eq=False)
class Model:
    """A backend: one replica in this process, and what it was asked."""

    replica: Replica
    engine: FakeEngine
    sessions: list[str] = field(default_factory=list)
    is_lost: bool = False

    async def answer(self, scope: Scope, body: bytes, session: str) -> AsyncIterator[list[Message]]:
        self.sessions.append(session)
        async for lot in self.replica.answer(scope, body):
            yield lot
            if self.is_lost:
                raise UnavailableError("The replica that worked on this request was lost.")


def make(name: str, script: Any = speak, **server: Any) -> Model:
    engine, config = FakeEngine(script=script), ServerConfig(**server)
    made = make_model(engine, config, Limits(), names=(name,))
    replica = Replica(ServePlan(None, ()), page)  # type: ignore[arg-type]
    replica._app = App.of(Context(Catalog.of({name: made}), config, Limits()), replica_routes(page))
    return Model(replica, engine)


@asynccontextmanager
async def asking(*models: tuple[str, Model], **server: Any) -> AsyncIterator[httpx.AsyncClient]:
    relay = Relay(dict(models), ServerConfig(**server), Limits(), page)
    async with httpx.AsyncClient(transport=httpx.ASGITransport(relay), base_url="http://localhost") as http:
        yield http


@contextmanager
def pair(**options: Any) -> Iterator[tuple[tuple[str, Model], tuple[str, Model]]]:
    yield ("one", make("one", **options)), ("two", make("two", **options))


async def test_a_request_goes_to_the_model_that_it_names() -> None:
    with pair() as models:
        async with asking(*models) as http:
            for name, model in models:
                reply = await http.post("/v1/chat/completions", json={"model": name, **CHAT})
                assert (reply.status_code, reply.json()["model"]) == (200, name)
                assert len(model.engine.requests) == 1
            assert (await http.post("/v1/chat/completions", json=CHAT)).json()["model"] == "one"
            assert (await http.post("/chat/completions", json={"model": "two:latest", **CHAT})).status_code == 200
            reply = await http.post("/v1/chat/completions", json={"model": "three", **CHAT})
            assert reply.status_code == 404
            assert reply.json()["error"]["code"] == "model_not_found"
            assert "there are one, two" in reply.json()["error"]["message"]


async def test_streams_come_through_whole() -> None:
    with pair() as models:
        async with asking(*models) as http:
            plain = (await http.post("/v1/chat/completions", json={"model": "two", **CHAT})).json()
            reply = await http.post("/v1/chat/completions", json={"model": "two", "stream": True, **CHAT})
    lines = [line[6:] for line in reply.text.splitlines() if line.startswith("data: ")]
    pieces = [json.loads(line)["choices"][0]["delta"].get("content", "") for line in lines[:-1]]
    assert lines[-1] == "[DONE]"
    assert "".join(pieces) == plain["choices"][0]["message"]["content"] != ""


async def test_lists_have_every_model_and_health_is_everybodys() -> None:
    with pair() as models:
        async with asking(*models) as http:
            for path, rows in (("/v1/models", "data"), ("/api/tags", "models")):
                reply = (await http.get(path)).json()
                assert [row.get("id") or row["name"].removesuffix(":latest") for row in reply[rows]] == ["one", "two"]
            assert (await http.get("/v1/models")).json()["last_id"] == "two"
            assert (await http.get("/v1/models/two")).json()["id"] == "two"
            assert (await http.get("/readyz")).status_code == 200
            assert (await http.get("/metrics")).text == "all figures\n"
            models[1][1].engine.state = "restarting"
            assert (await http.get("/readyz")).status_code == 503
            assert [row["id"] for row in (await http.get("/v1/models")).json()["data"]] == ["one"]
            assert (await http.get("/livez")).status_code == 200


async def test_what_is_wrong_is_answered_as_by_one_server() -> None:
    with pair(api_key=("secret",)) as models:
        async with asking(*models, api_key=("secret",)) as http:
            assert (await http.post("/v1/chat/completions", json=CHAT)).status_code == 401
            http.headers["authorization"] = "Bearer secret"
            assert (await http.post("/v1/chat/completions", json=CHAT)).status_code == 200
            assert (await http.get("/nothing")).status_code == 404
            assert (await http.get("/v1/chat/completions")).status_code == 405
            assert (await http.post("/v1/chat/completions", content=b"{no json")).status_code in (400, 415)
            reply = await http.post("/v1/load_lora_adapter", json={"lora_name": "a", "lora_path": "b"})
            assert reply.status_code == 403
            assert "--lora" in reply.json()["error"]["message"] or "operator" in reply.json()["error"]["message"]


async def test_a_session_and_a_form_are_handed_on() -> None:
    with pair() as models:
        async with asking(*models) as http:
            await http.post("/v1/chat/completions", json={"model": "two", **CHAT}, headers={"x-session-id": "s1"})
            form: list[tuple[str, Any]] = [("model", (None, b"two")), ("file", ("a.wav", b"no audio"))]
            with patch.object(InFlightRequests, "open", autospec=True, side_effect=InFlightRequests.open) as opened:
                reply = await http.post("/v1/audio/transcriptions", files=form)
            assert opened.call_args_list[0].args[2] is None  # the replica knows how far it is
    assert models[1][1].sessions == ["s1", ""]
    assert "takes no audio input" in reply.json()["error"]["message"]


async def test_a_replica_that_is_lost_ends_a_stream_with_an_error() -> None:
    with pair(script=forever) as models:
        models[0][1].is_lost = True
        async with asking(*models) as http:
            reply = await http.post("/v1/chat/completions", json={"stream": True, **CHAT})
    assert reply.status_code == 200
    assert '"code":"unavailable"' in reply.text
    assert reply.text.endswith("data: [DONE]\n\n")


async def forever(request: EngineRequest) -> AsyncIterator[EngineOutput]:
    yield EngineOutput(request.id, (40,))
    await asyncio.Event().wait()


async def test_who_stops_reading_frees_the_sequence() -> None:
    model = make("one", script=forever)
    body = json.dumps({"stream": True, **CHAT}).encode()
    headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
    scope = {"type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"", "headers": headers}
    lots = model.replica.answer(scope, body)
    first = await anext(lots)
    assert first[0]["status"] == 200
    assert model.engine.active
    await lots.aclose()  # type: ignore[attr-defined]
    await until(lambda: not model.engine.active)


async def test_a_lost_engine_makes_the_replica_unhealthy() -> None:
    model = make("one")
    model.replica.check()
    model.engine.state = "restarting"
    model.replica.check()
    model.engine.state = "failed"
    with pytest.raises(UnavailableError):
        model.replica.check()


def exported_page(values: dict[tuple[str, str], float]) -> str:
    """As one of Ray's agents has them: by name and replica."""
    return '# HELP ray_x\n# TYPE ray_x gauge\nray_other{replica="a"} 1.0\n' + "".join(
        f'ray_{name}{{Component="core_worker",WorkerId="0a",otel_scope_name="x",application="s",deployment="d",'
        f'engine="0",le="",model_name="m",replica="{replica}"}} {value}\n'
        for (name, replica), value in values.items()
    )


def test_figures_come_back_from_ray_under_our_names() -> None:
    running = exported("vllm:num_requests_running")
    now_s = 1_000_000.0
    shown = exported_page(
        {
            (running, "a"): 3.0,
            (running, "b"): 4.0,
            (running, "gone"): 9.0,
            (exported(SEEN), "a"): now_s - 2,
            (exported(SEEN), "b"): now_s - 9,
            (exported(SEEN), "gone"): now_s - 500,
        }
    )
    found = [one for one in present(read(shown), now_s) if one.name == "vllm:num_requests_running"]
    assert {(one.replica, one.value) for one in found} == {("a", 3.0), ("b", 4.0)}
    assert page_of(found[:1]) == (
        b'vllm:num_requests_running{application="s",deployment="d",model_name="m",replica="a"} 3.0\n'
    )


def test_every_figure_is_mirrored_with_labels_that_ray_takes() -> None:
    metrics = Metrics(["m"])
    metrics.models["m"].first_output(1.0, 1.0, 1.0)
    metrics.answered("GET", "/version", 200, 1.0)
    rows = list(mirrored(metrics.families({"m": EngineNumbers(EngineStats(), None, "ready", 0, 0)})))
    labels: dict[str, set[tuple[str, ...]]] = {}
    for name, own, _ in rows:
        assert ":" not in name
        labels.setdefault(name, set()).add(tuple(own))
    assert all(len(kinds) == 1 for kinds in labels.values())
    for name in ("vllm_num_requests_running", "vllm_time_to_first_token_seconds_bucket"):
        assert name in labels
    for name in ("http_requests_total", "http_request_duration_seconds_bucket"):
        (sample,) = list(read(f'ray_{name}{{handler="/version"}} 1.0'))
        assert name in labels and sample.name == name
    assert "vllm_request_params_n_bucket" not in labels  # nothing was counted
    assert not list(mirrored([GaugeMetricFamily("empty", "")]))
