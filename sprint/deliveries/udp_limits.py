"""Whom the UDP side sends an unasked packet to, and how often: cookies, and the limits on challenges. Pure.

A cookie is a keyed BLAKE2 over the address, the subscription's token, how many proofs it has given and an expiry: the
server keeps nothing for it, nobody else can make one, it counts for one address, and once.

A challenge is the only packet that an unproven address gets. A host that has a TCP connection to us asks for itself; on
any other host's behalf there are few. Each subscription's are bounded, so that none can use up the share of all; and
all together are, so that challenges can't take the socket from records.
"""

from __future__ import annotations

import hmac
import struct
from hashlib import blake2b
from typing import TYPE_CHECKING, Final

from sprint.datagrams import COOKIE_SIZE
from sprint.tiers import NS_PER_S

if TYPE_CHECKING:
    from sprint.addresses import Address

COOKIE_LIFE_NS: Final = 10 * NS_PER_S
"""Many times a round trip, however slow the client."""
OWN_BURST: Final = 8
OWN_PER_S: Final = 5
"""Challenges of one subscription, wherever it says that it is: it needs one when it begins, and one for each move."""
STRANGER_BURST: Final = 4
STRANGER_PER_S: Final = 1
"""Challenges to a host other than the one that has the TCP connection: 36 bytes a second."""
TOTAL_BURST: Final = 20_000
TOTAL_PER_S: Final = 2_000
"""All challenges: every subscriber of a full house comes back at once, and then a hundredth of a core's time."""
MAX_STRANGERS: Final = 4_096
"""Hosts whose share is remembered; while there are more, new ones get nothing."""

_EXPIRY: Final = struct.Struct("<Q")
_SERIAL: Final = struct.Struct("<QH")
_MAC_SIZE: Final = COOKIE_SIZE - _EXPIRY.size


class Cookies:
    """Makes and checks cookies with one key, which lives as long as the process."""

    def __init__(self, key: bytes) -> None:
        """`key`: 16 to 64 bytes of chance."""
        self._key = key

    def bake(self, address: Address, token: bytes, serial: int, now_ns: int) -> bytes:
        """COOKIE_SIZE bytes for that subscription, after so many proofs, at that address."""
        expiry = _EXPIRY.pack(now_ns + COOKIE_LIFE_NS)
        return expiry + self._mac(address, token, serial, expiry)

    def check(self, cookie: bytes, address: Address, token: bytes, serial: int, now_ns: int) -> bool:
        """Whether it was baked for just that, and has not expired."""
        expiry = cookie[: _EXPIRY.size]
        genuine = hmac.compare_digest(cookie[_EXPIRY.size :], self._mac(address, token, serial, expiry))
        return genuine and now_ns <= int(_EXPIRY.unpack(expiry)[0])

    def _mac(self, address: Address, token: bytes, serial: int, expiry: bytes) -> bytes:
        covered = expiry + token + _SERIAL.pack(serial, address.port) + address.host.encode()
        return blake2b(covered, key=self._key, digest_size=_MAC_SIZE, person=b"sprint-udp").digest()


class Bucket:
    """A token bucket: `burst` at once, `per_second` on the average."""

    __slots__ = ("_burst", "_level", "_per_second", "_since_ns")

    def __init__(self, burst: int, per_second: float, now_ns: int) -> None:
        self._burst = burst
        self._per_second = per_second
        self._level = float(burst)
        self._since_ns = now_ns

    def take(self, now_ns: int) -> bool:
        """One more, if there is one left."""
        self._fill(now_ns)
        if self._level < 1:
            return False
        self._level -= 1
        return True

    def is_full(self, now_ns: int) -> bool:
        """Nothing of it is used: it may be forgotten."""
        self._fill(now_ns)
        return self._level >= self._burst

    def _fill(self, now_ns: int) -> None:
        grown = self._level + (now_ns - self._since_ns) * self._per_second / NS_PER_S
        self._level = min(float(self._burst), grown)
        self._since_ns = now_ns


class ChallengeLimits:
    """Whether one more challenge may be sent."""

    def __init__(self, now_ns: int) -> None:
        self._total = Bucket(TOTAL_BURST, TOTAL_PER_S, now_ns)
        self._strangers: dict[str, Bucket] = {}

    def allow(self, network: str, *, own: bool, now_ns: int) -> bool:
        """To that network, `own` if it is the one that the TCP connection comes from."""
        if not own and not self._stranger(network, now_ns).take(now_ns):
            return False
        return self._total.take(now_ns)

    def _stranger(self, network: str, now_ns: int) -> Bucket:
        bucket = self._strangers.pop(network, None)
        if bucket is None:
            self._forget(now_ns)
            full = len(self._strangers) >= MAX_STRANGERS
            bucket = Bucket(0 if full else STRANGER_BURST, STRANGER_PER_S, now_ns)
            if full:
                return bucket
        self._strangers[network] = bucket  # the last one used is the last
        return bucket

    def _forget(self, now_ns: int) -> None:
        """Those who haven't used theirs for long: they stand first."""
        while self._strangers:
            oldest = next(iter(self._strangers))
            if not self._strangers[oldest].is_full(now_ns):
                return
            del self._strangers[oldest]
