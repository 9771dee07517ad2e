"""Who may ask. Default deny: with keys configured, every path but a literal few needs one, whatever routes there are.

Keys are compared as SHA-256 digests, all of them every time, so that timing tells nothing about them.
"""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable

from sensorium.api.playground import PAGES
from sensorium.api.transport.asgi import Call
from sensorium.errors import AuthenticationError, ForbiddenError

PUBLIC_PATHS = frozenset({"/livez", "/readyz", "/health", "/ping", *PAGES})
"""Reachable without a key: the process's health and the static page, which knows nothing."""


class Keys:
    """The configured API keys; without any, everybody is let in. An operator's key is a key for everything."""

    def __init__(self, keys: Iterable[str], operators: Iterable[str] = (), *, is_local: bool = True) -> None:
        """`is_local`: only this machine can reach the server."""
        users = _digests(keys)
        self._operators = _digests(operators)
        self._digests = (*users, *self._operators) if users else ()
        self._is_local = is_local

    def __bool__(self) -> bool:
        return bool(self._digests)

    def match(self, key: bytes) -> bytes:
        """The digest of the configured key that this is, else b"". Looks at all keys, found or not."""
        return _match(key, self._digests)

    def check_operator(self, call: Call) -> None:
        """ForbiddenError unless the call may change what is served: by an operator's key or, where no keys are
        configured at all, from this machine."""
        if self._operators:
            if not _match(_key_of(call), self._operators):
                raise ForbiddenError("This is for an operator's key (--operator-key).")
        elif self._digests or not self._is_local:
            raise ForbiddenError("This is for an operator's key, and the server has none: --operator-key sets one.")

    def authenticate(self, call: Call) -> None:
        """Set `call.tenant`, or raise. Reads the path that routing reads, never a URL rebuilt from headers."""
        if not self._digests or _is_public(call):
            return
        tenant = self.match(_key_of(call))
        if not tenant:
            raise AuthenticationError("The API key is wrong.")
        call.tenant = tenant


def _digests(keys: Iterable[str]) -> tuple[bytes, ...]:
    return tuple(hashlib.sha256(key.encode()).digest() for key in keys)


def _match(key: bytes, digests: Iterable[bytes]) -> bytes:
    given = hashlib.sha256(key).digest()
    found = b""
    for digest in digests:
        if hmac.compare_digest(digest, given):
            found = digest
    return found


def _is_public(call: Call) -> bool:
    """Pages are for reading: what is sent to their paths needs a key."""
    return call.path in PUBLIC_PATHS and (call.path not in PAGES or call.method in ("GET", "HEAD"))


def _key_of(call: Call) -> bytes:
    """The key that a call brings: as OpenAI's clients send it, else as Anthropic's do. b"" if it is none."""
    values = call.headers(b"authorization")
    others = call.headers(b"x-api-key")
    if len(values) > 1 or len(others) > 1:
        raise AuthenticationError("There is more than one API key: send one Authorization or X-Api-Key header.")
    if not values and not others:
        raise AuthenticationError(
            "An API key is required: send it as `Authorization: Bearer KEY`.", code="missing_api_key"
        )
    if not values:
        return others[0].strip()
    scheme, _, key = values[0].partition(b" ")
    return key.strip() if scheme.lower() == b"bearer" else b""


class CacheSalts:
    """Separates what tenants can learn from cache hits: one salt per key, unguessable, new with every start."""

    def __init__(self, secret: bytes, *, shared: bool) -> None:
        self._secret = secret
        self._shared = shared

    def of(self, tenant: bytes, cache_salt: str | None = None) -> bytes:
        """The salt of a request: its key's, divided further by the `cache_salt` that the request may bring."""
        if self._shared:
            tenant = b""
        if not tenant and not cache_salt:
            return b""
        own = (cache_salt or "").encode()
        return hmac.digest(self._secret, len(tenant).to_bytes(1, "big") + tenant + own, "sha256")
