"""What tests of the relay and its surroundings share: a relay on a stage, with a regtest node whose words it hears.

The stage's clock only moves when told to. What the relay wants is answered when the test says so, from the node's
chain, in the way that a node does.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from sprint.bitcoin.networks import REGTEST
from sprint.chain import HeaderChain
from sprint.events import Announcement, Block, Event, HeaderRun, PeerGone, PeerReady, Sighting, Source, Want
from sprint.record import Record
from sprint.regtest import MINED_BY, RegtestChain, mine
from sprint.relay import Decision, Outcome, Relay
from sprint.tiers import NS_PER_MS, NS_PER_S

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sprint.bitcoin.networks import Network
    from sprint.regtest import MinedBlock

WALL_S = 1_700_000_000
MAX_RUN = 2_000
BITS = REGTEST.pow_limit_bits


def blocks(count: int, bits: int = BITS) -> list[MinedBlock]:
    """A chain from genesis on, each block with the work that `bits` demand."""
    return _branch(REGTEST.genesis_hash, 0, count, bits, MINED_BY)


def fork_of(stage: Stage, height: int, count: int, extra: bytes = b"fork") -> list[MinedBlock]:
    """A branch of the node's chain from that height on, which the node itself doesn't know."""
    return _branch(stage.node.headers.hash_at(height), height, count, BITS, extra)


def _branch(previous: bytes, height: int, count: int, bits: int, extra: bytes) -> list[MinedBlock]:
    mined: list[MinedBlock] = []
    for at in range(height + 1, height + 1 + count):
        mined.append(mine(previous, at, WALL_S + at, bits, extra))
        previous = mined[-1].hash
    return mined


def stranger(previous: bytes = b"\x07" * 32, time: int = WALL_S, extra: bytes = b"") -> MinedBlock:
    """A block of enough work that stands on nothing we know."""
    return mine(previous, 1, time, BITS, extra)


def sighting_of(
    block: MinedBlock,
    peer: str = "a",
    announcement: Announcement = Announcement.CMPCTBLOCK,
    seen_ns: int = 0,
    *,
    transactions: int = 1,
) -> Sighting:
    """The block as that peer would announce it; by headers and inv only once it has connected it."""
    header = None if announcement is Announcement.INV else block.header.encode()
    validated = announcement in {Announcement.HEADERS, Announcement.INV}
    if announcement is not Announcement.CMPCTBLOCK:
        transactions = 0
    return Sighting(Source.P2P, peer, announcement, block.hash, header, seen_ns, transactions, 0, validated=validated)


def record_of(sequence: int, block: Block) -> Record:
    """The block as a ring keeps it, published when it was seen."""
    return Record(
        REGTEST.magic, 1, sequence, block.event, block.source, block.state, block.height, block.fork_height,
        block.next_bits, block.median_time_past, block.transactions, block.size, block.wall_ns, block.hash,
        block.header, block.seen_ns, block.seen_ns,
    )  # fmt: skip


def headers_of(blocks: Iterable[MinedBlock]) -> bytes:
    """n × 80 bytes."""
    return b"".join(block.header.encode() for block in blocks)


class Stage:
    """A relay, a node, and the clock."""

    def __init__(self, blocks: int = 0, network: Network = REGTEST, recent_blocks: int = 4_096) -> None:
        self.node = RegtestChain()
        self.now_ns = 10 * NS_PER_S
        self.wall_s = WALL_S
        self.chain = HeaderChain(network)
        self.relay = Relay(self.chain, recent_blocks)
        self.published: list[Block] = []
        self.journal: list[Decision] = []
        self.headers = bytearray()
        self.wants: list[Want] = []
        """Not answered yet."""
        self.asked = 0
        if blocks:
            self.node.extend(blocks, WALL_S)

    @property
    def wall_ns(self) -> int:
        return self.wall_s * NS_PER_S + self.now_ns % NS_PER_S

    def connect(self, peer: str = "a", height: int | None = None) -> None:
        """The peer's handshake; it claims the node's height unless told otherwise."""
        claimed = self.node.headers.tip_height if height is None else height
        self.relay.peer_ready(PeerReady(Source.P2P, peer, claimed), self.now_ns)
        self._collect(())

    def lose(self, peer: str) -> None:
        """The peer's connection ends, and with it the questions to it."""
        self.relay.peer_gone(PeerGone(Source.P2P, peer), self.now_ns)
        self.wants = [want for want in self.wants if want.peer != peer]
        self._collect(())

    def hear(self, *sightings: Sighting) -> list[Block]:
        """Offer each, a microsecond apart; returns what is published."""
        blocks: list[Block] = []
        for sighting in sightings:
            self.now_ns += 1_000
            blocks += self._collect(self.relay.offer(sighting, self.now_ns, self.wall_ns))
        return blocks

    def hear_run(self, headers: bytes, peer: str = "a", *, complete: bool | None = None) -> list[Block]:
        """That peer answers so."""
        self.now_ns += 1_000
        ended = len(headers) < MAX_RUN * 80 if complete is None else complete
        run = HeaderRun(Source.P2P, peer, headers, self.now_ns, complete=ended)
        return self._collect(self.relay.offer_run(run, self.now_ns, self.wall_ns))

    def answer(self, node: RegtestChain | None = None) -> list[Block]:
        """Every open question is answered from the node's chain, and those that come of it."""
        blocks: list[Block] = []
        while self.wants:
            want = self.wants.pop(0)
            blocks += self.hear_run((node or self.node).headers_after(want.locator, bytes(32)), want.peer)
        return blocks

    def sync(self, *peers: str) -> None:
        """Connect these peers and catch up with the node; drops what was published on the way."""
        for peer in peers or ("a",):
            self.connect(peer)
        self.answer()
        assert self.relay.caught_up
        self.published.clear()
        self.journal.clear()

    def wait(self, ns: int = 0) -> list[Block]:
        """Let time pass, and the relay's timer run whenever it asks for it."""
        blocks: list[Block] = []
        until = self.now_ns + ns
        for _ in range(10_000):
            due = self.relay.deadline()
            if due is None or due > until:
                self._at(until)
                return blocks
            self._at(max(due, self.now_ns))
            blocks += self._collect(self.relay.on_timer(self.now_ns, self.wall_ns))
        raise AssertionError("the relay's timer spins: its deadline doesn't move on")

    def outcomes(self) -> list[Outcome]:
        return [decision.outcome for decision in self.journal]

    def _at(self, now_ns: int) -> None:
        self.wall_s += now_ns // NS_PER_S - self.now_ns // NS_PER_S
        self.now_ns = now_ns

    def _collect(self, blocks: Sequence[Block]) -> list[Block]:
        self.published += blocks
        self.journal += self.relay.take_journal()
        self.headers += self.relay.take_headers()
        wants = self.relay.take_wants()
        self.asked += len(wants)
        self.wants += wants
        return list(blocks)


def told(blocks: Iterable[Block]) -> list[tuple[Event, bytes]]:
    """What was published, in brief."""
    return [(block.event, block.hash) for block in blocks]


MS = NS_PER_MS
SECOND = NS_PER_S
