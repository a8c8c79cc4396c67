"""The rehearsal of the capture: by turns with the plain socket's, through the same relay, in a relay that captures."""

from __future__ import annotations

from sprint.app_relay import open_rehearsal
from sprint.bitcoin.framing import encode_frame
from sprint.bitcoin.networks import REGTEST
from sprint.engines.rehearsal import BLOCKS
from sprint.events import Sighting, Source
from sprint.sources.capture import PEERS, Overheard
from tests.descriptors import open_descriptors
from tests.unit.segments import BLOCKS as MINED
from xdp.segments import Backend


def test_each_frame_is_heard_once_and_by_each_backend_in_turn() -> None:
    overheard = Overheard()
    try:
        for number in range(3 * len(MINED)):
            block = MINED[number % len(MINED)]
            heard = overheard.hear(encode_frame(REGTEST.magic, "cmpctblock", block.compact(0).encode()), 5)
            (one,) = heard
            assert isinstance(one, Sighting)
            assert (one.hash, one.source, one.transactions, one.seen_ns) == (block.hash, Source.CAPTURE, 1, 5)
            assert one.peer == PEERS[tuple(Backend)[(number + 1) % 2]]
    finally:
        overheard.close()


def test_each_performance_publishes_one_block_whichever_way_it_comes() -> None:
    before = len(open_descriptors())
    rehearsal = open_rehearsal(captures=True)
    for number in range(1, 2 * BLOCKS + 2):
        rehearsal.perform()
        assert rehearsal.performed == number
    rehearsal.close()
    rehearsal.perform()
    assert len(open_descriptors()) == before
