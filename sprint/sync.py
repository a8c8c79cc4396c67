"""Whom to ask for headers and when, whether our chain has caught up with an upstream, and an upstream with our chain.

Pure: events and `now_ns` in, Wants out. One peer at a time serves the first sync; once caught up, every peer is asked
after its handshake, which also tells it what we have: Bitcoin Core announces by header only to those it believes to
know the parent. A peer has one question open at a time; what comes up meanwhile is asked when the answer is there, or
when it is overdue. Only an urgent question, about a block we have no header of, goes out beside another open one.

Every question begins one block below our tip, as Core's own do: some nodes (bcoin) say nothing where there is nothing
to tell, and so a peer that shares our chain always has the tip to tell, which is also how it says that it has connected
it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sprint.events import Want
from sprint.tiers import NS_PER_MS, NS_PER_S

if TYPE_CHECKING:
    from sprint.chain import HeaderChain
    from sprint.events import HeaderRun, PeerGone, PeerReady, Source

UNANSWERED_NS = 5 * NS_PER_S
"""A question this old may be asked again, of another peer during the first sync."""
RETRY_NS = 5 * NS_PER_S
"""An upstream that is itself syncing is asked again after this."""
PEER_BEHIND_BLOCKS = 6
"""An upstream whose chain ends further below ours than this is still syncing: it can't tell us that we are current."""

FIRST_CHECK_NS = 5 * NS_PER_MS
LAST_CHECK_NS = 5 * NS_PER_S
CHECKS = 120
"""How often we ask whether an upstream has connected a block: with doubling pauses of up to 5 s, for ten minutes."""
MAX_CHECKS = 64
"""Blocks asked about at a time; the oldest make room, and are still validated together with a descendant."""


@dataclass(slots=True)
class _Peer:
    source: Source
    name: str
    height: int
    asked_ns: int | None = None
    urgent: bool = False
    """The open question is."""
    again: bool = False
    """Something came up since, to be asked in its turn."""
    disappointing: bool = False
    """Its answer didn't make us current, in this round of asking."""


@dataclass(slots=True)
class _Check:
    """A block that no upstream is known to have connected yet."""

    peer: str
    parent: bytes
    due_ns: int
    pause_ns: int = FIRST_CHECK_NS
    left: int = CHECKS


class HeaderSync:
    """The header conversation with all peers."""

    def __init__(self, chain: HeaderChain) -> None:
        self._chain = chain
        self._peers: dict[str, _Peer] = {}
        self._serving: str | None = None
        """The peer of the first sync."""
        self._retry_ns: int | None = None
        self._wants: list[Want] = []
        self._checks: dict[bytes, _Check] = {}
        self.caught_up = False

    def take_wants(self) -> list[Want]:
        """What to ask since the last call."""
        wants, self._wants = self._wants, []
        return wants

    def peer_ready(self, ready: PeerReady, now_ns: int) -> None:
        """A peer can be asked from now on."""
        peer = self._peers[ready.peer] = _Peer(ready.source, ready.peer, ready.height)
        if peer.height == self._chain.tip_height == 0 and self._chain.network.max_tip_age_s is None:
            self.caught_up = True  # a new regtest chain: neither of us has a block, and not every node answers that
            self._retry_ns = None
            return
        if self.caught_up:
            self.ask(ready.peer, now_ns)
        elif self._serving in {None, ready.peer} or self._retry_ns is not None:
            self._serve_from(ready.peer, now_ns)

    def peer_gone(self, gone: PeerGone, now_ns: int) -> None:
        """A peer can no longer be asked; another one takes the first sync over."""
        self._peers.pop(gone.peer, None)
        if self._serving == gone.peer:
            self._serving = None
            self._serve_from(next(iter(self._peers), None), now_ns)

    def ask(self, peer: str, now_ns: int, locator: tuple[bytes, ...] | None = None, *, urgent: bool = False) -> None:
        """Ask that peer for what follows `locator` (our chain's unless given); a peer that can't be asked means all."""
        asked = self._peers.get(peer)
        for one in [asked] if asked else list(self._peers.values()):
            is_open = one.asked_ns is not None and now_ns - one.asked_ns < UNANSWERED_NS
            if is_open and (one.urgent or not urgent):
                one.again = True
                continue
            one.asked_ns = now_ns
            one.urgent = urgent
            one.again = False
            self._want(one, locator)

    def answered(
        self, run: HeaderRun, *, grew: bool, refused: bool, last_height: int | None, now_ns: int, wall_s: int
    ) -> bool:
        """Take in an answer: whether our chain grew by it, whether any of it was refused, and the height that the last
        header accepted has on our chain.

        Returns True when by this answer our chain has caught up.
        """
        peer = self._peers.get(run.peer)
        if peer is None:
            return False
        again, peer.asked_ns, peer.again = peer.again, None, False
        if last_height is not None:
            peer.height = max(peer.height, last_height)
        if not run.complete and grew:
            self.ask(run.peer, now_ns)
            return False
        if again:
            self.ask(run.peer, now_ns)
        if self.caught_up:
            return False
        if run.complete and not refused and self._is_current(peer, wall_s):
            self.caught_up = True
            self._retry_ns = None
            for other in self._peers:
                if other != run.peer:
                    self.ask(other, now_ns)
            return True
        peer.disappointing = True
        hopeful = next((name for name, other in self._peers.items() if not other.disappointing), None)
        if hopeful is not None:
            self._serve_from(hopeful, now_ns)
        else:
            self._retry_ns = now_ns + RETRY_NS
        return False

    def follow(self, block_hash: bytes, peer: str, parent: bytes, now_ns: int) -> None:
        """Ask whether an upstream has connected that block, first the peer that announced it, until unfollow()."""
        self._checks[block_hash] = _Check(peer, parent, now_ns + FIRST_CHECK_NS)
        if len(self._checks) > MAX_CHECKS:
            del self._checks[next(iter(self._checks))]

    def unfollow(self, block_hash: bytes) -> None:
        """It needn't be asked about any longer."""
        self._checks.pop(block_hash, None)

    def deadline(self) -> int | None:
        """When on_timer has something to do."""
        times = [
            peer.asked_ns + UNANSWERED_NS
            for peer in self._peers.values()
            if peer.asked_ns is not None and (peer.again or (peer.name == self._serving and not self.caught_up))
        ]
        times += [check.due_ns for check in self._checks.values()]
        if self._retry_ns is not None:
            times.append(self._retry_ns)
        return min(times, default=None)

    def on_timer(self, now_ns: int) -> None:
        """Ask again what was not answered, or not to our satisfaction; of the next peer where there is one."""
        if (due := self.deadline()) is None or now_ns < due:
            return
        for block_hash, check in list(self._checks.items()):
            if now_ns >= check.due_ns:
                self._check(block_hash, check, now_ns)
        serving = self._peers.get(self._serving or "")
        silent = serving is not None and serving.asked_ns is not None and now_ns >= serving.asked_ns + UNANSWERED_NS
        retry = self._retry_ns is not None and now_ns >= self._retry_ns
        for peer in self._peers.values():
            if peer.again and peer.asked_ns is not None and now_ns >= peer.asked_ns + UNANSWERED_NS:
                self.ask(peer.name, now_ns)
        if self.caught_up or not (silent or retry):
            return
        self._retry_ns = None
        for peer in self._peers.values():
            peer.disappointing = False
        names = list(self._peers)
        after = names.index(self._serving) + 1 if self._serving in names else 0
        self._serve_from(names[after % len(names)] if names else None, now_ns)

    def _serve_from(self, peer: str | None, now_ns: int) -> None:
        self._serving = peer
        if peer is not None:
            self.ask(peer, now_ns)

    def _is_current(self, peer: _Peer, wall_s: int) -> bool:
        chain = self._chain
        network = chain.network
        if chain.tip_work < network.minimum_chain_work:
            return False
        if network.max_tip_age_s is not None and wall_s - chain.tip_time > network.max_tip_age_s:
            return False
        return chain.tip_height - PEER_BEHIND_BLOCKS <= peer.height <= chain.tip_height

    def _want(self, peer: _Peer, locator: tuple[bytes, ...] | None) -> None:
        if locator is None:
            chain = self._chain
            locator = tuple(chain.locator_from(chain.hash_at(max(0, chain.tip_height - 1))))
        self._wants.append(Want(peer.source, peer.name, locator))

    def _check(self, block_hash: bytes, check: _Check, now_ns: int) -> None:
        """Ask whether an upstream has connected the block: only then does it serve the header after the parent's."""
        check.left -= 1
        if not check.left or not self._chain.knows(check.parent):
            del self._checks[block_hash]
            return
        # From the grandparent, so that whoever has the parent has something to tell; and the whole way down, or a peer
        # that is on another branch would answer with all it has from genesis on.
        header = self._chain.header_of(check.parent) or b""
        start = header[4:36] if self._chain.knows(header[4:36]) else check.parent
        self.ask(check.peer, now_ns, tuple(self._chain.locator_from(start)))
        check.pause_ns = min(2 * check.pause_ns, LAST_CHECK_NS)
        check.due_ns = now_ns + check.pause_ns
