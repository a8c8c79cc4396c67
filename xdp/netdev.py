"""What a driver says it can do with XDP: the kernel's `netdev` family of generic netlink (Linux 6.3).

Reads only; needs no privilege, and touches no interface. One socket for each question, of the calling thread's network
namespace; no pyroute2, so it may be asked within a running event loop. Numbers are those of linux/genetlink.h and
linux/netdev.h (Documentation/netlink/specs/netdev.yaml).
"""

from __future__ import annotations

import errno
import os
import socket
import struct
from enum import IntFlag
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

SINCE = (6, 3)
"""The kernel that got the family."""

_HEADER, _GENERIC, _ATTRIBUTE = struct.Struct("=IHHII"), struct.Struct("=BBH"), struct.Struct("=HH")
_NETLINK_GENERIC, _NLM_F_REQUEST, _NLMSG_ERROR = 16, 1, 2
_CONTROL, _GET_FAMILY, _FAMILY_ID, _FAMILY_NAME = 16, 3, 1, 2
_DEV_GET, _DEV_IFINDEX, _DEV_XDP_FEATURES = 1, 1, 3
_TYPE_MASK = 0x3FFF  # NLA_TYPE_MASK: two flags stand above the type
_ANSWER_BYTES = 1 << 15
_MAX_ERRNO = 4095
_TIMEOUT_S = 1.0


class XdpFeature(IntFlag):
    """NETDEV_XDP_ACT_…: what the driver does natively, as it is set up at the moment."""

    BASIC = 1
    """Programs may pass, drop, abort and send back."""
    REDIRECT = 2
    NDO_XMIT = 4
    """Others' programs may redirect frames to it (DEVMAP, live frames). veth: only while its peer takes them."""
    XSK_ZEROCOPY = 8
    HW_OFFLOAD = 16
    RX_SG = 32
    """Frames of several pages, for programs that know of them (xdp.frags)."""
    NDO_XMIT_SG = 64


def xdp_features(index: int) -> XdpFeature | None:
    """Of the interface of that index; None on a kernel that doesn't tell (before 6.3), and of what has no entry.

    Raises OSError: ENODEV when there is no such interface, ETIMEDOUT, and what else the kernel refuses with.
    """
    with socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_CLOEXEC, _NETLINK_GENERIC) as asking:
        asking.settimeout(_TIMEOUT_S)
        asking.bind((0, 0))
        try:
            answer = _ask(asking, _CONTROL, _GET_FAMILY, _FAMILY_NAME, b"netdev\0")
        except FileNotFoundError:
            return None
        family = answer.get(_FAMILY_ID, b"")
        if len(family) < 2:
            return None
        answer = _ask(asking, struct.unpack_from("=H", family)[0], _DEV_GET, _DEV_IFINDEX, struct.pack("=I", index))
    told = answer.get(_DEV_XDP_FEATURES, b"")
    return XdpFeature(struct.unpack("=Q", told)[0]) if len(told) == 8 else None


def _ask(asking: socket.socket, family: int, command: int, attribute: int, value: bytes) -> dict[int, bytes]:
    """The attributes of the answer to a question with one attribute."""
    body = _GENERIC.pack(command, 1, 0) + _ATTRIBUTE.pack(_ATTRIBUTE.size + len(value), attribute)
    body += value + bytes(-len(value) % 4)
    asking.send(_HEADER.pack(_HEADER.size + len(body), family, _NLM_F_REQUEST, 1, 0) + body)
    try:
        datagram = asking.recv(_ANSWER_BYTES)
    except TimeoutError:
        raise OSError(errno.ETIMEDOUT, f"generic netlink: no answer within {_TIMEOUT_S:g} s") from None
    return answer_attributes(datagram)


def answer_attributes(datagram: bytes) -> dict[int, bytes]:
    """The attributes of a generic netlink answer by type; none of what is cut short. Raises OSError if it is an error.

    Of a type that comes twice, the last.
    """
    if len(datagram) < _HEADER.size + _GENERIC.size:
        return {}
    length, kind, *_ = _HEADER.unpack_from(datagram)
    if kind == _NLMSG_ERROR:
        (code,) = struct.unpack_from("=i", datagram, _HEADER.size)
        if not -_MAX_ERRNO <= code < 0:
            return {}
        raise OSError(-code, f"generic netlink: {os.strerror(-code)}")
    return dict(_attributes(datagram, _HEADER.size + _GENERIC.size, min(length, len(datagram))))


def _attributes(datagram: bytes, at: int, end: int) -> Iterator[tuple[int, bytes]]:
    while at + _ATTRIBUTE.size <= end:
        length, kind = _ATTRIBUTE.unpack_from(datagram, at)
        if length < _ATTRIBUTE.size or at + length > end:
            return
        yield kind & _TYPE_MASK, datagram[at + _ATTRIBUTE.size : at + length]
        at += (length + 3) & -4
