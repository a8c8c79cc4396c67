"""Who gets records by UDP: every subscription from its wish to its end. Pure: values and `now` in, actions out.

    WANTED ── echo of a cookie, from the address it was sent to ──► ACTIVE ── no keep-alive for LEASE_NS ──► WANTED
                                                                      │       or it says that it hears nothing
    an ACTIVE one whose keep-alive comes from elsewhere is challenged there, and moves with the echo from there

The token names a subscription and comes over TCP; the cookie proves an address and comes by UDP; an echo has both. So
nobody can have records sent to an address at which he doesn't receive, and nobody who merely receives something gets a
subscription. A WANTED one stays as long as its session: it is challenged when it is made, and whenever it asks by a
keep-alive.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING, Final

from sprint.datagrams import Challenge, Echo
from sprint.deliveries.udp_limits import OWN_BURST, OWN_PER_S, Bucket, ChallengeLimits, Cookies
from sprint.frames import UdpReason
from sprint.tiers import NS_PER_MS, NS_PER_S, Tier

if TYPE_CHECKING:
    from collections.abc import Callable

    from sprint.addresses import Address
    from sprint.datagrams import KeepAlive

LEASE_NS: Final = 35 * NS_PER_S
"""Three and a half keep-alives of sprint.client's."""
PROOF_TIMEOUT_NS: Final = 5 * NS_PER_S
"""Without a proof by then the subscriber is told that none came."""
CHALLENGE_GAP_NS: Final = 200 * NS_PER_MS
"""Between two challenges of one subscription to the same address."""
MAX_ACTIVE: Final = 65_536
"""What the fan-out's table holds."""
MAX_ACTIVE_PER_NETWORK: Final = 16_384
"""Behind one address: as many as its ports can hold with room for others."""


class State(Enum):
    """Where a subscription stands."""

    WANTED = "wanted"
    ACTIVE = "active"


@dataclass(slots=True, eq=False)
class Lease:
    """One subscription."""

    token: bytes
    tier: Tier
    owner: int
    """Which stream worker has its session."""
    address: Address
    """Where it says that it is, or, once ACTIVE, has proven to be."""
    peer: str
    """The network that its TCP connection comes from."""
    state: State
    heard_ns: int
    """Last keep-alive or proof; while WANTED, since when."""
    share: Bucket
    """Of challenges."""
    serial: int = 0
    """How many proofs it has given."""
    challenged: Address | None = None
    challenged_ns: int = 0
    told: bool = False
    """That no proof came."""
    slot: int | None = None
    """Its place in the fan-out's table, kept by whoever owns that."""


@dataclass(frozen=True, slots=True)
class SendChallenge:
    """Send these bytes to that address."""

    lease: Lease
    address: Address
    data: bytes


@dataclass(frozen=True, slots=True)
class Activated:
    """From now on records go to the lease's address."""

    lease: Lease


@dataclass(frozen=True, slots=True)
class Deactivated:
    """From now on they don't; `told_owner` False: its session is over too."""

    lease: Lease
    reason: UdpReason


@dataclass(frozen=True, slots=True)
class NotProven:
    """The subscriber is to be told why it isn't active; nothing else has changed."""

    lease: Lease
    reason: UdpReason


Action = SendChallenge | Activated | Deactivated | NotProven


class Leases:
    """All subscriptions by token. What it refuses, it counts."""

    def __init__(
        self,
        session: int,
        key: bytes,
        network_of: Callable[[str], str],
        now_ns: int,
        *,
        max_active: int = MAX_ACTIVE,
        max_active_per_network: int = MAX_ACTIVE_PER_NETWORK,
    ) -> None:
        """`key`: what cookies are made with. `network_of`: what one holder of addresses is counted by."""
        self.unknown = 0
        """Datagrams with a token that nobody has."""
        self.refused = 0
        """Echoes whose cookie was forged, used before, too old, or for another address or subscription."""
        self.suppressed = 0
        """Challenges that would have been too many."""
        self.full = 0
        """Proofs that came to nothing because there are too many subscribers."""
        self.active: dict[Address, Lease] = {}
        """By proven address, in no order."""
        self._session = session
        self._cookies = Cookies(key)
        self._limits = ChallengeLimits(now_ns)
        self._network_of = network_of
        self._max_active = max_active
        self._max_per_network = max_active_per_network
        self._leases: dict[bytes, Lease] = {}
        self._heard: dict[bytes, Lease] = {}  # the ACTIVE ones, the longest silent first
        self._unproven: dict[bytes, Lease] = {}  # the WANTED ones that haven't been told yet, the oldest first
        self._by_network: dict[str, int] = {}

    def __len__(self) -> int:
        return len(self._leases)

    def want(self, token: bytes, tier: Tier, owner: int, address: Address, peer: str, now_ns: int) -> list[Action]:
        """A session wants records at that address; the same wish again changes nothing."""
        if token in self._leases:
            return []
        share = Bucket(OWN_BURST, OWN_PER_S, now_ns)
        lease = Lease(token, tier, owner, address, self._network_of(peer), State.WANTED, now_ns, share)
        self._leases[token] = self._unproven[token] = lease
        return self._challenge(lease, address, now_ns)

    def end(self, token: bytes) -> list[Action]:
        """Its session is over."""
        lease = self._leases.pop(token, None)
        if lease is None:
            return []
        self._unproven.pop(token, None)
        return self._stop(lease, UdpReason.NONE)

    def give_up(self, token: bytes) -> list[Action]:
        """Its subscriber hears nothing: it is as good as unproven again."""
        lease = self._leases.get(token)
        return [] if lease is None else self._stop(lease, UdpReason.UNHEARD)

    def end_all_of(self, owner: int) -> list[Action]:
        """A stream worker has begun anew: its sessions are gone."""
        tokens = [token for token, lease in self._leases.items() if lease.owner == owner]
        return [action for token in tokens for action in self.end(token)]

    def keep_alive(self, said: KeepAlive, source: Address, now_ns: int) -> list[Action]:
        """A subscription is alive, at that address."""
        lease = self._leases.get(said.token)
        if lease is None:
            self.unknown += 1
            return []
        if lease.state is State.ACTIVE and lease.address == source:
            self._hear(lease, now_ns)
            return []
        return self._challenge(lease, source, now_ns)

    def echo(self, said: Echo, source: Address, now_ns: int) -> list[Action]:
        """Somebody shows a cookie at that address."""
        lease = self._leases.get(said.token)
        if lease is None:
            self.unknown += 1
            return []
        if not self._cookies.check(said.cookie, source, lease.token, lease.serial, now_ns):
            self.refused += 1
            return []
        lease.serial += 1  # this cookie, and every other one that is on its way, has had its time
        actions: list[Action] = []
        other = self.active.get(source)
        if other is not None and other is not lease:
            actions += self._stop(other, UdpReason.REPLACED)
        moved = lease.state is State.ACTIVE
        if not self._has_room(source, lease if moved else None):
            self.full += 1
            return [*actions, NotProven(lease, UdpReason.FULL)]
        if moved:
            actions += self._stop(lease, UdpReason.NONE)
        self._start(lease, source, now_ns)
        return [*actions, Activated(lease)]

    def unreachable(self, lease: Lease) -> list[Action]:
        """This host can't send there."""
        if lease.state is State.ACTIVE:
            return self._stop(lease, UdpReason.UNREACHABLE)
        return [NotProven(lease, UdpReason.UNREACHABLE)]

    def on_timer(self, now_ns: int) -> list[Action]:
        """What has become of those who said nothing. To be called about once a second."""
        actions: list[Action] = []
        while self._heard:
            lease = next(iter(self._heard.values()))
            if now_ns - lease.heard_ns < LEASE_NS:
                break
            actions += self._stop(lease, UdpReason.LAPSED)
        while self._unproven:
            lease = next(iter(self._unproven.values()))
            if now_ns - lease.heard_ns < PROOF_TIMEOUT_NS:
                break
            del self._unproven[lease.token]
            actions.append(NotProven(lease, UdpReason.UNPROVEN))
        return actions

    def _challenge(self, lease: Lease, address: Address, now_ns: int) -> list[Action]:
        if lease.challenged == address and now_ns - lease.challenged_ns < CHALLENGE_GAP_NS:
            return []
        network = self._network_of(address.host)
        allowed = lease.share.take(now_ns) and self._limits.allow(network, own=network == lease.peer, now_ns=now_ns)
        if not allowed:
            self.suppressed += 1
            return []
        lease.challenged, lease.challenged_ns = address, now_ns
        cookie = self._cookies.bake(address, lease.token, lease.serial, now_ns)
        return [SendChallenge(lease, address, Challenge(self._session, cookie).encode())]

    def _has_room(self, address: Address, leaving: Lease | None) -> bool:
        here = self._by_network.get(self._network_of(address.host), 0)
        if leaving is not None and self._network_of(leaving.address.host) == self._network_of(address.host):
            here -= 1
        return len(self.active) - (leaving is not None) < self._max_active and here < self._max_per_network

    def _start(self, lease: Lease, address: Address, now_ns: int) -> None:
        lease.address, lease.state = address, State.ACTIVE
        self.active[address] = lease
        network = self._network_of(address.host)
        self._by_network[network] = self._by_network.get(network, 0) + 1
        self._unproven.pop(lease.token, None)
        self._hear(lease, now_ns)

    def _hear(self, lease: Lease, now_ns: int) -> None:
        lease.heard_ns = now_ns
        self._heard.pop(lease.token, None)
        self._heard[lease.token] = lease

    def _stop(self, lease: Lease, reason: UdpReason) -> list[Action]:
        if lease.state is not State.ACTIVE:
            return []
        lease.state, lease.challenged = State.WANTED, None
        self._heard.pop(lease.token, None)
        if self.active.get(lease.address) is lease:
            del self.active[lease.address]
        network = self._network_of(lease.address.host)
        left = self._by_network[network] - 1
        if left:
            self._by_network[network] = left
        else:
            del self._by_network[network]
        return [Deactivated(lease, reason)]
