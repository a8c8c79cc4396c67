"""Source capture: segments of two backends in, sightings and accounts out, the first glance before everything else."""

from __future__ import annotations

import os
import time

from sprint.bitcoin.networks import REGTEST
from sprint.events import Announcement, Sighting, Source, Want
from sprint.ledger import Ledger
from sprint.reassembly import FLOW_AGE_NS
from sprint.sources.capture import PEERS, CaptureSource
from sprint.status import StatusBlock
from tests.unit.chains import Stage
from tests.unit.segments import BLOCKS, KINDS, announcement, flow_of, forged, segment, told
from xdp.segments import Backend, Segment

BLOCK, OTHER = BLOCKS[0], BLOCKS[1]


class ScriptedCapture:
    """Hands over what it is told to, in payloads that it overwrites at the next poll, as rings do."""

    def __init__(self) -> None:
        self.descriptor = os.eventfd(0)
        self.batches: list[list[Segment]] = []
        self.polls = 0
        self.due_ns: int | None = None
        self._lent: list[bytearray] = []

    def fileno(self) -> int:
        return self.descriptor

    def poll(self) -> list[Segment]:
        self.polls += 1
        for buffer in self._lent:
            buffer[:] = bytes(len(buffer))
        batch = self.batches.pop(0) if self.batches else []
        self._lent = [bytearray(one.payload) for one in batch]
        return [one._replace(payload=memoryview(lent)) for one, lent in zip(batch, self._lent, strict=True)]

    def deadline(self) -> int | None:
        return self.due_ns

    def close(self) -> None:
        os.close(self.descriptor)

    def counters(self) -> dict[str, int]:
        return {"packets": 7, "dropped": 0}


class Rig:
    """A source over a scripted capture."""

    def __init__(self, *backends: Backend) -> None:
        self.capture = ScriptedCapture()
        self.status = StatusBlock.create(1, {})
        self.source = CaptureSource(self.capture, REGTEST, self.status, backends or tuple(Backend))

    def poll(self, *batch: Segment, now_ns: int = 5) -> list[Sighting]:
        """One poll, of these segments if there is nothing left to do of those before."""
        if batch:
            self.capture.batches.append(list(batch))
        heard = self.source.poll(now_ns)
        assert all(isinstance(one, Sighting) for one in heard)
        return [one for one in heard if isinstance(one, Sighting)]

    def drain(self, *batch: Segment) -> list[Sighting]:
        """Poll as a loop does that minds the deadline."""
        heard = self.poll(*batch)
        while self.source.deadline() is not None or self.capture.batches:
            heard += self.poll()
        return heard


def test_both_backends_tell_the_same_announcement_each_under_its_own_name() -> None:
    rig = Rig()
    heard = rig.drain(*(segment(1, announcement(BLOCK), backend=backend, arrival_ns=backend) for backend in Backend))
    assert [(one.peer, one.seen_ns, one.hash) for one in heard] == [
        ("capture ringbuf", 1, BLOCK.hash),
        ("capture af_xdp", 2, BLOCK.hash),
    ]
    assert all(one.source is Source.CAPTURE and not one.validated for one in heard)


def test_a_retransmission_within_a_backend_is_not_told_again() -> None:
    rig = Rig()
    one = segment(1, announcement(BLOCK))
    assert len(rig.drain(one, one)) == 1
    assert rig.drain(one) == []
    assert len(rig.drain(one._replace(backend=Backend.AF_XDP))) == 1


def test_a_sighting_without_a_stamp_is_as_old_as_the_poll() -> None:
    rig = Rig()
    assert [one.seen_ns for one in rig.poll(segment(1, announcement(BLOCK)), now_ns=123)] == [123]


def test_what_a_glance_shows_is_returned_before_the_rest_of_the_segments_is_looked_at() -> None:
    rig = Rig()
    hidden = segment(1, b"the end of a body" + announcement(OTHER))
    shown = segment(5_000, announcement(BLOCK), flow=flow_of(2))
    assert told(rig.poll(hidden, shown)) == [(Announcement.CMPCTBLOCK, BLOCK.hash)]
    assert rig.source.deadline() == 0
    assert rig.capture.polls == 1
    assert told(rig.poll()) == [(Announcement.CMPCTBLOCK, OTHER.hash)]
    assert rig.source.deadline() is None


def test_the_turn_that_ends_with_some_segments_takes_up_what_came_behind_them() -> None:
    rig = Rig()
    rig.capture.batches = [[segment(1, announcement(BLOCK))], [segment(9_000, announcement(OTHER))]]
    assert told(rig.poll()) == [(Announcement.CMPCTBLOCK, BLOCK.hash)]
    assert told(rig.poll()) == [(Announcement.CMPCTBLOCK, OTHER.hash)]
    assert rig.source.deadline() == 0
    assert rig.poll() == []
    assert rig.source.deadline() is None


def test_mirrored_copies_of_what_the_ring_buffer_has_had_are_read_in_full_at_once() -> None:
    rig = Rig()
    both = announcement(BLOCK) + announcement(OTHER)
    segments = [segment(1, both, arrival_ns=7), segment(1 + len(both), announcement(BLOCKS[2]), arrival_ns=8)]
    assert len(rig.drain(*segments)) == 3
    copies = [one._replace(backend=Backend.AF_XDP) for one in segments]
    assert [(one.peer, one.seen_ns, one.hash) for one in rig.poll(*copies)] == [
        ("capture af_xdp", 7, BLOCK.hash),
        ("capture af_xdp", 7, OTHER.hash),
        ("capture af_xdp", 8, BLOCKS[2].hash),
    ]
    assert rig.source.deadline() is None


def test_what_the_mirror_has_alone_is_glanced_at_first() -> None:
    rig = Rig()
    both = announcement(BLOCK) + announcement(OTHER)
    assert len(rig.drain(segment(1, announcement(BLOCK), flow=flow_of(1), arrival_ns=7))) == 1
    newer = segment(1, both, backend=Backend.AF_XDP, arrival_ns=8)
    assert told(rig.poll(newer)) == [(Announcement.CMPCTBLOCK, BLOCK.hash)]
    assert rig.source.deadline() == 0
    assert told(rig.poll()) == [(Announcement.CMPCTBLOCK, OTHER.hash)]


def test_where_nothing_is_left_to_do_it_wants_a_turn_when_the_capture_does() -> None:
    rig = Rig()
    rig.capture.due_ns = 9
    assert rig.source.deadline() == 9
    rig.poll(segment(1, announcement(BLOCK)))
    assert rig.source.deadline() == 0
    rig.poll()
    assert rig.source.deadline() == 9


def test_what_one_flow_says_in_order_is_told_in_that_order() -> None:
    rig = Rig()
    first = announcement(BLOCK) + announcement(OTHER)
    after = segment(1 + len(first), announcement(BLOCKS[2]))
    assert [block_hash for _, block_hash in told(rig.drain(segment(1, first), after))] == [
        one.hash for one in (BLOCK, OTHER, BLOCKS[2])
    ]


def test_nothing_of_a_payload_is_used_once_the_capture_was_polled_again() -> None:
    rig = Rig()
    for kind in KINDS:
        message = announcement(BLOCK, kind)
        flow = flow_of(kind)
        heard = rig.drain(segment(1, message[:40], flow=flow))
        heard += rig.drain(segment(61, message[60:], flow=flow))
        heard += rig.drain(segment(41, message[40:60], flow=flow))
        assert told(heard) == [(kind, BLOCK.hash)]
        assert heard[0].header in {None, BLOCK.header.encode()}


def test_an_idle_capture_says_nothing_and_wants_no_turn() -> None:
    rig = Rig()
    assert rig.poll() == []
    assert rig.source.deadline() is None
    assert rig.source.fileno() == rig.capture.descriptor


def test_it_cannot_be_asked_anything() -> None:
    rig = Rig()
    rig.source.want(Want(Source.CAPTURE, PEERS[Backend.AF_XDP], (BLOCK.hash,)), 1)
    assert rig.poll() == []


def test_the_status_has_a_row_for_each_backend_that_is_on_and_no_more_whoever_is_heard() -> None:
    rig = Rig()
    assert [row.name for row in rig.status.peers()] == [b"capture ringbuf", b"capture af_xdp"]
    rig.drain(*(segment(1, announcement(BLOCK), flow=flow_of(number)) for number in range(100)))
    rig.drain(segment(900, forged("headers", b"\x01" + bytes(81)), backend=Backend.AF_XDP))
    rig.source.account()
    ringbuf, mirror = rig.status.peers()
    assert ringbuf.source == mirror.source == Source.CAPTURE
    assert ringbuf.connected == mirror.connected == 1
    assert (ringbuf.bytes_received, ringbuf.skipped_messages) == (100 * len(announcement(BLOCK)), 0)
    assert (mirror.bytes_received, mirror.skipped_messages) == (106, 1)
    assert [row.name for row in Rig(Backend.AF_XDP).status.peers()] == [b"capture af_xdp"]


def test_the_leads_of_one_backend_over_the_other_stand_in_its_row() -> None:
    rig = Rig()
    stage = Stage()
    stage.connect()
    ledger = Ledger(rig.status)
    for now_ns, backend in ((1_000, Backend.RINGBUF), (5_000, Backend.AF_XDP)):
        for sighting in rig.drain(segment(1, announcement(BLOCK), backend=backend, arrival_ns=now_ns)):
            stage.hear(sighting)
    ledger.decided(stage.journal)
    ringbuf, mirror = rig.status.peers()
    assert (ringbuf.first, ringbuf.leads, ringbuf.lead_ns) == (1, 1, 4_000)
    assert (mirror.first, mirror.behinds, mirror.behind_ns) == (0, 1, 4_000)


def test_the_accounts_forget_flows_that_have_fallen_silent() -> None:
    rig = Rig()
    now_ns = time.monotonic_ns()
    rig.poll(segment(1, announcement(BLOCK)[:50]), now_ns=now_ns)
    rig.source.account()
    assert rig.source.counters()["ringbuf_flows"] == 1
    rig.poll(segment(1, announcement(BLOCK)[:50]), now_ns=now_ns - FLOW_AGE_NS)
    rig.source.account()
    assert rig.source.counters()["ringbuf_flows"] == 0


def test_its_counters_are_the_captures_and_those_of_each_backends_reassembly() -> None:
    rig = Rig()
    rig.drain(segment(1, announcement(BLOCK)), segment(1, announcement(BLOCK)))
    counters = rig.source.counters()
    assert (counters["packets"], counters["dropped"]) == (7, 0)
    assert (counters["ringbuf_segments"], counters["ringbuf_sightings"], counters["ringbuf_repeated"]) == (2, 1, 1)
    assert counters["af_xdp_segments"] == 0


def test_closing_closes_the_capture_once_and_the_rows_say_so() -> None:
    rig = Rig()
    rig.poll(segment(1, announcement(BLOCK)))
    rig.source.close()
    rig.source.close()
    assert rig.source.deadline() is None
    rig.source.account()
    assert [row.connected for row in rig.status.peers()] == [0, 0]
