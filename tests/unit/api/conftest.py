"""A status block as the relay and the deliveries of a running Sprint leave it."""

from __future__ import annotations

import ctypes
import hashlib
import time
from typing import TYPE_CHECKING, Any

import pytest

from sprint.api.app import create_app
from sprint.events import Announcement, Event, Source, State
from sprint.record import Record
from sprint.status import BlockRow, StatusBlock, writing
from sprint.tiers import PROFILES, Tier

if TYPE_CHECKING:
    from flask.testing import FlaskClient

SESSION = 0x1234
FIRST_SEEN_NS = 5_000_000_000


def facts_of(tier: Tier) -> dict[str, Any]:
    """The facts of an instance of this tier with every default."""
    profile = PROFILES[tier]
    top = profile.memory_engine
    return {
        "tier": tier.label,
        "network": "regtest",
        "version": "0.1.0",
        "engine": "standard",
        "useSharedMemory": top,
        "useDirectP2P": top,
        "useMemoryChannel": top,
        "optimizeSystem": top,
        "writeDeadlineNs": profile.write_deadline_ns,
        "blockBufferSize": profile.ring_slots,
        "kernelBypass": {
            "requested": False,
            "active": False,
            "mode": None,
            "interfaces": [],
            "reason": "ENABLE_KERNEL_BYPASS is false",
            "ingest": dict.fromkeys(("packets", "announcements", "mirrored", "express", "dropped", "opaqueFlows"), 0),
            "egress": dict.fromkeys(("subscribers", "sent", "dropped"), 0),
        },
        "binds": {"api": "127.0.0.1:8080", "stream": "127.0.0.1:8434"},
        "bitcoinNodes": ["127.0.0.1:18444", "127.0.0.2:18444"],
        "upstreams": {},
    }


def record_of(sequence: int) -> Record:
    """A record whose header holds its sequence and whose hash is that header's."""
    header = sequence.to_bytes(80, "little")
    return Record(
        network=b"\xfa\xbf\xb5\xda",
        session=SESSION,
        sequence=sequence,
        event=Event.PROVEN,
        source=Source.P2P,
        state=State.PROVEN | State.BEST,
        height=sequence,
        fork_height=0,
        next_bits=0x207FFFFF,
        median_time_past=1_700_000_000,
        transactions=1,
        size=0,
        wall_ns=1_700_000_000_000_000_000,
        hash=hashlib.sha256(hashlib.sha256(header).digest()).digest(),
        header=header,
        seen_ns=FIRST_SEEN_NS + sequence,
        published_ns=FIRST_SEEN_NS + sequence + 40_000,
    )


def fill(row: BlockRow, sequence: int) -> None:
    """Write one block's timeline, seen by two peers: proven 30 µs and published 40 µs after the first."""
    first_ns = FIRST_SEEN_NS + sequence
    with writing(row):
        ctypes.memmove(row.record, record_of(sequence).encode(), ctypes.sizeof(row.record))
        row.state = State.PROVEN | State.BEST
        row.first_seen_ns = first_ns
        row.proven_ns = first_ns + 30_000
        row.published_ns = first_ns + 40_000
        row.sightings = 2
        for index, (announcement, after_ns) in enumerate(((Announcement.CMPCTBLOCK, 0), (Announcement.INV, 1_500))):
            mark = row.marks[index]
            mark.peer, mark.source, mark.announcement = index, Source.P2P, announcement
            mark.seen_ns = first_ns + after_ns


@pytest.fixture
def status() -> StatusBlock:
    """A healthy turbo instance with one of two upstreams connected and no block yet."""
    block = StatusBlock.create(SESSION, facts_of(Tier.TURBO))
    block.relay.heartbeat_ns = time.monotonic_ns()
    block.relay.caught_up = 1
    block.relay.tip_height = 7
    block.relay.sequence = 9
    for name in ("127.0.0.1:18444", "127.0.0.2:18444"):
        block.peer_index(name)
    block.layout.peers[0].connected = 1
    return block


@pytest.fixture
def client(status: StatusBlock) -> FlaskClient:
    """A client of the API over that block."""
    return create_app(status).test_client()
