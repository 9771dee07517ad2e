"""Which network addresses a client may make this server talk to: the public internet, and what the operator named."""

from __future__ import annotations

import ipaddress
import re
from dataclasses import dataclass

Address = ipaddress.IPv4Address | ipaddress.IPv6Address

NAT64 = ipaddress.IPv6Network("64:ff9b::/96")
V4_COMPATIBLE = ipaddress.IPv6Network("::/96")
NEVER_PUBLIC = tuple(ipaddress.ip_network(text) for text in (
    "0.0.0.0/8", "10.0.0.0/8", "100.64.0.0/10", "127.0.0.0/8", "169.254.0.0/16", "172.16.0.0/12", "192.0.0.0/24",
    "192.0.2.0/24", "192.88.99.0/24", "192.168.0.0/16", "198.18.0.0/15", "198.51.100.0/24", "203.0.113.0/24",
    "224.0.0.0/3", "168.63.129.16/32",  # the last is a cloud's metadata service on a public address
    "64:ff9b:1::/48", "100::/64", "2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20", "5f00::/16",
    "fc00::/7", "fe80::/10", "fec0::/10", "ff00::/8",
))
"""Our own list beside `is_global`, which misses tunnels and some special blocks. 6to4 and Teredo: as a whole."""


def embedded(address: Address) -> Address:
    """The IPv4 address inside a v4-mapped, v4-compatible or NAT64 one; else the address itself."""
    if isinstance(address, ipaddress.IPv4Address):
        return address
    if address.ipv4_mapped is not None:
        return address.ipv4_mapped
    if address in NAT64 or (address in V4_COMPATIBLE and int(address) > 1):
        return ipaddress.IPv4Address(int(address) & 0xFFFFFFFF)
    return address


def is_public(address: Address) -> bool:
    inner = embedded(address)
    if not inner.is_global or inner.is_multicast:
        return False
    is_isatap = inner.version == 6 and int(inner) >> 32 & 0xFDFFFFFF == 0x00005EFE  # another tunnel to an IPv4 address
    return not is_isatap and not any(inner.version == net.version and inner in net for net in NEVER_PUBLIC)


def is_nameable(address: Address, host: str) -> bool:
    """May a host that the operator named have this address? Private and loopback yes; link-local (where clouds keep
    credentials) only if the operator wrote that very address; multicast and unspecified never."""
    inner = embedded(address)
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
