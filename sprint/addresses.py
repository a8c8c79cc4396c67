"""Host and port as operators write them: `host`, `host:port`, `[::1]:port`."""

from __future__ import annotations

import ipaddress
import re
from typing import NamedTuple


class Address(NamedTuple):
    """A host, by name or number, and a TCP or UDP port."""

    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


_PORT = re.compile("[0-9]{1,5}")

MAX_HOST_LENGTH = 253
"""RFC 1035: a domain name's length in text."""


def parse_address(text: str, default_port: int | None = None, *, lowest_port: int = 1) -> Address:
    """The address in `text`; a bare IPv6 address needs brackets to carry a port.

    Raises ValueError, which says what is wrong with it, for anything else.
    """
    text = text.strip()
    ipv6 = text.startswith("[") or text.count(":") > 1
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        if not bracket or (rest and not rest.startswith(":")):
            raise ValueError("expected [address]:port")
        port_text = rest[1:]
        if rest and not port_text:
            raise ValueError("a port is missing behind the colon")
    elif ipv6:
        host, port_text = text, ""
    else:
        host, colon, port_text = text.partition(":")
        if colon and not port_text:
            raise ValueError("a port is missing behind the colon")
    if not _is_host(host, ipv6=ipv6):
        raise ValueError("expected host:port or [IPv6 address]:port" if ipv6 else "expected host:port")
    if not port_text:
        if default_port is None:
            raise ValueError("a port is missing: expected host:port")
        return Address(host, default_port)
    if not _PORT.fullmatch(port_text) or not lowest_port <= int(port_text) <= 65_535:
        raise ValueError(f"port {port_text[:12]!a}: expected {lowest_port} to 65535")
    return Address(host, int(port_text))


def _is_host(host: str, *, ipv6: bool) -> bool:
    """Whether a resolver can be asked for it: it raises other errors than "not found" for text that is no name."""
    if not 0 < len(host) <= MAX_HOST_LENGTH or not host.isprintable() or any(letter in " /@,[]" for letter in host):
        return False
    try:
        if ipv6:
            ipaddress.IPv6Address(host)
        else:
            host.encode("idna")
    except ValueError:
        return False
    return True
