"""The relay: sightings in, proven blocks out, each once.

First seen by hash over all sources; nothing goes out whose header our own chain has not accepted, and nothing before
that chain has caught up with an upstream. Pure: `now_ns` (CLOCK_MONOTONIC) and `wall_ns` are arguments. What was
decided about each sighting stands in a journal, which is read after the deliveries, never between packet and
subscriber.

Everything that strangers can make grow is bounded: sightings with an unknown parent or a time too far ahead, claims
without a header, and the blocks whose state is remembered.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING

from sprint.bitcoin.block import HEADER_SIZE, double_sha256
from sprint.bitcoin.difficulty import MAX_FUTURE_S
from sprint.chain import Accepted, HeaderChain, Reject, Reorg
from sprint.events import Announcement, Event, HeaderRun, Sighting, Source, State
from sprint.handover import take_over
from sprint.known import Known
from sprint.sync import HeaderSync
from sprint.tiers import NS_PER_S

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sprint.events import Block, BlockRebuilt, MessagesMissed, PeerGone, PeerReady, Want
    from sprint.record import Record

RECENT_BLOCKS = 4_096
"""Blocks whose state is remembered: a month of main. A hash older than that is known from the chain alone."""
MAX_HELD = 128
"""Sightings kept until their parent, or their time, has come."""
HELD_NS = 60 * NS_PER_S
MAX_CLAIMS = 1_024
"""Hashes announced without a header that we remember the first sighting of."""


class Outcome(IntEnum):
    """What the relay made of a sighting."""

    FIRST = 0
    DUPLICATE = 1
    ASKED = 2
    HELD = 3
    REJECTED = 4
    SYNCING = 5


@dataclass(frozen=True, slots=True)
class Decision:
    """One line of the journal."""

    sighting: Sighting
    outcome: Outcome
    reason: Reject | None = None
    repeated: bool = False
    """An earlier line was about the same sighting: it had been held, or its hash asked about."""


class Relay:
    """Decides what is published. offer(), offer_run() and on_timer() return the blocks to publish, in order."""

    def __init__(self, chain: HeaderChain, recent_blocks: int = RECENT_BLOCKS) -> None:
        self.chain = chain
        self.sync = HeaderSync(chain)
        self._recent_blocks = recent_blocks
        self._known: OrderedDict[bytes, Known] = OrderedDict()
        self._claims: OrderedDict[bytes, Sighting] = OrderedDict()
        self._held: OrderedDict[bytes, tuple[Sighting, int, int]] = OrderedDict()
        """hash → sighting, when it is given up, when it is worth another try by itself (0: with its parent only)."""
        self._pretenders: tuple[bytes, ...] = ()
        """Told as best by the relay before us, and not best here: stale unless the next best tip builds on them."""
        self._journal: list[Decision] = []
        self._refused_runs: Counter[Reject] = Counter()
        self._unsaved = bytearray()

    # What the engine collects after each turn.

    def take_wants(self) -> list[Want]:
        """The questions to put to peers since the last call."""
        return self.sync.take_wants()

    def take_journal(self) -> list[Decision]:
        """What was decided since the last call."""
        journal, self._journal = self._journal, []
        return journal

    def take_headers(self) -> bytes:
        """The headers accepted since the last call, n × 80 bytes, parents first: the header file's next lines."""
        headers = bytes(self._unsaved)
        self._unsaved.clear()
        return headers

    def take_refused_runs(self) -> Counter[Reject]:
        """How often an answer of headers was refused since the last call, by the reason of the first bad one."""
        refused, self._refused_runs = self._refused_runs, Counter()
        return refused

    @property
    def caught_up(self) -> bool:
        """Our header chain has caught up with an upstream, so that blocks are published."""
        return self.sync.caught_up

    @property
    def held(self) -> int:
        """Sightings that wait for their parent or their time."""
        return len(self._held)

    def resume(self, records: list[Record], now_ns: int, wall_ns: int, *, caught_up: bool, height: int) -> list[Block]:
        """Take up where a relay that died has left off, by the records of its ring, oldest first.

        What stands there won't be published again. `caught_up` and `height` are its last word on its chain. Returns
        what it died before saying: PROVEN with CATCHUP for what it had accepted, STALE for what had lost by then.
        """
        chain = self.chain
        left = take_over(chain, records, height, now_ns)
        self._unsaved, self._pretenders = self._unsaved + left.headers, left.pretenders
        for record in {record.hash: record for record in records}.values():  # of each block the newest
            state = record.state & ~State.BEST | (State.BEST if chain.is_best(record.hash) else State(0))
            self._remember(Known(
                record.hash, record.header, record.height, record.next_bits, record.median_time_past, state,
                record.source, "", record.transactions, record.size, record.seen_ns,
            ))  # fmt: skip
        # With less than that relay had, as after a full disk, the rest comes in silence: it may be the whole chain.
        self.sync.caught_up = caught_up and chain.tip_height >= height
        blocks: list[Block] = []
        if caught_up:
            for sighting, accepted in left.unsaid:
                blocks += self._prove(sighting, accepted, wall_ns, State.CATCHUP)[1]
            blocks += self._losers(left.reorg, wall_ns)
        for known in self._known.values():
            if known.state & State.BEST and not known.state & State.VALIDATED:
                self.sync.follow(known.hash, "", known.header[4:36], now_ns)
        return blocks

    # What comes in.

    def peer_ready(self, ready: PeerReady, now_ns: int) -> None:
        """A peer can be asked for headers."""
        self.sync.peer_ready(ready, now_ns)

    def peer_gone(self, gone: PeerGone, now_ns: int) -> None:
        """A peer can no longer be asked."""
        self.sync.peer_gone(gone, now_ns)

    def offer(self, sighting: Sighting, now_ns: int, wall_ns: int, *, repeated: bool = False) -> Sequence[Block]:
        """One peer's announcement of one block; `repeated` if it was offered before, and held."""
        known = self._known.get(sighting.hash)
        if known is not None:
            self._journal.append(Decision(sighting, Outcome.DUPLICATE, None, repeated))
            if sighting.validated and not known.state & State.VALIDATED:
                return self._validate(known, wall_ns)
            return ()
        if not self.sync.caught_up:
            if sighting.header is not None:
                self._hold(sighting, now_ns + HELD_NS, 0)
            self._journal.append(Decision(sighting, Outcome.SYNCING, None, repeated))
            return ()
        header = sighting.header
        if header is None:
            return self._offer_hash(sighting, now_ns)
        result = self.chain.accept(header, wall_ns // NS_PER_S)
        if isinstance(result, Accepted):
            if result.duplicate:
                self._journal.append(Decision(sighting, Outcome.DUPLICATE, None, repeated))
                return ()
            self._journal.append(Decision(sighting, Outcome.FIRST, None, repeated))
            return self._publish(sighting, result, now_ns, wall_ns)
        held = self._refuse(sighting, result, now_ns, wall_ns)
        self._journal.append(Decision(sighting, Outcome.HELD if held else Outcome.REJECTED, result, repeated))
        return ()

    def offer_run(self, run: HeaderRun, now_ns: int, wall_ns: int) -> Sequence[Block]:
        """A peer's answer to a getheaders: headers of its best chain, which it has connected."""
        chain, wall_s = self.chain, wall_ns // NS_PER_S
        blocks: list[Block] = []
        result = chain.extend(run.headers, wall_s)
        if result.rejection is not None:
            self._refused_runs[result.rejection] += 1
        first, last = HEADER_SIZE * result.duplicates, HEADER_SIZE * (result.duplicates + result.accepted)
        self._unsaved += run.headers[first:last]
        last_hash = double_sha256(run.headers[last - HEADER_SIZE : last]) if last else None
        if self.sync.caught_up:
            for at in range(first, last, HEADER_SIZE):
                reorg = result.reorg if at + HEADER_SIZE == last else None
                blocks += self._prove_from(run, run.headers[at : at + HEADER_SIZE], reorg, wall_ns)
            if last_hash is not None and (known := self._known.get(last_hash)) is not None:
                blocks += self._validate(known, wall_ns)
        last_height = chain.height_of(last_hash) if last_hash is not None else None
        grew, refused = last > first, result.rejection is not None
        if self.sync.answered(run, grew=grew, refused=refused, last_height=last_height, now_ns=now_ns, wall_s=wall_s):
            blocks += self._release(None, now_ns, wall_ns)
        elif self._held and grew:
            arrived = [run.headers[at + 4 : at + 36] for at in range(first + HEADER_SIZE, last, HEADER_SIZE)]
            blocks += self._release([*arrived, last_hash or b""], now_ns, wall_ns)
        return blocks

    def missed(self, missed: MessagesMissed, now_ns: int) -> None:
        """A peer's words were lost on the way: everybody who can be asked for headers is."""
        self.sync.ask(missed.peer, now_ns)

    def rebuilt(self, rebuilt: BlockRebuilt, wall_ns: int) -> Sequence[Block]:
        """A block is at hand as a whole: REBUILT, once, with the size and the count of transactions that it has."""
        known = self._known.get(rebuilt.hash)
        if known is None or known.state & State.REBUILT:
            return ()
        known.state |= State.REBUILT
        known.transactions, known.size = rebuilt.transactions, rebuilt.size
        return (known.told(Event.REBUILT, wall_ns),)

    def deadline(self) -> int | None:
        """When on_timer has something to do, CLOCK_MONOTONIC ns."""
        times = [min(until, again or until) for _, until, again in self._held.values()]
        sync = self.sync.deadline()
        if sync is not None:
            times.append(sync)
        return min(times, default=None)

    def on_timer(self, now_ns: int, wall_ns: int) -> Sequence[Block]:
        """Whatever is due: held sightings whose time has come or is over, and questions to ask again."""
        self.sync.on_timer(now_ns)
        blocks: list[Block] = []
        for block_hash, (sighting, until_ns, again_ns) in list(self._held.items()):
            if again_ns and now_ns >= again_ns:
                if self._held.pop(block_hash, None) is not None:  # else it came with a block before it in this list
                    blocks += self.offer(sighting, now_ns, wall_ns, repeated=True)
            elif now_ns >= until_ns:
                self._held.pop(block_hash, None)
        return blocks

    # How it is decided.

    def _offer_hash(self, sighting: Sighting, now_ns: int) -> Sequence[Block]:
        if self.chain.knows(sighting.hash):
            self._journal.append(Decision(sighting, Outcome.DUPLICATE))
            return ()
        self._claim(sighting)
        self._journal.append(Decision(sighting, Outcome.ASKED))
        self.sync.ask(sighting.peer, now_ns, urgent=True)
        return ()

    def _claim(self, sighting: Sighting) -> None:
        first = self._claims.setdefault(sighting.hash, sighting)
        if sighting.validated and not first.validated:
            self._claims[sighting.hash] = first._replace(validated=True)
        if len(self._claims) > MAX_CLAIMS:
            self._claims.popitem(last=False)

    def _prove_from(self, run: HeaderRun, header: bytes, reorg: Reorg | None, wall_ns: int) -> list[Block]:
        """PROVEN for a new header of an answer; what nobody had announced was found late, in a catch-up."""
        chain, block_hash = self.chain, double_sha256(header)
        if (known := self._known.get(block_hash)) is not None:  # a side header that the chain had given up since
            known.state |= State.BEST if chain.is_best(block_hash) else State(0)
            return self._losers(reorg, wall_ns)
        height = chain.height_of(block_hash) or 0
        accepted = Accepted(block_hash, height, best=chain.is_best(block_hash), duplicate=False, reorg=reorg)
        claim, held = self._claims.pop(block_hash, None), self._held.pop(block_hash, None)
        told = None if held is None else held[0]
        first = claim or told  # whoever only named it did so before anybody's header of it was held
        sighting = Sighting(
            run.source if first is None else first.source,
            run.peer if first is None else first.peer,
            Announcement.HEADERS if first is None else first.announcement,
            block_hash,
            header,
            run.seen_ns if first is None else first.seen_ns,
            0 if told is None else told.transactions,
            0 if told is None else told.size,
        )
        self._journal.append(Decision(sighting, Outcome.FIRST, None, first is not None))
        return self._prove(sighting, accepted, wall_ns, State.CATCHUP if first is None else State(0))[1]

    def _refuse(self, sighting: Sighting, reason: Reject, now_ns: int, wall_ns: int) -> bool:
        """Whether a sighting that the chain refuses is held for another try."""
        if reason is Reject.UNKNOWN_PARENT:
            self._hold(sighting, now_ns + HELD_NS, 0)
            self._claim(sighting)
            self.sync.ask(sighting.peer, now_ns, urgent=True)
            return True
        if reason is Reject.TIME_TOO_NEW:
            header = sighting.header or b""
            early_ns = (int.from_bytes(header[68:72], "little") - MAX_FUTURE_S) * NS_PER_S - wall_ns
            if early_ns < HELD_NS:
                self._hold(sighting, now_ns + 2 * HELD_NS, now_ns + max(early_ns, 0) + NS_PER_S)
                return True
        return False

    def _hold(self, sighting: Sighting, until_ns: int, again_ns: int) -> None:
        self._held.setdefault(sighting.hash, (sighting, until_ns, again_ns))
        if len(self._held) > MAX_HELD:
            self._held.popitem(last=False)

    def _publish(self, sighting: Sighting, accepted: Accepted, now_ns: int, wall_ns: int) -> Sequence[Block]:
        self._unsaved += sighting.header or b""
        first = self._claims.pop(sighting.hash, None) if self._claims else None
        if first is not None and first.seen_ns <= sighting.seen_ns:
            sighting = Sighting(
                first.source, first.peer, first.announcement, sighting.hash, sighting.header, first.seen_ns,
                sighting.transactions, sighting.size, sighting.validated or first.validated,
            )  # fmt: skip
        known, blocks = self._prove(sighting, accepted, wall_ns, State(0))
        if sighting.validated:
            blocks += self._validate(known, wall_ns)
        else:
            self.sync.follow(known.hash, sighting.peer, known.header[4:36], now_ns)
        if self._held:
            blocks += self._release([sighting.hash], now_ns, wall_ns)
        return blocks

    def _prove(self, sighting: Sighting, accepted: Accepted, wall_ns: int, extra: State) -> tuple[Known, list[Block]]:
        """PROVEN, and STALE for every block that is no longer on the best chain."""
        state = State.PROVEN | extra
        if accepted.best:
            state |= State.BEST
        reorg = accepted.reorg
        if reorg is not None:
            state |= State.REORG
        chain, block_hash = self.chain, sighting.hash
        known = Known(
            block_hash, sighting.header or b"", accepted.height, chain.next_bits(block_hash),
            chain.median_time_past(block_hash), state, sighting.source, sighting.peer, sighting.transactions,
            sighting.size, sighting.seen_ns,
        )  # fmt: skip
        self._remember(known)
        block = known.told(Event.PROVEN, wall_ns, reorg.fork_height if reorg else 0)
        blocks = [block, *self._losers(reorg, wall_ns)]
        if self._pretenders and accepted.best:
            lost, self._pretenders = [one for one in self._pretenders if not chain.is_best(one)], ()
            blocks += self._losers(Reorg(0, tuple(lost), ()), wall_ns)
        return known, blocks

    def _losers(self, reorg: Reorg | None, wall_ns: int) -> list[Block]:
        """STALE for all that a reorganisation undid, from the top down; what it connected is best from now on."""
        if reorg is None:
            return []
        for winner in reorg.connected:
            if (won := self._known.get(winner)) is not None:
                won.state |= State.BEST
        stale = (self._stale(loser, wall_ns) for loser in reversed(reorg.disconnected))
        return [block for block in stale if block is not None]

    def _stale(self, block_hash: bytes, wall_ns: int) -> Block | None:
        chain = self.chain
        known = self._known.get(block_hash)
        if known is None:  # best before this session began
            header, height = chain.header_of(block_hash), chain.height_of(block_hash)
            if header is None or height is None:  # undone so deep down that the chain doesn't keep it
                return None
            known = Known(
                block_hash, header, height, chain.next_bits(block_hash), chain.median_time_past(block_hash),
                State.PROVEN, Source.P2P, "", 0, 0, 0,
            )  # fmt: skip
            self._remember(known)
        known.state = (known.state | State.STALE) & ~State.BEST
        self.sync.unfollow(block_hash)
        return known.told(Event.STALE, wall_ns)

    def _validate(self, known: Known, wall_ns: int) -> list[Block]:
        """VALIDATED for the ancestors that wait for it, then for the block: one can't be without the others."""
        waiting: list[Known] = []
        block: Known | None = known
        while block is not None and not block.state & State.VALIDATED:
            waiting.append(block)
            block = self._known.get(block.header[4:36])
        blocks = []
        for block in reversed(waiting):
            block.state |= State.VALIDATED
            self.sync.unfollow(block.hash)
            blocks.append(block.told(Event.VALIDATED, wall_ns))
        return blocks

    def _remember(self, known: Known) -> None:
        self._known[known.hash] = known
        if len(self._known) > self._recent_blocks:
            gone, _ = self._known.popitem(last=False)
            self.sync.unfollow(gone)

    def _release(self, parents: Iterable[bytes] | None, now_ns: int, wall_ns: int) -> list[Block]:
        """Offer again what was held for want of these parents; None: all that waits for a parent."""
        blocks: list[Block] = []
        arrived = None if parents is None else set(parents)
        for block_hash, (sighting, _, again_ns) in list(self._held.items()):
            if again_ns or sighting.header is None:
                continue
            wanted = arrived is None or sighting.header[4:36] in arrived
            if wanted and self._held.pop(block_hash, None) is not None:  # else it came with its parent, just now
                blocks += self.offer(sighting, now_ns, wall_ns, repeated=True)
        return blocks
