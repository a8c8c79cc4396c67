"""The relay's bookkeeping: its journal into the status block, after the deliveries and off the hot path.

Every block keeps its timeline (which peer saw it when, when it was proven, when it stood in the ring), and every peer
its accounts: how many blocks it announced, how many first, and by how much it led or came behind. Bounded: marks of
hashes that are not proven yet are kept for the newest MAX_UNPROVEN of them only.
"""

from __future__ import annotations

import ctypes
from collections import OrderedDict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from sprint.chain import Reject
from sprint.events import Event, State
from sprint.histograms import Histogram
from sprint.relay import Outcome
from sprint.status import BLOCKS, MARKS, PEERS, writing

if TYPE_CHECKING:
    from collections.abc import Iterable

    from sprint.events import Block, Sighting
    from sprint.relay import Decision, Relay
    from sprint.status import BlockRow, Peer, StatusBlock

MAX_UNPROVEN = 256
_CONTENTS = slice(44, 52)
"""Where a record has the count of transactions and the size, which only the whole block tells exactly."""
REJECT_INDEX = {reason: index for index, reason in enumerate(Reject)}
"""Where each reason is counted in the status block."""


@dataclass(slots=True)
class _Sightings:
    """Who has seen one hash, by peer, in the order heard."""

    marks: list[Sighting] = field(default_factory=list)
    peers: set[str] = field(default_factory=set)
    count: int = 0
    row: BlockRow | None = None
    number: int = 0


class Ledger:
    """Writes the relay's part of a status block: its counters, the peers' accounts, the blocks' timelines."""

    def __init__(self, status: StatusBlock) -> None:
        self._status = status
        self._relay = status.relay
        self._prove_latency = Histogram(status.relay.prove_latency)
        self._seen: OrderedDict[bytes, _Sightings] = OrderedDict()

    @property
    def caught_up(self) -> bool:
        """What state_of() noted last."""
        return bool(self._relay.caught_up)

    def published(self, block: Block, sequence: int, record: bytes | None, published_ns: int) -> None:
        """A record of this block has been written to the ring."""
        relay = self._relay
        relay.sequence = sequence
        relay.last_block_wall_ns = block.wall_ns
        counter = block.event.name.lower()
        if counter in ("proven", "validated", "stale", "invalid"):
            setattr(relay, counter, getattr(relay, counter) + 1)
        if block.event is Event.PROVEN:
            relay.reorgs += bool(block.state & State.REORG)
            if block.state & State.CATCHUP:
                relay.catchup += 1
            else:
                self._prove_latency.record(published_ns - block.seen_ns)
            self._open_row(block, record, published_ns)
            return
        seen = self._seen.get(block.hash)
        if seen is None or not self._owns(seen) or seen.row is None:
            return
        with writing(seen.row):
            seen.row.state = block.state
            if block.event is Event.VALIDATED:
                seen.row.validated_ns = published_ns
            elif block.event is Event.STALE:
                seen.row.stale_ns = published_ns
            elif block.event is Event.REBUILT and record is not None:
                seen.row.record[_CONTENTS] = record[_CONTENTS]

    def decided(self, journal: Iterable[Decision]) -> None:
        """Take in what the relay made of each sighting."""
        relay = self._relay
        for decision in journal:
            relay.sightings += not decision.repeated
            if decision.outcome is Outcome.REJECTED and decision.reason is not None:
                relay.rejected[REJECT_INDEX[decision.reason]] += 1
            elif decision.repeated:
                continue
            elif decision.outcome is Outcome.DUPLICATE:
                relay.duplicates += 1
                if decision.sighting.hash in self._seen:  # else older than our books: nobody was first with it
                    self._mark(decision.sighting)
            else:
                self._mark(decision.sighting)

    def state_of(self, relay: Relay, now_ns: int) -> None:
        """The gauges: called at each turn of the relay's loop that did something, and each second."""
        section, chain = self._relay, relay.chain
        section.heartbeat_ns = now_ns
        section.caught_up = relay.caught_up
        section.held = relay.held
        section.tip_height = section.headers = chain.tip_height
        for reason, count in relay.take_refused_runs().items():
            section.rejected[REJECT_INDEX[reason]] += count

    def _mark(self, sighting: Sighting) -> None:
        seen = self._sightings_of(sighting.hash)
        seen.count += 1
        if sighting.peer not in seen.peers and len(seen.peers) < PEERS:
            self._account(sighting, seen)
            seen.peers.add(sighting.peer)
        if len(seen.marks) < MARKS:
            seen.marks.append(sighting)
            if seen.row is not None and self._owns(seen):
                with writing(seen.row):
                    self._write_mark(seen.row, len(seen.marks) - 1, sighting)
        if seen.row is not None and self._owns(seen):
            seen.row.sightings = seen.count

    def _sightings_of(self, block_hash: bytes) -> _Sightings:
        seen = self._seen.get(block_hash)
        if seen is None:
            seen = self._seen[block_hash] = _Sightings()
            if len(self._seen) > MAX_UNPROVEN + BLOCKS:
                self._seen.popitem(last=False)
        return seen

    def _account(self, sighting: Sighting, seen: _Sightings) -> None:
        """The lead of whoever was first, and how far behind the others came; a peer's repetitions don't count."""
        peer = self._peer(sighting.peer)
        if peer is not None:
            peer.sightings += 1
        if not seen.marks:
            if peer is not None:
                peer.first += 1
            return
        first = seen.marks[0]
        behind_ns = max(0, sighting.seen_ns - first.seen_ns)
        if peer is not None:
            peer.behind_ns += behind_ns
            peer.behinds += 1
        leader = self._peer(first.peer)
        if leader is not None and len(seen.peers) == 1:
            leader.lead_ns += behind_ns
            leader.leads += 1

    def _open_row(self, block: Block, record: bytes | None, published_ns: int) -> None:
        seen = self._sightings_of(block.hash)
        seen.number = self._status.layout.block_count
        seen.row = row = self._status.next_block_row()
        with writing(row):
            if record is not None:
                ctypes.memmove(row.record, record, len(record))
            row.state = block.state
            row.first_seen_ns = block.seen_ns
            row.proven_ns = row.published_ns = published_ns
            row.sightings = seen.count
            for index, sighting in enumerate(seen.marks):
                self._write_mark(row, index, sighting)

    def _write_mark(self, row: BlockRow, index: int, sighting: Sighting) -> None:
        mark = row.marks[index]
        peer_index = self._status.peer_index(sighting.peer)
        mark.peer = len(self._status.layout.peers) if peer_index is None else peer_index
        mark.source, mark.announcement, mark.seen_ns = sighting.source, sighting.announcement, sighting.seen_ns

    def _owns(self, seen: _Sightings) -> bool:
        """Whether the row has not been taken for a newer block since."""
        return seen.row is not None and self._status.layout.block_count - seen.number <= BLOCKS

    def _peer(self, name: str) -> Peer | None:
        index = self._status.peer_index(name)
        if index is None:
            return None
        peer: Peer = self._status.layout.peers[index]
        return peer
