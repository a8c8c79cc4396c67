"""The stream's greeting: the subscriber's one JSON line in, the server's one JSON line out.

Pure. The line comes from anybody who can reach the port, so every value is bounded and every refusal is a fixed text or
quotes what the client itself said. Keys that aren't known are refused, so that a misspelt `since` can't pass as absent.
"""

from __future__ import annotations

import ipaddress
import json
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from sprint.addresses import Address, parse_address
from sprint.durations import format_duration
from sprint.frames import Format, json_line

if TYPE_CHECKING:
    from sprint.tiers import Tier

MAX_HELLO: Final = 4096
"""Bytes of the hello line with its newline: a key and three short values, many times over."""
MAX_KEY: Final = 256
"""Characters of a subscriber's key."""
MAX_SEQUENCE: Final = (1 << 64) - 1
MAX_UDP: Final = 64
"""Characters: an IPv6 address in brackets and a port have 47 at most."""

UDP_NOT_SERVED: Final = "udp is not served here: subscribe without it"
NOT_ACCEPTED: Final = "not accepted"
"""The one answer to any key that gives no tier: it must not tell whether the key exists, has ended or is misspelt."""
FULL: Final = "too many subscribers"
TOO_LONG: Final = f"hello longer than {MAX_HELLO} bytes"
TOO_SLOW: Final = "no hello in time"
HUNG_UP: Final = "hung up"

_KEYS: Final = ("key", "since", "format", "udp")
_BROADCAST: Final = ipaddress.IPv4Address("255.255.255.255")
_FORMATS: Final = {form.label: form for form in Format}


@dataclass(frozen=True, slots=True)
class Hello:
    """What a subscriber asks for; an empty object asks for the defaults."""

    key: str | None = field(default=None, repr=False)  # whatever shows a hello shows no key
    since: int | None = None
    """The first sequence wanted; None: from the next record on."""
    format: Format = Format.BINARY
    udp: Address | None = None
    """Where records are wanted by UDP, its host a number; an empty host: the address that the connection comes from."""


@dataclass(frozen=True, slots=True)
class UdpOffer:
    """What a subscriber needs for its records to come by UDP."""

    address: Address
    """Where the server sends from, and is to be answered."""
    token: bytes
    """Names the subscription in datagrams."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why there will be no stream, in words for the client."""

    error: str
    retry: bool = False
    """The same hello may be accepted later."""
    delay_ns: int = 0
    """How long to wait before saying so."""
    undecided: bool = False
    """After that delay the hello is to be judged again, and this said only when there is no time left."""


def read_hello(line: bytes) -> Hello | Refusal:
    """What the line says, with or without its newline. A value of null is as good as absent."""
    if len(line) > MAX_HELLO:
        return Refusal(TOO_LONG)
    try:
        asked = json.loads(line.decode())
    except (ValueError, RecursionError):  # bad UTF-8, bad JSON, or brackets nested without end
        return Refusal("hello is not JSON: expected one line with an object")
    if not isinstance(asked, dict):
        return Refusal('hello is not an object: expected one line such as {"format":"json"}')
    unknown = next((name for name in asked if name not in _KEYS), None)
    if unknown is not None:
        return Refusal(f"unknown key {unknown[:32]!r}: expected {', '.join(_KEYS)}")
    key, since, form, udp = (asked.get(name) for name in _KEYS)
    where = None if udp is None else read_udp(udp)
    if isinstance(where, Refusal):
        return where
    if key is not None and not (isinstance(key, str) and _is_key(key)):
        return Refusal(f"key: expected 1 to {MAX_KEY} printable ASCII characters")
    if since is not None and not (type(since) is int and 1 <= since <= MAX_SEQUENCE):  # True is an int to isinstance
        return Refusal("since: expected a sequence number of 1 or more")
    if form is None:
        return Hello(key, since, udp=where)
    if not (isinstance(form, str) and form in _FORMATS):
        return Refusal(f"format: expected {' or '.join(_FORMATS)}")
    return Hello(key, since, _FORMATS[form], where)


def read_udp(wanted: object) -> Address | Refusal:
    """The address in `host:port`, or in `:port`, which is the peer's own; nothing is resolved."""
    bad = Refusal("udp: expected :port, or host:port with one host's numeric address")
    if not isinstance(wanted, str) or len(wanted) > MAX_UDP:
        return bad
    try:
        if wanted.startswith(":"):
            return Address("", parse_address(f"0.0.0.0{wanted}").port)
        host, port = parse_address(wanted)
        number = ipaddress.ip_address(host)
    except ValueError:
        return bad
    if isinstance(number, ipaddress.IPv6Address):
        if number.scope_id is not None:
            return bad
        number = number.ipv4_mapped or number
    if number.is_multicast or number.is_unspecified or number == _BROADCAST:
        return bad
    return Address(str(number), port)


def _is_key(text: str) -> bool:
    return 0 < len(text) <= MAX_KEY and text.isascii() and text.isprintable()


def welcome_line(
    tier: Tier,
    write_deadline_ns: int,
    *,
    oldest: int,
    next_sequence: int,
    session: int,
    network: str,
    form: Format,
    udp: UdpOffer | None = None,
) -> bytes:
    """The answer that opens a stream.

    `oldest` is the oldest sequence that `since` can reach, `next_sequence` the first one that is not a replay.
    """
    answer: dict[str, object] = {
        "tier": tier.label,
        "writeDeadline": format_duration(write_deadline_ns),
        "oldest": oldest,
        "next": next_sequence,
        "session": f"{session:016x}",
        "network": network,
        "format": form.label,
    }
    if udp is not None:
        answer["udp"] = {"address": str(udp.address), "token": udp.token.hex()}
    return json_line(answer)


def refusal_line(refusal: Refusal) -> bytes:
    """The answer before the connection is closed."""
    answer: dict[str, object] = {"error": refusal.error}
    if refusal.retry:
        answer["retry"] = True
    return json_line(answer)
