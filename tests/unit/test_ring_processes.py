"""The ring between real processes that race over shared memory, flat out: none torn, order kept, losses exact."""

from __future__ import annotations

import mmap
import multiprocessing
import os
import platform
import signal
import time
import warnings
from typing import TYPE_CHECKING, Any

import pytest

from sprint.events import Lapped
from sprint.ring import Ring, RingReader, RingWriter, size_for
from tests.unit.rings import SESSION, content, is_best

if TYPE_CHECKING:
    from collections.abc import Callable
    from multiprocessing.connection import Connection

RECORDS = 200_000
HANDOVER = 60_000
TIME_LIMIT_S = 30


def _write_flat_out(ring: Ring) -> None:
    writer = RingWriter(ring)
    claim, commit = writer.claim, writer.commit
    for sequence in range(writer.next_sequence, RECORDS + 1):
        record = content(sequence)
        slot = claim()
        # In pieces, as struct.pack_into does: a reader has every chance to see half a record.
        slot[:64], slot[64:] = record[:64], record[64:]
        commit(best=is_best(sequence))


def _read_to_the_end(ring: Ring, *, dawdle: bool) -> dict[str, int]:
    """Count what is read, torn and lost; a dawdling reader comes back only when it has been lapped."""
    reader = RingReader(ring, 1)
    counts = dict.fromkeys(("read", "torn", "lost", "laps", "misplaced"), 0)
    deadline = time.monotonic() + TIME_LIMIT_S
    following = 1
    while following <= RECORDS and time.monotonic() < deadline:
        if dawdle and counts["laps"] < 50:
            goal = min(RECORDS, following + ring.slots)
            while ring.tail < goal and time.monotonic() < deadline:
                pass
        # Right after a lap the writer is at the reader's heels: where a torn copy would come from.
        for _ in range(ring.slots):
            outcome = reader.read()
            if outcome is None:
                break
            if isinstance(outcome, Lapped):
                counts["misplaced"] += outcome.first != following or outcome.lost < 1
                counts["lost"] += outcome.lost
                counts["laps"] += 1
                following += outcome.lost
            else:
                counts["torn"] += outcome != content(following)
                counts["read"] += 1
                following += 1
            counts["misplaced"] += reader.cursor != following
            if ring.latest_best > ring.tail:  # tail is read later, and only grows
                counts["misplaced"] += 1
    return counts


def _in_a_process(target: Callable[..., object], *arguments: object) -> tuple[Any, Connection]:
    """Fork, and let the child send what `target` returns."""
    context = multiprocessing.get_context("fork")
    receiving, sending = context.Pipe(duplex=False)

    def child() -> None:
        sending.send(target(*arguments))

    process = context.Process(target=child, daemon=True)
    with warnings.catch_warnings():
        # Python 3.12 warns of threads that other tests may have left; the child touches nothing of theirs.
        warnings.simplefilter("ignore", DeprecationWarning)
        process.start()
    sending.close()
    return process, receiving


@pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"),
    reason=f"the order of stores that the ring relies on between processes is x86's; this is {platform.machine()}",
)
@pytest.mark.parametrize("slots", [16, 1536])
def test_between_processes_nothing_is_torn_and_every_loss_is_counted_even_when_a_writer_is_killed(slots: int) -> None:
    memory = mmap.mmap(-1, size_for(slots))
    ring = Ring.create(memoryview(memory), slots, SESSION)
    keen, from_keen = _in_a_process(lambda: _read_to_the_end(ring, dawdle=False))
    first, _ = _in_a_process(_write_flat_out, ring)
    processes = [keen, first]
    try:
        deadline = time.monotonic() + TIME_LIMIT_S
        while ring.tail < HANDOVER and time.monotonic() < deadline:
            time.sleep(0.001)
        os.kill(first.pid, signal.SIGKILL)  # wherever it is
        first.join()
        left_at = ring.tail
        assert HANDOVER <= left_at < RECORDS
        second, _ = _in_a_process(_write_flat_out, ring)
        processes.append(second)
        lapped = _read_to_the_end(ring, dawdle=True)
        assert from_keen.poll(TIME_LIMIT_S), "the keen reader did not come to the end"
        for counts in (from_keen.recv(), lapped):
            assert (counts["torn"], counts["misplaced"]) == (0, 0)
            assert counts["read"] + counts["lost"] == RECORDS
            assert counts["read"] > 0
        assert lapped["laps"] > 0
        assert ring.tail == RECORDS
        assert ring.latest_best == max(each for each in range(RECORDS - 3, RECORDS + 1) if is_best(each))
    finally:
        for process in processes:
            process.kill()
            process.join()
