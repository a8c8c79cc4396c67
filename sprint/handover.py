"""What a relay that died leaves to the one that takes over: the records in its ring, and a chain read from its file.

A relay publishes first and saves afterwards, so a header may stand in the ring and not in the file; and it may die in
the middle of a turn, with some of what it had decided published and the rest not. Pure: this module finds out, the
relay acts on it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from sprint.chain import Accepted, Reorg
from sprint.events import Announcement, Event, Sighting, Source, State

if TYPE_CHECKING:
    from collections.abc import Sequence

    from sprint.chain import HeaderChain
    from sprint.record import Record


@dataclass(frozen=True, slots=True)
class Handover:
    """What is left to do."""

    headers: bytes
    """n × 80 bytes that the header file lacks."""
    unsaid: tuple[tuple[Sighting, Accepted], ...]
    """What the best chain took in and no record tells of, lowest first; who was first with it is forgotten."""
    reorg: Reorg | None
    """What lost by what was said, and no record calls stale. If anything is unsaid, the last of that carries it."""
    pretenders: tuple[bytes, ...]
    """Told as best, but the end of their branch wasn't, so that it isn't best for us: the next best tip decides."""


def take_over(chain: HeaderChain, records: Sequence[Record], height: int, now_ns: int) -> Handover:
    """Bring `chain`, as read from the file, up to what `records` (oldest first) tell of.

    `height` is where the dead relay's chain stood when it last looked after its books: up to there, a block without a
    record is none that went unsaid, but older than the ring, or than the session.
    """
    headers = bytearray()
    lost: list[bytes] = []
    states: dict[bytes, State] = {}
    told: dict[bytes, None] = {}  # the best tips as they were told, oldest first
    for record in records:
        tip = chain.tip_hash
        if chain.restore(record.header).kept:
            headers += record.header
            lost += _undone(chain, tip)
        states[record.hash] = record.state
        if record.state & State.BEST and (record.event is Event.PROVEN or record.hash not in told):
            told.pop(record.hash, None)
            told[record.hash] = None
    # Whatever was told before our tip has lost to it, if it is best no more; a tip that stood in the file, and of
    # which no record tells, is older than all of them.
    order = list(told)
    newer = order.index(chain.tip_hash) if chain.tip_hash in told else 0 if chain.tip_height <= height else len(order)
    for block_hash in order[:newer]:
        lost += _undone(chain, block_hash)
    lost = [block_hash for block_hash in lost if not states.get(block_hash, State(0)) & State.STALE]
    above = range(_last_told(chain, order, height) + 1, chain.tip_height + 1)
    missing = [block_hash for block_hash in map(chain.hash_at, above) if block_hash not in states]
    reorg = _reorg(chain, lost)
    return Handover(
        bytes(headers),
        tuple(_accepted(chain, block_hash, reorg, now_ns) for block_hash in missing),
        None if missing else reorg,
        tuple(one for one in order[newer:] if not chain.is_best(one) and not states[one] & State.STALE),
    )


def _accepted(chain: HeaderChain, block_hash: bytes, reorg: Reorg | None, now_ns: int) -> tuple[Sighting, Accepted]:
    header, height = chain.header_of(block_hash), chain.height_of(block_hash) or 0
    last = reorg if block_hash == chain.tip_hash else None
    return (
        Sighting(Source.P2P, "", Announcement.HEADERS, block_hash, header, now_ns),
        Accepted(block_hash, height, best=True, duplicate=False, reorg=last),
    )


def _reorg(chain: HeaderChain, lost: list[bytes]) -> Reorg | None:
    heights = {block_hash: chain.height_of(block_hash) or 0 for block_hash in lost}
    if not heights:
        return None
    return Reorg(min(heights.values()) - 1, tuple(sorted(heights, key=heights.__getitem__)), ())


def _last_told(chain: HeaderChain, told: list[bytes], height: int) -> int:
    """The height on the best chain up to which subscribers know it, if they know of any block."""
    newest = chain.fork_height(told[-1]) if told else None
    if newest is None or chain.tip_height <= height:
        return height
    return max(height, newest) if chain.is_best(told[-1]) else min(height, newest)


def _undone(chain: HeaderChain, block_hash: bytes) -> list[bytes]:
    """That block and its ancestors as far as they are not on the best chain; nothing for what the chain gave up."""
    undone = []
    while not chain.is_best(block_hash) and (header := chain.header_of(block_hash)) is not None:
        undone.append(block_hash)
        block_hash = header[4:36]
    return undone
