"""Keeps web pages of other sites away from a server on this machine, but for those that the operator names.

A page that a browser loaded elsewhere can send simple requests here, and with DNS rebinding even read the answers;
neither works if the Host must be ours and a foreign Origin is refused.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Sequence

from sensorium.api.transport.asgi import Call, Header
from sensorium.errors import ForbiddenError, RequestError

_HOST = re.compile(r"(?P<name>[A-Za-z0-9._\-]{1,253}|\[[0-9A-Fa-f:.]{2,45}\])(?::\d{1,5})?")
_LOCAL_NAMES = frozenset({"localhost", "127.0.0.1", "[::1]"})


def is_loopback(host: str) -> bool:
    """Is the server bound to this machine only?"""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class OriginCheck:
    """`local_only`: bound to loopback and no key protects it, so only loopback names are right in Host. No browser
    reaches a Unix socket, and the proxy before one may keep its own name there."""

    def __init__(self, host: str, *, has_keys: bool, is_unix: bool = False, allowed: Sequence[str] = ()) -> None:
        """`allowed` are origins of pages that may call the server, "*" for any; several may stand in one, separated by
        commas."""
        self._allowed = frozenset(one for text in allowed for one in text.split(","))
        self._local_only = is_loopback(host) and not has_keys and not is_unix
        self._names = _LOCAL_NAMES | {f"[{host}]" if ":" in host else host}

    def check(self, call: Call) -> None:
        host = self._host(call)
        if host is not None and self._local_only and _name(host) not in self._names:
            raise ForbiddenError(
                "This server listens on this machine only and does not answer to the name in Host. "
                "Set --api-key or --host if it is meant to be reached under that name.",
                code="host_not_allowed",
            )
        if self._is_allowed(call):
            return
        if call.method not in ("GET", "HEAD") and not _same_origin(call, host or ""):
            raise ForbiddenError(
                "Requests from web pages of other origins are refused; the operator can let one in with "
                "--allowed-origins.",
                code="origin_not_allowed",
            )

    def _is_allowed(self, call: Call) -> bool:
        """Is it a request of a page that the operator named?"""
        origins = call.headers(b"origin")
        if len(origins) != 1:
            return False
        return "*" in self._allowed or origins[0].decode("latin-1").lower() in self._allowed

    def headers(self, call: Call) -> list[Header]:
        """What lets such a page read the answer; nothing for others. Caches keep answers to different pages apart."""
        if not self._allowed:
            return []
        vary = (b"vary", b"Origin")
        if not self._is_allowed(call):
            return [vary]
        return [
            vary,
            (b"access-control-allow-origin", call.headers(b"origin")[0]),
            (b"access-control-expose-headers", b"x-request-id, retry-after, metadata"),
        ]

    def preflight(self, call: Call) -> list[Header] | None:
        """The answer to a browser that asks what such a page may send; None if it is no such question."""
        if call.method != "OPTIONS" or not call.headers(b"access-control-request-method"):
            return None
        if not self._is_allowed(call):
            return None
        asked = call.header(b"access-control-request-headers")
        return [
            (b"access-control-allow-methods", b"GET, HEAD, POST, DELETE"),
            *([(b"access-control-allow-headers", asked)] if asked else []),
            *(
                [(b"access-control-allow-private-network", b"true")]
                if call.headers(b"access-control-request-private-network")
                else []
            ),
            (b"access-control-max-age", b"600"),
        ]

    def _host(self, call: Call) -> str | None:
        """The one well-formed Host; None where HTTP/1.0 may leave it out."""
        values = call.headers(b"host")
        if not values and call.scope.get("http_version") == "1.0" and not self._local_only:
            return None
        host = values[0].decode("latin-1") if len(values) == 1 else ""
        if not _HOST.fullmatch(host):
            raise RequestError("Exactly one Host header with a plain host name is needed.", code="invalid_host")
        return host.lower()


def _name(host: str) -> str:
    match = _HOST.fullmatch(host)
    return match["name"] if match else ""


def _same_origin(call: Call, host: str) -> bool:
    site = call.headers(b"sec-fetch-site")
    if site and site[0] not in (b"same-origin", b"none"):
        return False
    origins = call.headers(b"origin")
    if not origins or site:
        return True
    _, separator, origin = origins[0].decode("latin-1").lower().partition("://")
    # A page cannot forge X-Forwarded-Host on a request that needs no preflight, so a proxy's word is good enough.
    forwarded = (call.header(b"x-forwarded-host") or b"").decode("latin-1").lower()
    return bool(separator) and len(origins) == 1 and origin in (host, forwarded)
