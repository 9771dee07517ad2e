"""The only fetcher: nothing else in this project opens a connection that a client named.

A URL is parsed once, by us, and rebuilt from its parts; every address of its host is checked and the connection goes
to a checked address, so that no second parser and no second name resolution can disagree.
"""

from __future__ import annotations

import asyncio
import ipaddress
import re
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from urllib.parse import quote, urljoin

import httpx

from sensorium import __version__
from sensorium.media.address import Address, AllowedHosts, canonical_host
from sensorium.media.heads import HeadTrace, HeadTransport
from sensorium.media.held import Take, unbounded
from sensorium.media.names import SystemResolver
from sensorium.media.source import Refusal
from sensorium.media.turns import Turns
from sensorium.units import size_text

Resolver = Callable[[str, int, bytes], Awaitable[list[str]]]
"""Host, port, and the tenant who asks -> addresses."""

REFUSED = (
    "This URL cannot be fetched: its host does not exist, is not a public address, or is not one that the "
    "operator allowed (--allowed-media-domains). Send the {kind} as a data: URL instead."
)
MALFORMED = (
    "This is not a usable URL: write http(s)://host/path without user name, backslashes, spaces or control "
    "characters, or send the {kind} as a data: URL."
)
CONNECTION_FAILED = "The {kind} could not be downloaded: the connection to its host failed."
FORBIDDEN = re.compile(r"[\x00-\x20\x7f-\xa0\\\u2028\u2029\ufeff]|%00", re.IGNORECASE)
URL = re.compile(r"(https?)://([^/?#]+)([^?#]*)(\?[^#]*)?(?:#.*)?", re.IGNORECASE)
AUTHORITY = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9._-]+)(?::([0-9]{1,5}))?")
REDIRECTS = frozenset((301, 302, 303, 307, 308))
SAFE_IN_URL = "!#$%&'()*+,/:;=?@[]~"
MAX_ADDRESSES = 4  # of one host, tried in turn
READ_TIMEOUT_S = 10.0
FETCHES, FETCHES_PER_TENANT = 128, 16  # at a time: each holds a descriptor, and an answer in memory
MAX_SMALL_PIECES, SMALL_PIECE_BYTES = 1000, 64  # a body in one-byte chunks would occupy the event loop


@dataclass(frozen=True, slots=True)
class Target:
    """A URL in checked parts. `path` holds the query, percent-encoded."""

    scheme: str
    host: str
    port: int
    path: str

    @property
    def netloc(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == (443 if self.scheme == "https" else 80) else f"{host}:{self.port}"

    def __str__(self) -> str:
        return f"{self.scheme}://{self.netloc}{self.path}"


@dataclass(frozen=True, slots=True)
class Fetched:
    payload: bytes
    content_type: str | None


def parse_url(url: str, max_length: int) -> Target:
    """The only URL parser. What it does not understand is refused, never repaired."""
    if len(url) > max_length:
        raise Refusal("url", f"The URL is longer than {max_length} characters. Send the {{kind}} as a data: URL.")
    if FORBIDDEN.search(url):
        raise Refusal("url", MALFORMED)
    match = URL.fullmatch(url)
    if match is None:
        raise Refusal("url", MALFORMED)
    scheme = match[1].lower()
    authority = AUTHORITY.fullmatch(_ascii_authority(match[2]))
    if authority is None:
        raise Refusal("url", MALFORMED)
    port = int(authority[2]) if authority[2] else (443 if scheme == "https" else 80)
    host = canonical_host(authority[1].lower())
    if not host or not 0 < port < 65536:
        raise Refusal("url", MALFORMED)
    path = quote((match[3] or "/") + (match[4] or ""), safe=SAFE_IN_URL)
    return Target(scheme, host, port, path)


def _ascii_authority(text: str) -> str:
    """An international host name in its ASCII form."""
    if text.isascii():
        return text
    import idna

    host, colon, port = text.partition(":")
    try:
        return idna.encode(host, uts46=True).decode("ascii") + colon + port
    except idna.IDNAError:
        raise Refusal("url", MALFORMED) from None


class Fetcher:
    """Downloads one file at a time with a cap on bytes and one deadline over everything, redirects included."""

    def __init__(
        self,
        allowed: AllowedHosts,
        *,
        timeout_s: float,
        max_redirects: int,
        max_url_length: int,
        resolve: Resolver | None = None,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        self._allowed = allowed
        self._timeout_s = timeout_s
        self._max_redirects = max_redirects
        self._max_url_length = max_url_length
        self._turns = Turns(FETCHES, FETCHES_PER_TENANT)
        self._resolve = resolve or SystemResolver().addresses
        self._plain = transport or HeadTransport(False)
        self._tls = transport

    async def get(self, url: str, max_bytes: int, tenant: bytes = b"", take: Take = unbounded) -> Fetched:
        """Waiting for the tenant's turn does not count towards the deadline. `take` is told of every piece."""
        target = parse_url(url, self._max_url_length)
        try:
            async with self._turns.taken(tenant), asyncio.timeout(self._timeout_s):
                return await self._follow(target, max_bytes, tenant, take)
        except TimeoutError:
            raise Refusal("download", f"The {{kind}} could not be downloaded within {self._timeout_s:g} s.") from None
        except (httpx.HTTPError, httpx.InvalidURL, ssl.SSLError, OSError):
            raise Refusal("download", CONNECTION_FAILED) from None

    async def aclose(self) -> None:
        await self._plain.aclose()
        if self._tls is not None:
            await self._tls.aclose()

    async def _follow(self, target: Target, max_bytes: int, tenant: bytes, take: Take) -> Fetched:
        seen: set[str] = set()
        for _ in range(self._max_redirects + 1):
            if str(target) in seen:
                raise Refusal("download", "The {kind}'s URL redirects in a circle.")
            seen.add(str(target))
            async with self._open(target, tenant) as response:
                if response.status_code not in REDIRECTS:
                    return await self._read(response, max_bytes, take)
                target = self._next(target, response.headers.get("location", ""))
        raise Refusal("url", f"The {{kind}}'s URL redirects more than {self._max_redirects} times.")

    def _next(self, origin: Target, location: str) -> Target:
        target = parse_url(urljoin(str(origin), location), self._max_url_length)
        if origin.scheme == "https" and target.scheme == "http":
            raise Refusal("url", "The {kind}'s URL redirects from https to http, which is not followed.")
        return target

    @asynccontextmanager
    async def _open(self, target: Target, tenant: bytes) -> AsyncIterator[httpx.Response]:
        """Send the request to a checked address; the next address is tried only when no connection was made."""
        transport = await self._transport_for(target)
        addresses = await self._checked_addresses(target, tenant)
        for address in addresses:
            try:
                response = await transport.handle_async_request(_request(target, address))
            except (httpx.ConnectError, httpx.ConnectTimeout):
                continue
            try:
                yield response
            finally:
                await response.aclose()
            return
        raise Refusal("download", CONNECTION_FAILED)

    async def _transport_for(self, target: Target) -> httpx.AsyncBaseTransport:
        if target.scheme == "http":
            return self._plain
        if self._tls is None:
            context = await asyncio.to_thread(httpx.create_ssl_context, trust_env=False)
            self._tls = self._tls or HeadTransport(context)
        return self._tls

    async def _checked_addresses(self, target: Target, tenant: bytes) -> list[Address]:
        """Every address of the host, all of them allowed: one bad answer among good ones refuses the host."""
        if not self._allowed.admits(target.host, target.port):
            raise Refusal("url", REFUSED)
        try:
            addresses = [
                ipaddress.ip_address(text.partition("%")[0])
                for text in await self._resolve(target.host, target.port, tenant)
            ]
        except (OSError, UnicodeError, ValueError):
            addresses = []
        if not addresses or not all(self._allowed.admits_address(target.host, target.port, a) for a in addresses):
            raise Refusal("url", REFUSED)
        return addresses[:MAX_ADDRESSES]

    async def _read(self, response: httpx.Response, max_bytes: int, take: Take) -> Fetched:
        if response.status_code != 200:
            raise Refusal(
                "download",
                f"The {{kind}} could not be downloaded: its host answered with status {response.status_code}.",
            )
        if response.headers.get("content-encoding", "identity").strip().lower() != "identity":
            raise Refusal(
                "download", "The {kind} could not be downloaded: its host sent it compressed although asked not to."
            )
        too_large = Refusal("file_size", f"The {{kind}}'s file is larger than {size_text(max_bytes)}.")
        declared = response.headers.get("content-length", "")
        if declared.isascii() and declared.isdigit() and (len(declared) > 18 or int(declared) > max_bytes):
            raise too_large
        payload, pieces = bytearray(), 0
        async for piece in response.aiter_raw():
            take(len(piece))
            payload += piece
            pieces += 1
            if len(payload) > max_bytes:
                raise too_large
            if pieces > MAX_SMALL_PIECES and len(payload) < SMALL_PIECE_BYTES * pieces:
                raise Refusal("download", "The {kind} could not be downloaded: its host sends it in too small pieces.")
        return Fetched(bytes(payload), response.headers.get("content-type"))


def _request(target: Target, address: Address) -> httpx.Request:
    url = httpx.URL(scheme=target.scheme, host=str(address), port=target.port, raw_path=target.path.encode("ascii"))
    headers = {
        "Host": target.netloc,
        "User-Agent": f"sensorium/{__version__}",
        "Accept": "*/*",
        "Accept-Encoding": "identity",
        "Connection": "close",
    }
    timeout = httpx.Timeout(READ_TIMEOUT_S).as_dict()
    return httpx.Request(
        "GET", url, headers=headers, extensions={"timeout": timeout, "sni_hostname": target.host, "trace": HeadTrace()}
    )
