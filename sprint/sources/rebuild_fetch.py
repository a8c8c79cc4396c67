"""Fetches whole blocks over connections of its own: not for the relay's process, which must never wait for 4 MB.

BlockRequests decides whom to ask for what, and is pure. BlockFetcher keeps the connections: those of source p2p, except
that these peers are never asked to push anything, and that of all they say only blocks are read.
"""

from __future__ import annotations

import time
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar, Final, NamedTuple

from sprint.bitcoin.connection import USER_AGENT
from sprint.bitcoin.messages import MSG_WITNESS_BLOCK, GetData
from sprint.bitcoin.peer_events import BlockReceived, ConnectionEvent, HandshakeCompleted, LatencyMeasured, NotFound
from sprint.events import PeerGone, PeerReady
from sprint.sources.p2p import P2PSource
from sprint.sources.upstream import Upstream
from sprint.status import StatusBlock
from sprint.tiers import NS_PER_S

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sprint.addresses import Address
    from sprint.bitcoin.networks import Network
    from sprint.sources import Heard

MAX_WANTED: Final = 8
"""Blocks fetched at a time; of a longer catch-up the newest."""
ANSWER_NS: Final = 5 * NS_PER_S
"""4 MB at 1 MB/s, and a node that is still connecting the block; then the next peer is asked."""
GIVE_UP_NS: Final = 120 * NS_PER_S


@dataclass(slots=True)
class _Wanted:
    announcer: str
    until_ns: int
    peer: str = ""
    """Whom the open question is put to; empty: there is none."""
    due_ns: int = 0
    asked: set[str] = field(default_factory=set)
    """In this round."""


class BlockRequests:
    """Which block is asked of whom: first of the peer that announced it, then of the others, round and round."""

    def __init__(self) -> None:
        self._wanted: OrderedDict[bytes, _Wanted] = OrderedDict()

    def __contains__(self, block_hash: bytes) -> bool:
        return block_hash in self._wanted

    def want(self, block_hash: bytes, announcer: str, now_ns: int) -> bytes | None:
        """A block is to be fetched; `announcer` may be nobody's name. Returns one that is forgone for it, if any."""
        self._wanted.setdefault(block_hash, _Wanted(announcer, now_ns + GIVE_UP_NS))
        return self._wanted.popitem(last=False)[0] if len(self._wanted) > MAX_WANTED else None

    def settle(self, block_hash: bytes) -> None:
        """It is here."""
        self._wanted.pop(block_hash, None)

    def failed(self, block_hash: bytes, peer: str) -> None:
        """That peer can't give it, or gave something else."""
        wanted = self._wanted.get(block_hash)
        if wanted is not None and wanted.peer == peer:
            wanted.peer = ""

    def gone(self, peer: str) -> None:
        """What that peer was asked, it won't answer."""
        for wanted in self._wanted.values():
            if wanted.peer == peer:
                wanted.peer = ""

    def questions(self, peers: Sequence[str], now_ns: int) -> list[tuple[str, bytes]]:
        """Whom to ask for which block now, of the peers that can be asked."""
        questions = []
        for block_hash, wanted in list(self._wanted.items()):
            if now_ns >= wanted.until_ns:
                del self._wanted[block_hash]
            elif peers and (not wanted.peer or now_ns >= wanted.due_ns):
                left = [peer for peer in peers if peer not in wanted.asked]
                if not left:
                    if now_ns < wanted.due_ns:  # all have failed at once: not round and round without a pause
                        continue
                    wanted.asked.clear()
                    left = list(peers)
                peer = wanted.announcer if wanted.announcer in left else left[0]
                wanted.asked.add(peer)
                wanted.peer, wanted.due_ns = peer, now_ns + ANSWER_NS
                questions.append((peer, block_hash))
        return questions

    def deadline(self) -> int | None:
        """When questions() may have something new."""
        return min((min(wanted.due_ns, wanted.until_ns) for wanted in self._wanted.values()), default=None)


class FetchedBlock(NamedTuple):
    """A block as a peer sent it, unchecked."""

    peer: str
    hash: bytes
    payload: bytes


class _BlockPeer(Upstream):
    """An upstream of which only blocks are heard."""

    user_agent: ClassVar[str] = USER_AGENT[:-1] + "(blocks)/"
    """So that the node's operator knows our two connections apart."""

    def __init__(self, fetcher: BlockFetcher, address: Address, network: Network, nonce: int) -> None:
        super().__init__(address, network, nonce, lambda: 0)
        self._fetcher = fetcher

    def _translate(self, event: ConnectionEvent, seen_ns: int, heard: list[Heard]) -> None:
        if isinstance(event, BlockReceived):
            self._fetcher.received(FetchedBlock(self.name, event.hash, event.payload))
        elif isinstance(event, NotFound):
            for _, block_hash in event.inventory:
                self._fetcher.requests.failed(block_hash, self.name)
        elif isinstance(event, (HandshakeCompleted, LatencyMeasured)):
            super()._translate(event, seen_ns, heard)


class BlockFetcher:
    """Connections to the upstreams, and the blocks that came over them."""

    def __init__(self, upstreams: Sequence[Address], network: Network) -> None:
        self.requests = BlockRequests()
        self._ready: list[str] = []
        self._blocks: list[FetchedBlock] = []
        self._source = P2PSource(
            upstreams,
            network,
            lambda: 0,
            StatusBlock.create(0, {}),  # nobody looks at these accounts: the relay's own speak of the same nodes
            direct=False,
            make_upstream=lambda address, net, nonce, _tip_height: _BlockPeer(self, address, net, nonce),
        )

    def fileno(self) -> int:
        """Readable when poll() has something to do."""
        return self._source.fileno()

    def deadline(self) -> int | None:
        """When poll() has something to do even if nothing is readable."""
        times = [self._source.deadline(), self.requests.deadline() if self._ready else None]
        return min((one for one in times if one is not None), default=None)

    def want(self, block_hash: bytes, announcer: str) -> bytes | None:
        """Fetch a block; `announcer` is the peer that it was heard of from. Returns one that is not fetched for it."""
        return self.requests.want(block_hash, announcer, time.monotonic_ns())

    def received(self, block: FetchedBlock) -> None:
        """A peer sent a block; one that was not asked for is dropped."""
        if block.hash in self.requests:
            self._blocks.append(block)

    def poll(self) -> list[FetchedBlock]:
        """Do what sockets and clock ask for; returns the blocks that came."""
        now_ns = time.monotonic_ns()
        for heard in self._source.poll(now_ns):
            if isinstance(heard, PeerReady):
                self._ready.append(heard.peer)
            elif isinstance(heard, PeerGone):
                self._ready = [peer for peer in self._ready if peer != heard.peer]
                self.requests.gone(heard.peer)
        for peer, block_hash in self.requests.questions(self._ready, now_ns):
            self._source.send(peer, GetData(((MSG_WITNESS_BLOCK, block_hash),)), now_ns)
        blocks, self._blocks = self._blocks, []
        return blocks

    def close(self) -> None:
        """End all connections."""
        self._source.close()
