"""The fetch door: addresses, redirects, name resolution, sizes and times (safety catalogue S1 to S8)."""

from __future__ import annotations

import asyncio
import ipaddress
import shutil
import ssl
import subprocess
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from support.media_support import PARAM, Canary, refusal

from sensorium.config import Limits
from sensorium.errors import MediaError, StartupError
from sensorium.media.address import AllowedHosts, is_public
from sensorium.media.fetch import Fetcher, parse_url
from sensorium.media.loader import MediaLoader
from sensorium.media.source import MediaSource, Refusal
from sensorium.types import Modality

PUBLIC = "93.184.215.14"


def make_loader(
    *allowed: str,
    addresses: dict[str, list[list[str]]] | None = None,
    transport: httpx.AsyncBaseTransport | None = None,
    **limits: Any,
) -> MediaLoader:
    """`addresses`: host -> the answers to its successive look-ups; the last one stays."""
    answers = {host: list(lists) for host, lists in (addresses or {}).items()}

    async def resolve(host: str, port: int, tenant: bytes) -> list[str]:
        if host not in answers:
            raise OSError
        return answers[host].pop(0) if len(answers[host]) > 1 else answers[host][0]

    return MediaLoader(
        Limits(**limits),
        allowed_domains=allowed,
        workers=1,
        resolve=resolve if addresses is not None else None,
        transport=transport,
    )


async def fetch(loader: MediaLoader, url: str, kind: Modality = "image") -> bytes:
    try:
        return (await loader.fetch(MediaSource(kind, PARAM, url=url))).payload
    finally:
        await loader.aclose()


class Recorder(httpx.AsyncBaseTransport):
    """Stands for the network: remembers where a request went, answers from a table of URL path -> response."""

    def __init__(self, answers: dict[str, httpx.Response] | None = None) -> None:
        self.requests: list[httpx.Request] = []
        self.answers = answers or {}

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        self.requests.append(request)
        return self.answers.get(request.url.raw_path.decode(), httpx.Response(200, content=picture()))


async def picture() -> AsyncIterator[bytes]:
    yield b"pic"
    yield b"ture"


def redirect(location: str, status: int = 302) -> httpx.Response:
    return httpx.Response(status, headers={"location": location})


LOOPBACK_HOSTS = [
    "127.0.0.1",
    "localhost",
    "[::1]",
    "0.0.0.0",
    "2130706433",
    "0x7f.1",
    "127.1",
    "0",
    "[::]",
    "[::ffff:127.0.0.1]",
    "[64:ff9b::7f00:1]",
    "[2002:7f00:1::]",
    "017700000001",
    "LOCALHOST.",
    "[::7f00:1]",
    "[::ffff:0:127.0.0.1]",
    "[::ffff:0:7f00:1]",
]
INTERNAL_HOSTS = [
    "169.254.169.254",
    "100.100.100.200",
    "10.0.0.1",
    "[fd00::1]",
    "[fe80::1]",
    "168.63.129.16",
    "192.168.1.1",
    "172.16.0.1",
    "224.0.0.1",
    "[ff02::1]",
    "[fec0::1]",
    "255.255.255.255",
    "192.0.0.8",
    "no-such-host.invalid",
    "[64:ff9b::a9fe:a9fe]",
    "[64:ff9b:1::a9fe:a9fe]",
    "[2001:0:7f00:1::1]",
]


@pytest.mark.parametrize("host", LOOPBACK_HOSTS)
async def test_loopback_is_refused_and_never_connected(
    host: str, canary: Canary, monkeypatch: pytest.MonkeyPatch
) -> None:
    """S1, with any port let through so that the address check alone decides."""
    monkeypatch.setattr(AllowedHosts, "admits", lambda self, host, port: True)
    error = await refusal(fetch(make_loader(), f"http://{host}:{canary.port}/a.png"))
    assert error.code == "invalid_image_url"
    assert canary.connections == 0


async def test_every_refused_address_gets_the_same_words() -> None:
    """S2: neither text nor code tells a filtered address from a missing one."""
    texts = set()
    for host in LOOPBACK_HOSTS + INTERNAL_HOSTS:
        recorder = Recorder()
        addresses: dict[str, list[list[str]]] | None = (
            {} if host == "no-such-host.invalid" else None
        )  # the system's resolver knows the numeric ones
        error = await refusal(fetch(make_loader(addresses=addresses, transport=recorder), f"http://{host}/"))
        texts.add((error.message, error.code))
        assert not recorder.requests
    assert len(texts) == 1


@pytest.mark.parametrize(
    "url",
    ["http://good.example:8080/", "https://good.example:22/", "http://good.example:0/", "http://good.example:99999/"],
)
async def test_ports(url: str) -> None:
    recorder = Recorder()
    error = await refusal(fetch(make_loader(addresses={"good.example": [[PUBLIC]]}, transport=recorder), url))
    assert error.code == "invalid_image_url"
    assert not recorder.requests


@pytest.mark.parametrize(
    "text, public",
    [
        ("8.8.8.8", True),
        ("2001:4860:4860::8888", True),
        ("64:ff9b::808:808", True),
        ("::ffff:8.8.8.8", True),
        ("64:ff9b::a9fe:a9fe", False),
        ("64:ff9b:1::1", False),
        ("2002:7f00:1::", False),
        ("2002:808:808::", False),
        ("::127.0.0.1", False),
        ("fec0::1", False),
        ("224.0.0.1", False),
        ("ff02::1", False),
        ("192.0.0.8", False),
        ("2001:0:808:808::1", False),
        ("::", False),
        ("::1", False),
        ("100.64.0.1", False),
        ("198.18.0.1", False),
        ("240.0.0.1", False),
        ("2a00:1450:4001::5efe:7f00:1", False),
        ("2a00:1450:4001::200:5efe:a00:1", False),
        ("192.88.99.1", False),
        ("3fff::1", False),
        ("5f00::1", False),
        ("2001:db8::1", False),
        ("::ffff:0:127.0.0.1", False),
        ("::ffff:0:10.0.0.1", False),
        ("::ffff:0:a9fe:a9fe", False),
        ("::ffff:0:8.8.8.8", True),
        ("::8.8.8.8", True),
        ("::10.0.0.1", False),
        ("::ffff:169.254.169.254", False),
        ("64:ff9b::a00:1", False),
        ("64:ff9b:1::808:808", False),
        ("64:ff9b:2::1", False),
        ("2002:a9fe:a9fe::1", False),
        ("2001:0:4136:e378:8000:63bf:3fff:fdd2", False),
        ("2a00:1450:4001::5efe:808:808", False),
        ("100::1", False),
        ("100:0:0:1::1", False),
        ("200::1", False),
        ("4000::1", False),
        ("fe00::1", False),
        ("fc00::1", False),
        ("fe80::5efe:a9fe:a9fe", False),
        ("feb0::1", False),
        ("3fff:fff:ffff::1", False),
        ("2001:20::1", False),
        ("2001:db8:ffff::1", False),
        ("2606:4700::1111", True),
        ("3ffe::1", True),
    ],
)
def test_public_addresses(text: str, public: bool) -> None:
    assert is_public(ipaddress.ip_address(text)) is public


@pytest.mark.parametrize(
    "location",
    [
        "http://127.0.0.1/",
        "//127.0.0.1/",
        "http://[::ffff:7f00:1]/",
        "http://10.1.2.3/x",
        "http://internal.example/",
        "file:///etc/passwd",
        "ftp://good.example/",
        "http://good.example:6379/",
        "http://u:p@good.example/",
        "http:\\\\127.0.0.1/",
    ],
)
@pytest.mark.parametrize("status", [302, 307])
async def test_redirects_are_checked_like_first_urls(location: str, status: int) -> None:
    """S3."""
    recorder = Recorder({"/a": redirect(location, status)})
    loader = make_loader(
        addresses={
            "good.example": [[PUBLIC]],
            "127.0.0.1": [["127.0.0.1"]],
            "10.1.2.3": [["10.1.2.3"]],
            "::ffff:7f00:1": [["::ffff:7f00:1"]],
            "internal.example": [["10.0.0.7"]],
        },
        transport=recorder,
    )
    error = await refusal(fetch(loader, "http://good.example/a"))
    assert error.code == "invalid_image_url"
    assert [request.url.host for request in recorder.requests] == [PUBLIC]


async def test_redirects_are_followed_three_times() -> None:
    hops = {
        "/0": redirect("/1"),
        "/1": redirect("2", 307),
        "/2": redirect("//good.example/3", 308),
        "/3": redirect("/4", 301),
    }
    addresses = {"good.example": [[PUBLIC]]}
    recorder = Recorder(hops)
    assert await fetch(make_loader(addresses=addresses, transport=recorder), "http://good.example/1") == b"picture"
    assert [request.url.raw_path for request in recorder.requests] == [b"/1", b"/2", b"/3", b"/4"]
    recorder = Recorder(hops)
    error = await refusal(fetch(make_loader(addresses=addresses, transport=recorder), "http://good.example/0"))
    assert error.code == "invalid_image_url"
    assert len(recorder.requests) == 4


async def test_https_does_not_redirect_to_http() -> None:
    recorder = Recorder({"/a": redirect("http://good.example/b")})
    error = await refusal(
        fetch(make_loader(addresses={"good.example": [[PUBLIC]]}, transport=recorder), "https://good.example/a")
    )
    assert error.code == "invalid_image_url"
    assert len(recorder.requests) == 1


async def test_redirect_circle() -> None:
    recorder = Recorder({"/a": redirect("/b"), "/b": redirect("/a")})
    error = await refusal(
        fetch(make_loader(addresses={"good.example": [[PUBLIC]]}, transport=recorder), "http://good.example/a")
    )
    assert error.code == "failed_to_download_image"
    assert len(recorder.requests) == 2


async def test_connection_goes_to_the_address_that_was_checked() -> None:
    """S4: a second look-up cannot change it, and one bad answer among good ones refuses the host."""
    recorder = Recorder()
    loader = make_loader(addresses={"rebind.example": [[PUBLIC], ["127.0.0.1"]]}, transport=recorder)
    assert (await loader.fetch(MediaSource("image", PARAM, url="http://rebind.example/a?b=1"))).payload == b"picture"
    (request,) = recorder.requests
    assert request.url.host == PUBLIC
    assert request.headers["host"] == "rebind.example"
    assert request.extensions["sni_hostname"] == "rebind.example"
    error = await refusal(fetch(loader, "http://rebind.example/a"))
    assert error.code == "invalid_image_url"
    assert len(recorder.requests) == 1
    mixed = make_loader(addresses={"mixed.example": [[PUBLIC, "127.0.0.1"]]}, transport=recorder)
    assert (await refusal(fetch(mixed, "http://mixed.example/"))).code == "invalid_image_url"
    assert len(recorder.requests) == 1


@pytest.mark.parametrize(
    "url",
    [
        "http://good.example\\@127.0.0.1/",
        "http://good.example#@127.0.0.1/",
        "http://u:p@127.0.0.1/",
        "http://@127.0.0.1/",
        "http://127.0.0.1%00.good.example/",
        "http:/\\127.0.0.1",
        "http:/127.0.0.1",
        "http:///127.0.0.1",
        "http://127.0.0.1\t/",
        "http://127.0.0.1\n/",
        "ht\ntp://127.0.0.1/",
        " http://127.0.0.1/",
        "http://good.example/%00",
        "http://[::1/",
        "http://",
        "http://good.example:80:80/",
        "http://good.example:/",
        "http://good example/",
        "gopher://127.0.0.1/",
        "//127.0.0.1/",
        "127.0.0.1",
        "",
        "http://[::1%25eth0]/",
        "http://\u2460\u2461\u2466.0.0.1/",
        "http://good.example\uff0f127.0.0.1/",
        "http://good%2eexample/",
        "jar:http://127.0.0.1/!/a",
    ],
)
async def test_urls_that_parsers_disagree_on(url: str, canary: Canary, monkeypatch: pytest.MonkeyPatch) -> None:
    """S5."""
    monkeypatch.setattr(AllowedHosts, "admits", lambda self, host, port: True)
    recorder = Recorder()
    url = url.replace("127.0.0.1/", f"127.0.0.1:{canary.port}/")
    error = await refusal(fetch(make_loader(transport=recorder), url))
    assert error.code == "invalid_image_url"
    assert canary.connections == 0
    assert not recorder.requests


@pytest.mark.parametrize("kind", ["image", "video", "audio"])
@pytest.mark.parametrize("url", ["http://127.0.0.1/", "http://good.example\\@127.0.0.1/", "file:///etc/passwd"])
async def test_all_kinds_use_the_same_door(url: str, kind: Modality) -> None:
    """S6, at this level."""
    error = await refusal(fetch(make_loader(), url, kind))
    assert error.code == f"invalid_{kind}_url"


def test_url_parts() -> None:
    target = parse_url("HTTP://EXAMPLE.com.:8080/a b".replace(" ", "%20") + "?q=ä#frag", 2048)
    assert (target.scheme, target.host, target.port, target.path) == ("http", "example.com", 8080, "/a%20b?q=%C3%A4")
    assert str(parse_url("https://[2001:4860::1]:443?x", 2048)) == "https://[2001:4860::1]/?x"
    assert parse_url("http://bücher.example/", 2048).host == "xn--bcher-kva.example"
    with pytest.raises(Refusal):
        parse_url("http://example.com/" + "a" * 2048, 2048)


async def test_named_hosts_may_be_private_and_only_they_are_fetched(canary: Canary) -> None:
    url = f"http://127.0.0.1:{canary.port}/a.png"
    assert await fetch(make_loader("127.0.0.1"), url) == b"hello"
    assert await fetch(make_loader(f"127.0.0.1:{canary.port}"), url) == b"hello"
    assert await fetch(make_loader("localhost"), f"http://localhost:{canary.port}/") == b"hello"  # ::1 answers nothing
    assert canary.connections == 3
    assert (await refusal(fetch(make_loader("127.0.0.1:1"), url))).code == "invalid_image_url"
    assert (await refusal(fetch(make_loader("localhost"), url))).code == "invalid_image_url"
    assert (await refusal(fetch(make_loader("good.example"), url))).code == "invalid_image_url"
    recorder = Recorder()
    other = make_loader("good.example", addresses={"other.example": [[PUBLIC]]}, transport=recorder)
    assert (await refusal(fetch(other, "http://other.example/"))).code == "invalid_image_url"
    assert not recorder.requests
    assert canary.connections == 3


async def test_a_named_host_does_not_lead_to_cloud_credentials() -> None:
    recorder = Recorder()
    for address in (
        "169.254.169.254",
        "fe80::1",
        "0.0.0.0",
        "224.0.0.1",
        "::ffff:0:a9fe:a9fe",
        "64:ff9b::a9fe:a9fe",
        "2002:a9fe:a9fe::1",
        "64:ff9b:1::a9fe:a9fe",
        "fd00::5efe:a9fe:a9fe",
        "2001:0:1:2:3:4:5601:5601",
    ):
        loader = make_loader("files.example", addresses={"files.example": [[address]]}, transport=recorder)
        assert (await refusal(fetch(loader, "http://files.example/"))).code == "invalid_image_url"
    assert not recorder.requests


def test_bad_domain_flag() -> None:
    with pytest.raises(StartupError, match="allowed-media-domains"):
        make_loader("http://good.example/")


async def test_request_head(canary: Canary, monkeypatch: pytest.MonkeyPatch) -> None:
    """No proxy, no cookie, no compression; the name stays in Host."""
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9/")
    monkeypatch.setenv("all_proxy", "http://127.0.0.1:9/")
    canary.answer = canary.plain(b"x", headers="Set-Cookie: a=b\r\n")
    loader = make_loader("localhost")
    for _ in range(2):
        await loader.fetch(MediaSource("image", PARAM, url=f"http://localhost:{canary.port}/a"))
    await loader.aclose()
    for head in canary.requests:
        lines = head.lower().split("\r\n")
        assert lines[0] == "get /a http/1.1"
        assert f"host: localhost:{canary.port}" in lines
        assert "accept-encoding: identity" in lines
        assert any(line.startswith("user-agent: sensorium/") for line in lines)
        assert not any(line.startswith(("cookie", "authorization")) for line in lines)


async def endless(_head: str, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n\r\n")
    for _ in range(16 * 1024):
        writer.write(bytes(64 * 1024))
        await writer.drain()


async def dripping(_head: str, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n")
    for _ in range(100):
        writer.write(b"x")
        await writer.drain()
        await asyncio.sleep(0.05)


async def silent(_head: str, writer: asyncio.StreamWriter) -> None:
    await asyncio.sleep(5)


async def garbage(_head: str, writer: asyncio.StreamWriter) -> None:
    writer.write(b"\x00\xff nonsense\r\n\r\n")


async def cut_off(_head: str, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nabc")


async def crumbs(_head: str, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"1\r\nx\r\n" * 500_000 + b"0\r\n\r\n")


async def long_headers(_head: str, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\n" + b"X: " + b"y" * (4 << 20) + b"\r\n\r\n")


@pytest.mark.parametrize(
    "answer, code",
    [
        (endless, "image_file_too_large"),
        (dripping, "failed_to_download_image"),
        (silent, "failed_to_download_image"),
        (garbage, "failed_to_download_image"),
        (cut_off, "failed_to_download_image"),
        (crumbs, "failed_to_download_image"),
        (long_headers, "failed_to_download_image"),
    ],
)
async def test_hostile_servers(answer: object, code: str, canary: Canary) -> None:
    """S8: within the cap and the one deadline over everything."""
    canary.answer = answer  # type: ignore[assignment]
    start = time.monotonic()
    error = await refusal(
        fetch(
            make_loader("127.0.0.1", fetch_timeout_s=0.5, max_image_bytes=1 << 20), f"http://127.0.0.1:{canary.port}/"
        )
    )
    assert error.code == code
    assert time.monotonic() - start < 60  # S8: the deadline, and what a loaded machine adds


async def test_a_body_in_crumbs_does_not_occupy_the_event_loop(canary: Canary) -> None:
    canary.answer = crumbs
    start = time.process_time()
    error = await refusal(fetch(make_loader("127.0.0.1"), f"http://127.0.0.1:{canary.port}/"))
    assert error.code == "failed_to_download_image"
    assert time.process_time() - start < 3


async def hints(_head: str, writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 103 Early Hints\r\n\r\n" * 100_000)


async def a_hint(_head: str, writer: asyncio.StreamWriter) -> None:
    writer.write(
        b"HTTP/1.1 103 Early Hints\r\nLink: </a>\r\n\r\n" * 3
        + b"HTTP/1.1 200 OK\r\nContent-Length: 300000\r\n\r\n"
        + b"x" * 300_000
    )


async def test_interim_responses_without_end_do_not_occupy_the_event_loop(canary: Canary) -> None:
    canary.answer = hints
    start = time.process_time()
    error = await refusal(fetch(make_loader("127.0.0.1", fetch_timeout_s=5), f"http://127.0.0.1:{canary.port}/"))
    assert error.code == "failed_to_download_image"
    assert time.process_time() - start < 3  # 5 without a bound
    canary.answer = a_hint
    fetcher = Fetcher(AllowedHosts.parse(("127.0.0.1",)), timeout_s=5, max_redirects=0, max_url_length=100)
    found = await fetcher.get(f"http://127.0.0.1:{canary.port}/", 10**6)
    assert found.payload == b"x" * 300_000
    await fetcher.aclose()


async def test_ordinary_chunks_are_fine(canary: Canary) -> None:
    async def answer(_head: str, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(3000):
            writer.write(b"400\r\n" + bytes(1024) + b"\r\n")
        writer.write(b"0\r\n\r\n")

    canary.answer = answer
    payload = await fetch(make_loader("127.0.0.1"), f"http://127.0.0.1:{canary.port}/")
    assert len(payload) == 3000 * 1024


@pytest.mark.parametrize(
    "headers, code",
    [
        ("Content-Length: 1073741824\r\n", "image_file_too_large"),
        ("Content-Length: " + "9" * 300 + "\r\n", None),
        ("Content-Encoding: gzip\r\nContent-Length: 3\r\n", "failed_to_download_image"),
    ],
)
async def test_declared_sizes_and_encodings(headers: str, code: str | None, canary: Canary) -> None:
    async def answer(_head: str, writer: asyncio.StreamWriter) -> None:
        writer.write(f"HTTP/1.1 200 OK\r\n{headers}\r\nabc".encode())

    canary.answer = answer
    error = await refusal(fetch(make_loader("127.0.0.1"), f"http://127.0.0.1:{canary.port}/"))
    assert error.code in ((code,) if code else ("image_file_too_large", "failed_to_download_image"))


@pytest.mark.parametrize("status", ["404 Not Found", "500 Oops", "204 No Content", "206 Partial Content", "304 Not"])
async def test_other_statuses(status: str, canary: Canary) -> None:
    canary.answer = canary.plain(b"", status)
    error = await refusal(fetch(make_loader("127.0.0.1"), f"http://127.0.0.1:{canary.port}/"))
    assert error.code == "failed_to_download_image"


async def test_empty_answer_and_closed_port(canary: Canary) -> None:
    canary.answer = canary.plain(b"")
    error = await refusal(fetch(make_loader("127.0.0.1"), f"http://127.0.0.1:{canary.port}/"))
    assert error.code == "empty_image_file"
    assert (await refusal(fetch(make_loader("127.0.0.1"), "http://127.0.0.1:1/"))).code == "failed_to_download_image"


async def test_slow_name_server_is_inside_the_deadline() -> None:
    async def resolve(host: str, port: int, tenant: bytes) -> list[str]:
        await asyncio.sleep(30)
        return [PUBLIC]

    fetcher = Fetcher(AllowedHosts(), timeout_s=0.1, max_redirects=3, max_url_length=99, resolve=resolve)
    with pytest.raises(Refusal) as caught:
        await fetcher.get("http://slow.example/", 10)
    assert caught.value.problem == "download"
    await fetcher.aclose()


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes a certificate with the openssl command")
async def test_tls_certificate_is_checked_against_the_name(tmp_path: Path) -> None:
    """The connection goes to an address, the certificate must still be the name's, from a trusted issuer."""
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        [
            "openssl",
            "req",
            "-x509",
            "-newkey",
            "ec",
            "-pkeyopt",
            "ec_paramgen_curve:prime256v1",
            "-nodes",
            "-keyout",
            key,
            "-out",
            certificate,
            "-days",
            "2",
            "-subj",
            "/CN=good.example",
            "-addext",
            "subjectAltName=DNS:good.example",
        ],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    canary = Canary()
    server = await asyncio.start_server(canary.serve, "127.0.0.1", 0, ssl=context)
    port = server.sockets[0].getsockname()[1]
    names = {"good.example": [["127.0.0.1"]], "evil.example": [["127.0.0.1"]]}
    trusting = ssl.create_default_context(cafile=str(certificate))
    transport = httpx.AsyncHTTPTransport(verify=trusting, trust_env=False)

    async def outcome(host: str, transport: httpx.AsyncBaseTransport | None) -> bytes | MediaError:
        loader = make_loader(host, addresses=names, transport=transport)
        try:
            return (await loader.fetch(MediaSource("image", PARAM, url=f"https://{host}:{port}/"))).payload
        except MediaError as error:
            return error

    assert await outcome("good.example", transport) == b"hello"
    for error in (await outcome("evil.example", transport), await outcome("good.example", None)):
        assert isinstance(error, MediaError)
        assert error.code == "failed_to_download_image"
    assert len(canary.requests) == 1
    await transport.aclose()
    server.close()
