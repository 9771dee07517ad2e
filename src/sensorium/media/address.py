"""Which network addresses a client may make this server talk to: the public internet, and what the operator named."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

UNICAST = ipaddress.IPv6Network("2000::/3")
"""The only part of IPv6 that is given out. What lies outside and is no way of writing an IPv4 address is not public."""

TRANSPARENT = tuple(
    ipaddress.IPv6Network(text) for text in ("::ffff:0:0/96", "::ffff:0:0:0/96", "64:ff9b::/96", "::/96")
)
"""v4-mapped, v4-translated (SIIT), NAT64, v4-compatible: other spellings of the IPv4 address in the last 32 bits."""

NEVER_PUBLIC = tuple(
    ipaddress.ip_network(text)
    for text in (
        "0.0.0.0/8",
        "10.0.0.0/8",
        "100.64.0.0/10",
        "127.0.0.0/8",
        "169.254.0.0/16",
        "172.16.0.0/12",
        "192.0.0.0/24",
        "192.0.2.0/24",
        "192.88.99.0/24",
        "192.168.0.0/16",
        "198.18.0.0/15",
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/3",
        "168.63.129.16/32",  # the last is a cloud's metadata service on a public address
        "2001::/23",
        "2001:db8::/32",
        "2002::/16",
        "3fff::/20",
    )
)
"""Our own list beside `is_global`, which misses tunnels and some special blocks. 6to4 and Teredo: as a whole."""


def embedded(address: Address) -> Address:
    """The IPv4 address that the system would ask in its place, where this is another spelling of one."""
    if isinstance(address, ipaddress.IPv6Address) and int(address) > 1 and any(address in net for net in TRANSPARENT):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def tunnelled(address: Address) -> Address:
    """The IPv4 address at a tunnel's other end (6to4, Teredo, ISATAP, local NAT64); else what `embedded` says."""
    inner = embedded(address)
    if isinstance(inner, ipaddress.IPv4Address):
        return inner
    is_isatap = int(inner) >> 32 & 0xFDFFFFFF == 0x00005EFE
    if is_isatap or inner in ipaddress.IPv6Network("64:ff9b:1::/48"):
        return ipaddress.IPv4Address(int(inner) & 0xFFFFFFFF)
    return inner.sixtofour or (inner.teredo or (None, None))[1] or inner


def is_public(address: Address) -> bool:
    inner = embedded(address)
    if not inner.is_global or inner.is_multicast or tunnelled(inner) != inner:
        return False
    if inner.version == 6 and inner not in UNICAST:
        return False
    return not any(inner.version == net.version and inner in net for net in NEVER_PUBLIC)


def is_nameable(address: Address, host: str) -> bool:
    """May a host that the operator named have this address? Private and loopback yes; link-local (where clouds keep
    credentials) only if the operator wrote that very address; multicast and unspecified never."""
    inner = tunnelled(address)
    if inner.is_multicast or inner.is_unspecified:
        return False
    return not inner.is_link_local or host == str(address)


@dataclass(frozen=True, slots=True)
class AllowedHosts:
    """`--allowed-media-domains`: names, each with or without a port. Empty: every public host, ports 80 and 443."""

    entries: frozenset[tuple[str, int | None]] = frozenset()

    @classmethod
    def parse(cls, texts: tuple[str, ...]) -> AllowedHosts:
        """Raises ValueError for what is not a host or host:port."""
        return cls(frozenset(_parse_entry(text) for text in texts))

    def names(self, host: str, port: int) -> bool:
        return (host, None) in self.entries or (host, port) in self.entries

    def admits(self, host: str, port: int) -> bool:
        """Before any name is resolved: may this host and port be asked at all?"""
        return self.names(host, port) if self.entries else port in (80, 443)

    def admits_address(self, host: str, port: int, address: Address) -> bool:
        return is_nameable(address, host) if self.names(host, port) else is_public(address)


def _parse_entry(text: str) -> tuple[str, int | None]:
    try:
        return str(ipaddress.ip_address(text.strip("[]"))), None
    except ValueError:
        pass
    match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(?::(\d{1,5}))?", text)
    if match is None:
        raise ValueError(f"{text!r} is neither a host nor host:port")
    return canonical_host(match[1].lower()), int(match[2]) if match[2] else None


def canonical_host(host: str) -> str:
    """Lower-case ASCII host -> the one spelling that is compared: no root dot, IPv6 without brackets and compressed."""
    host = host.strip("[]").rstrip(".")
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host
