"""Whether a validated block may be told as the node's, where the operator's node itself can be heard. Pure.

VALIDATED says that some node connected the block, of all those that Sprint hears. Where the operator's own node
publishes by ZMQ, it is that node whom subscribers ask next, so its word is waited for. Three things end the wait: a
later block that the node names, for it has connected the ancestors, too; that no publisher is connected any longer;
and patience. A node that let that run out is not waited for again until it speaks.
"""

from __future__ import annotations

from collections import OrderedDict, deque
from typing import TYPE_CHECKING, Final

from sprint.tiers import NS_PER_S

if TYPE_CHECKING:
    from sprint.deliveries.zmq_tip import NodeTip

PATIENCE_NS: Final = 30 * NS_PER_S
"""A node connects a block within seconds; half a minute is when the status calls a publisher silent."""
MAX_WAITING: Final = 64
NAMED: Final = 64
"""Hashes that we remember the node to have named; a block may be named before its record comes."""


class NodeWord:
    """Each method returns the blocks that may be told from now on, parents first."""

    def __init__(self, tree: NodeTip) -> None:
        self._tree = tree
        self._named: deque[bytes] = deque(maxlen=NAMED)
        self._waiting: OrderedDict[bytes, int] = OrderedDict()
        self._mute = False

    def named(self, block_hash: bytes) -> list[bytes]:
        """The node has named a block: it has connected it."""
        self._mute = False
        if block_hash in self._named:
            return []
        self._named.append(block_hash)
        return self._with_ancestors(block_hash)

    def learnt(self, block_hash: bytes) -> list[bytes]:
        """A block has become known; the node may have named it before."""
        return self._with_ancestors(block_hash) if block_hash in self._named else []

    def validated(self, block_hash: bytes, now_ns: int, *, listening: bool) -> list[bytes]:
        """Some node has connected a block; `listening`: the operator's could be heard."""
        if not listening or self._mute or block_hash in self._named:
            return self._with_ancestors(block_hash)
        self._waiting.setdefault(block_hash, now_ns + PATIENCE_NS)
        if len(self._waiting) > MAX_WAITING:
            return [self._waiting.popitem(last=False)[0]]
        return []

    def overdue(self, now_ns: int) -> list[bytes]:
        """The node's patience is over; then it isn't waited for until it speaks again."""
        if not any(now_ns >= due_ns for due_ns in self._waiting.values()):
            return []
        self._mute = True
        return self.unheard()

    def unheard(self) -> list[bytes]:
        """The node can't be heard any longer."""
        waiting = list(self._waiting)
        self._waiting.clear()
        return waiting

    def _with_ancestors(self, block_hash: bytes) -> list[bytes]:
        if not self._tree.knows(block_hash):
            return []
        blocks = self._tree.ancestors_among(self._waiting, block_hash) if self._waiting else []
        for one in blocks:
            del self._waiting[one]
        return [*(one for one in blocks if one != block_hash), block_hash]
