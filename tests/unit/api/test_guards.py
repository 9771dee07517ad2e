"""Who is let in, and what is said to who is not: keys, Host, Origin, ids, log lines (S39, S64-S66, S68, S69, S75)."""

from __future__ import annotations

import asyncio
import hmac
import logging
import re
from typing import Any

import pytest
from openai import AsyncOpenAI, AuthenticationError
from support.api_support import Reply, Served, chat, events, get, post, raw, read_reply, request, serving

from sensorium.api.app import printable
from sensorium.api.guards.auth import PUBLIC_PATHS, CacheSalts, Keys
from sensorium.api.playground import PAGES
from sensorium.api.routes import ROUTES, canonical

KEY = "token-abc123"
METHODS = ("GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS", "TRACE")


def bearer(key: str, scheme: str = "Bearer") -> dict[str, str]:
    return {"Authorization": f"{scheme} {key}"}


async def test_the_client_is_let_in_with_a_key_only() -> None:
    async with serving(api_key=(KEY, "other")) as served:
        for key in (KEY, "other"):
            client = AsyncOpenAI(base_url=f"{served.url}/v1", api_key=key, max_retries=0)
            assert (await client.models.list()).data[0].id == "tiny"
        client = AsyncOpenAI(base_url=f"{served.url}/v1", api_key="wrong", max_retries=0)
        with pytest.raises(AuthenticationError) as caught:
            await client.models.list()
        assert caught.value.type == "authentication_error"


async def test_every_path_needs_the_key_but_the_literal_few() -> None:
    public = {"/", "/livez", "/readyz", "/health", "/ping", "/playground/style.css", "/playground/icon.svg"}
    public |= {
        f"/playground/{name}.js"
        for name in (
            "answer api attachments calls capture chat compare conversation dialogs dom fields i18n main metrics "
            "models plot reasoning render samples server "
            "settings snippets sse store theme turn wav words"
        ).split()
    }
    assert public == PUBLIC_PATHS
    paths = {route.path for route in ROUTES}
    paths |= {"/api/v1" + path.removeprefix("/v1") for path in paths} | {
        "/V1/models",
        "//v1/models",
        "/v1/models/",
        "/v1/models/tiny",
        "/livez/",
        "//livez",
        "/LIVEZ",
        "/livez/../v1/models",
        "/%76%31/models",
        "/new",
        "/livez%00",
        "/metrics?x=/livez",
        "/docs#livez",
        "/api/v1/livez",
    }
    async with serving(api_key=(KEY,)) as served:
        for path in sorted(paths):
            for method in METHODS:
                reply = await raw(served.port, request(method, path)) if method != "HEAD" else await head(served, path)
                bare = path.partition("?")[0].partition("#")[0]
                if bare in public and (bare not in PAGES or method in ("GET", "HEAD")):
                    assert reply.status != 401, (method, path)
                else:
                    assert reply.status == 401, (method, path)
                    assert reply.headers["www-authenticate"] == "Bearer"
        assert (await get(served.port, "/livez")).status == 200


async def head(served: Served, path: str) -> Reply:
    reader, writer = await asyncio.open_connection("127.0.0.1", served.port)
    writer.write(request("HEAD", path))
    reply = await read_reply(reader, head=True)
    writer.close()
    return reply


async def test_a_key_may_come_as_anthropics_clients_send_it() -> None:
    async with serving(api_key=(KEY,)) as served:
        assert (await get(served.port, "/v1/models", headers={"X-Api-Key": KEY})).status == 200
        both = {"X-Api-Key": KEY, "Authorization": "Bearer wrong"}
        assert (await get(served.port, "/v1/models", headers=both)).status == 401


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": ""},
        {"Authorization": KEY},
        bearer(""),
        bearer("x" + KEY[1:]),
        bearer(KEY[:-1] + "x"),
        bearer(KEY[:-1]),
        bearer(KEY + "x"),
        bearer("schlüssel"),
        bearer(KEY, "Basic"),
        bearer(KEY, "bearer\t"),
        {"X-Api-Key": KEY[:-1]},
        bearer(KEY.upper()),
    ],
    ids=range(13),
)
async def test_wrong_keys(headers: dict[str, str]) -> None:
    async with serving(api_key=(KEY,)) as served:
        reply = await get(served.port, f"/v1/models?api_key={KEY}", headers=headers)
        assert reply.status == 401
        assert KEY not in reply.body.decode()
        assert reply.error["type"] == "authentication_error"
        twice = request("GET", "/v1/models", headers=bearer(KEY)).replace(
            b"\r\n\r\n", f"\r\nAuthorization: Bearer {KEY}\r\n\r\n".encode()
        )
        assert (await raw(served.port, twice)).status == 401
        for scheme in ("Bearer", "bearer"):
            assert (await get(served.port, "/v1/models", headers=bearer(KEY, scheme))).status == 200


def test_all_keys_are_compared_as_digests(monkeypatch: pytest.MonkeyPatch) -> None:
    compared: list[tuple[bytes, bytes]] = []
    real = hmac.compare_digest

    def spy(one: bytes, other: bytes) -> bool:
        compared.append((one, other))
        return real(one, other)

    monkeypatch.setattr(hmac, "compare_digest", spy)
    keys = Keys(("a", "b", "c"))
    for key in (b"a", b"c", b"x", b""):
        compared.clear()
        assert bool(keys.match(key)) == (key in (b"a", b"c"))
        assert len(compared) == 3
        assert all(len(one) == len(other) == 32 for one, other in compared)
    assert keys.match(b"a") != keys.match(b"b")


HOSTS = [
    b"Host: x/livez?",
    b"Host: localhost/docs#",
    b"",
    b"Host: localhost\r\nHost: localhost",
    b"Host: ",
    b"Host: a b",
    b"Host: localhost:80:80",
    b"Host: user@localhost",
    b"Host: evil.example",
    b"Host: localhost.evil.example",
    b"Host: 127.0.0.1.nip.io",
]


@pytest.mark.parametrize("key", [(), (KEY,)])
async def test_hosts_do_not_open_doors(key: tuple[str, ...]) -> None:
    async with serving(api_key=key) as served:
        for host in HOSTS:
            for path in ("/v1/models", "/metrics", "/v1/chat/completions", "/docs"):
                head = b"\r\n".join(line for line in (f"GET {path} HTTP/1.1".encode(), host) if line)
                assert (await raw(served.port, head + b"\r\n\r\n")).status in (400, 401, 403), host
        for good in ("localhost", "127.0.0.1", "[::1]", "LOCALHOST:8000", f"127.0.0.1:{served.port}"):
            headers = bearer(KEY) if key else {}
            assert (await get(served.port, "/v1/models", host=good, headers=headers)).status == 200


async def test_any_name_will_do_where_a_key_is_needed_or_all_interfaces_listen() -> None:
    async with serving(api_key=(KEY,)) as served:
        assert (await get(served.port, "/v1/models", host="my.example", headers=bearer(KEY))).status == 200
    async with serving(host="0.0.0.0") as served:
        assert (await get(served.port, "/v1/models", host="my.example")).status == 200


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "http://evil", "Content-Type": "text/plain"}, 403),
        ({"Origin": "http://evil"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost:3000"}, 403),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin", "Origin": "https://proxy.example"}, 200),
        ({"Origin": "http://127.0.0.1"}, 200),
        ({"Origin": "https://proxy.example", "X-Forwarded-Host": "proxy.example"}, 200),
        ({}, 200),
    ],
)
async def test_pages_of_other_origins(served: Served, headers: dict[str, str], status: int) -> None:
    reply = await post(served.port, "/v1/completions", {"prompt": "a", "max_tokens": 1}, headers=headers)
    assert reply.status == status
    assert not any(name.startswith("access-control") for name in reply.headers)


async def test_preflights_are_not_answered(port: int) -> None:
    reply = await raw(port, request("OPTIONS", "/v1/models", headers={"Origin": "http://evil"}))
    assert reply.status == 403
    assert not any(name.startswith("access-control") for name in reply.headers)


PAGE = "https://chat.example"


@pytest.mark.parametrize("allowed", [(PAGE,), ("*",), (f"http://other,{PAGE}",)])
async def test_pages_that_the_operator_names(allowed: tuple[str, ...]) -> None:
    headers = {"Origin": PAGE, "Sec-Fetch-Site": "cross-site"}
    asks = {**headers, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization, x-a"}
    async with serving(api_key=(KEY,), allowed_origins=allowed) as served:
        asked = await raw(served.port, request("OPTIONS", "/v1/chat/completions", headers=asks))
        assert (asked.status, asked.body) == (204, b"")
        assert asked.headers["access-control-allow-origin"] == PAGE
        assert asked.headers["access-control-allow-headers"] == "authorization, x-a"
        assert "POST" in asked.headers["access-control-allow-methods"]
        for more, status in ((bearer(KEY), 200), ({}, 401)):
            for stream in (False, True):
                body = {"messages": [{"role": "user", "content": "hi"}], "stream": stream}
                reply = await post(served.port, "/v1/chat/completions", body, headers={**headers, **more})
                assert reply.status == status
                assert reply.headers["access-control-allow-origin"] == PAGE
                assert "x-request-id" in reply.headers["access-control-expose-headers"]
                assert reply.headers["vary"] == "Origin"
        plain = await get(served.port, "/v1/models", headers=bearer(KEY))
        assert "access-control-allow-origin" not in plain.headers


@pytest.mark.parametrize("origin", ["https://evil.example", "https://chat.example.evil", "null", "http://chat.example"])
async def test_and_no_others(origin: str) -> None:
    async with serving(allowed_origins=(PAGE,)) as served:
        asks = {"Origin": origin, "Access-Control-Request-Method": "POST"}
        for reply in (
            await raw(served.port, request("OPTIONS", "/v1/completions", headers=asks)),
            await post(served.port, "/v1/completions", {"prompt": "a"}, headers={"Origin": origin}),
        ):
            assert (reply.status, reply.error["code"]) == (403, "origin_not_allowed")
            assert "--allowed-origins" in reply.error["message"]
            assert "access-control-allow-origin" not in reply.headers


async def test_nothing_and_wrong_methods(port: int) -> None:
    for path in (
        "/nope",
        "/v1",
        "/v1/",
        "/v1/models/",
        "//v1/models",
        "/v1/chat/completions/",
        "/api/v2/models",
        "/docs/..%2fx",
    ):
        reply = await get(port, path)
        assert reply.status == 404
        assert reply.error["type"] == "not_found_error"
    reply = await get(port, "/v1/chat/completions")
    assert (reply.status, reply.headers["allow"]) == (405, "POST")
    assert reply.error["code"] == "method_not_allowed"
    for method in ("PUT", "DELETE", "TRACE", "PATCH"):
        assert (await raw(port, request(method, "/v1/models"))).status == 405


def test_every_path_is_there_below_the_old_prefix() -> None:
    assert canonical("/api/v1/chat/completions") == "/v1/chat/completions"
    assert canonical("/api/v1/models/a/b") == "/v1/models/a/b"
    assert canonical("/api/v1/tokenize") == "/tokenize"
    assert canonical("/v1/models") == "/v1/models"
    assert canonical("/api/v1/") == "/v1/"
    assert canonical("/api/v1/embed") == canonical("/v1/embed") == "/v1/embed"
    assert canonical("/embed") == "/embed"


@pytest.mark.parametrize(
    "route", [route.path for route in ROUTES if route.path.startswith("/v1/") and route.documented]
)
def test_every_path_is_there_without_its_version(route: str) -> None:
    roots = {one.path for one in ROUTES}
    below = route.removeprefix("/v1")
    assert canonical(below) == (below if below in roots else route)
    assert canonical(route) == route


@pytest.mark.parametrize("root_path", ["/sens", "/sens/"])
async def test_root_path_with_and_without_the_proxy_cutting_it(root_path: str) -> None:
    async with serving(root_path=root_path, api_key=(KEY,)) as served:
        for path in ("/sens/v1/models", "/v1/models", "/sens/api/v1/models"):
            assert (await get(served.port, path, headers=bearer(KEY))).status == 200
            assert (await get(served.port, path)).status == 401
        assert (await get(served.port, "/sens/livez")).status == 200
        assert (await get(served.port, "/sensation/livez", headers=bearer(KEY))).status == 404


async def test_request_ids_are_echoed_if_sane(served: Served) -> None:
    assert re.fullmatch(r"req-[0-9a-f]{24}", (await chat(served.port)).headers["x-request-id"])
    for good in ("abc-1.2_3:4", "x" * 128):
        replies = [
            await post(served.port, "/v1/completions", {"prompt": "a"}, headers={"X-Request-Id": good})
            for _ in range(2)
        ]
        assert [reply.headers["x-request-id"] for reply in replies] == [good, good]
        assert replies[0].json["id"] != replies[1].json["id"]
    for bad in ("x" * 129, "a b", "é", "<script>", "x" * 10_000):
        reply = await get(served.port, "/v1/models", headers={"X-Request-Id": bad})
        assert reply.status == 200
        assert reply.headers["x-request-id"].startswith("req-")


async def test_the_field_request_id_names_the_answer(served: Served) -> None:
    """Also a refused one; the header is only echoed."""
    bodies: dict[str, dict[str, Any]] = {
        "/v1/chat/completions": {"messages": [{"role": "user", "content": "x"}]},
        "/v1/completions": {"prompt": "x"},
    }
    for (path, body), prefix in zip(bodies.items(), ("chatcmpl", "cmpl"), strict=True):
        reply = await post(served.port, path, {**body, "request_id": "mine.1"})
        assert (reply.json["id"], reply.headers["x-request-id"]) == (f"{prefix}-mine.1", "mine.1")
        reply = await post(served.port, path, {**body, "request_id": "mine.1"}, headers={"X-Request-Id": "other"})
        assert (reply.json["id"], reply.headers["x-request-id"]) == (f"{prefix}-mine.1", "other")
        stream = await post(served.port, path, {**body, "request_id": "mine.2", "stream": True})
        assert {event["id"] for event in events(stream.body)} == {f"{prefix}-mine.2"}
        refused = await post(served.port, path, {**body, "request_id": "mine.3", "n": 1000})
        assert (refused.status, refused.headers["x-request-id"]) == (400, "mine.3")


async def test_one_log_line_per_request_with_nothing_of_the_client_raw(caplog: pytest.LogCaptureFixture) -> None:
    async with serving() as served:
        with caplog.at_level(logging.INFO, "sensorium"):
            await get(served.port, "/x%0d%0a200%20OK%1b[31m" + "y" * 1000)
            await chat(served.port, model="m\r\n\x1b[31m" + "z" * 200)
            await chat(served.port)
            await get(served.port, "/livez")
    lines = [record.getMessage() for record in caplog.records if record.name == "sensorium.access"]
    lines = [line for line in lines if "mine" not in line]  # of the test before, whose server may be slow to say it
    assert len(lines) == 3
    assert all(line.isprintable() and len(line) < 400 for line in lines)
    assert "POST /v1/chat/completions 200" in lines[2]
    assert "tokens" in lines[2]
    async with serving(disable_log_requests=True) as served:
        caplog.clear()
        await chat(served.port)
    assert not [record for record in caplog.records if record.name == "sensorium.access"]


def test_printable() -> None:
    assert printable("/v1/models") == "/v1/models"
    assert printable("a\r\nb\x1b") == "a\\r\\nb\\x1b"
    assert len(printable("\n" * 10**6)) == 256


async def test_tenants_do_not_share_caches() -> None:
    async def salts(**server: Any) -> list[bytes]:
        async with serving(api_key=(KEY, "other"), **server) as served:
            for key, salt in ((KEY, None), (KEY, None), ("other", None), (KEY, "x"), ("other", "x")):
                await post(served.port, "/v1/completions", {"prompt": "a", "cache_salt": salt}, headers=bearer(key))
            return [found.salt for found in served.engine.requests]

    own = await salts()
    assert own[0] == own[1]
    assert len(set(own)) == 4
    assert await salts() != own  # another server, another secret
    shared = await salts(shared_prefix_cache=True)
    assert shared[0] == shared[2] == b""
    assert shared[3] == shared[4] != b""


def test_salts_cannot_be_forged_by_a_client() -> None:
    salts = CacheSalts(b"secret", shared=False)
    assert salts.of(b"", None) == b""
    assert salts.of(b"a" * 32, "") == salts.of(b"a" * 32, None)
    assert salts.of(b"", "a" * 32) != salts.of(b"a" * 32, None)
