"""What `bench detect` announces: blocks of a regtest chain, as compact blocks of main's size, and in one packet.

Pure: bytes in, bytes out.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sprint.bitcoin.codec import encode_compact_size
from sprint.bitcoin.compact import SHORT_ID_SIZE, SHORT_IDS_OFFSET
from sprint.bitcoin.framing import encode_frame
from sprint.bitcoin.messages import MSG_WTX, Inv
from sprint.bitcoin.networks import NETWORKS

if TYPE_CHECKING:
    from sprint.regtest import MinedBlock

NETWORK = NETWORKS["regtest"]
TRANSACTIONS = 3_000
"""Of a full block on main, more or less: a short id of 6 bytes for each makes a compact block of 18 kB (BIP152)."""
BEFORE = 35
"""Transactions in the `inv` that goes before, and is lost: as many as Core names in one go to one peer, or fewer."""


@dataclass(frozen=True, slots=True)
class Workload:
    """How a block is announced."""

    name: str
    short_ids: int
    share: float = 1.0
    """Of the announcements asked for."""
    lossy: bool = False
    """By the path whose sender is far away, each one directly behind a packet that is lost."""


REALISTIC = Workload("realistic", TRANSACTIONS)
ONE_PACKET = Workload("one_packet", 0, share=0.15)
BEHIND_LOSS = Workload("behind_loss", 0, share=0.05, lossy=True)
WORKLOADS = (REALISTIC, ONE_PACKET, BEHIND_LOSS)


def announce(block: MinedBlock, short_ids: int = 0) -> bytes:
    """The `cmpctblock` message of that block, as if it had that many transactions besides its coinbase."""
    payload = block.compact(0).encode()
    if short_ids:
        ids = random.randbytes(short_ids * SHORT_ID_SIZE)
        behind = SHORT_IDS_OFFSET + len(encode_compact_size(0))
        payload = payload[:SHORT_IDS_OFFSET] + encode_compact_size(short_ids) + ids + payload[behind:]
    return encode_frame(NETWORK.magic, "cmpctblock", payload)


def transactions_announced() -> bytes:
    """An `inv` of transactions."""
    return encode_frame(
        NETWORK.magic, "inv", Inv(tuple((MSG_WTX, random.randbytes(32)) for _ in range(BEFORE))).encode()
    )
