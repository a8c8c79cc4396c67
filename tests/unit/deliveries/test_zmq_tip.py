"""Which blocks a tip left and took: reorganisations as Core's publisher tells them."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from sprint.deliveries.zmq_tip import NodeTip, TipChange

EASY, HARD = 0x207FFFFF, 0x1D00FFFF


class Tree:
    """Blocks by name; their work is their nBits'."""

    def __init__(self, max_blocks: int = 4096) -> None:
        self.tip = NodeTip(max_blocks)
        self.heights: dict[str, int] = {}

    def add(self, name: str, parent: str, bits: int = EASY, *, best: bool = True) -> None:
        self.heights[name] = self.heights.get(parent, 0) + 1
        header = struct.pack("<i32s32sIII", 1, hash_of(parent), bytes(32), 0, bits, 0)
        self.tip.learn(hash_of(name), header, self.heights[name], best=best)

    def advance(self, name: str) -> tuple[str, str] | None:
        """(names disconnected, names connected), or None."""
        change = self.tip.advance(hash_of(name))
        return None if change is None else (names(change.disconnected), names(change.connected))


def hash_of(name: str) -> bytes:
    return name.encode().ljust(32, b"\0")


def names(hashes: tuple[bytes, ...]) -> str:
    return " ".join(one.rstrip(b"\0").decode() for one in hashes)


def test_the_first_block_is_taken_as_it_is() -> None:
    tree = Tree()
    tree.add("a1", "root")
    assert tree.advance("a1") == ("", "a1")
    assert tree.advance("a1") is None, "once"


def test_what_competes_with_a_tip_that_was_there_before_anything_was_told_is_not_taken() -> None:
    tree = Tree()
    tree.add("b1", "root", best=False)
    assert tree.advance("b1") is None
    tree.add("b2", "b1")
    assert tree.advance("b2") == ("", "b2"), "it has won"


def test_a_block_that_has_become_best_since_is_taken() -> None:
    tree = Tree()
    tree.add("b1", "root", best=False)
    tree.add("b1", "root")
    assert tree.advance("b1") == ("", "b1")


def test_of_some_blocks_those_below_another_are_found_in_their_order() -> None:
    tree = Tree()
    for name, parent in (("a1", "root"), ("a2", "a1"), ("b2", "a1"), ("a3", "a2")):
        tree.add(name, parent)
    candidates = [hash_of(name) for name in ("a1", "b2", "a3", "unknown", "a2")]
    found = tree.tip.ancestors_among(candidates, hash_of("a3"))
    assert found == [hash_of(name) for name in ("a1", "a3", "a2")]
    assert tree.tip.ancestors_among([hash_of("unknown")], hash_of("a3")) == []


def test_a_chain_that_grows_is_taken_block_by_block() -> None:
    tree = Tree()
    for name, parent in (("a1", "root"), ("a2", "a1")):
        tree.add(name, parent)
        assert tree.advance(name) == ("", name)


def test_a_block_of_the_same_height_does_not_move_the_tip() -> None:
    tree = Tree()
    tree.add("a1", "root")
    tree.add("b1", "root")
    assert tree.advance("a1") is not None
    assert tree.advance("b1") is None
    assert tree.tip.hash == hash_of("a1")


def test_a_reorganisation_is_told_at_once_when_its_last_block_counts() -> None:
    tree = Tree()
    for name, parent in (("a1", "root"), ("a2", "a1"), ("b1", "root"), ("b2", "b1"), ("b3", "b2")):
        tree.add(name, parent)
    assert [tree.advance(name) for name in ("a1", "a2")] == [("", "a1"), ("", "a2")]
    assert [tree.advance(name) for name in ("b1", "b2")] == [None, None]
    assert tree.advance("b3") == ("a2 a1", "b1 b2 b3")


def test_a_tip_comes_back_to_the_branch_that_it_left() -> None:
    tree = Tree()
    for name, parent in (("a1", "root"), ("b1", "root"), ("b2", "b1"), ("a2", "a1"), ("a3", "a2")):
        tree.add(name, parent)
    assert tree.advance("a1") == ("", "a1")
    assert tree.advance("b2") == ("a1", "b1 b2")
    assert tree.advance("a2") is None
    assert tree.advance("a3") == ("b2 b1", "a1 a2 a3")


def test_more_work_counts_and_not_more_blocks() -> None:
    tree = Tree()
    tree.add("a1", "root", HARD)
    tree.add("b1", "root")
    tree.add("b2", "b1")
    assert tree.advance("a1") is not None
    assert tree.advance("b2") is None
    tree.add("c1", "root", HARD)
    tree.add("c2", "c1")
    assert tree.advance("c2") == ("a1", "c1 c2")


def test_where_the_blocks_between_were_never_told_the_higher_one_is_the_tip() -> None:
    tree = Tree()
    tree.add("a1", "root")
    tree.advance("a1")
    tree.heights["x6"] = 6
    tree.add("x7", "x6")
    assert tree.advance("x7") == ("", "x7")
    assert tree.advance("a1") is None


def test_a_block_that_nobody_told_of_moves_nothing() -> None:
    assert NodeTip().advance(bytes(32)) is None


@given(st.lists(st.tuples(st.integers(0, 30), st.booleans()), max_size=40), st.integers(2, 50))
def test_connected_and_disconnected_always_lead_from_tip_to_tip(steps: list[tuple[int, bool]], bound: int) -> None:
    """A subscriber that applies what it is told has the same chain, whatever the tree and the bound."""
    tree, chain, parents = Tree(bound), ["0"], {"0": "root"}
    tree.add("0", "root")
    tree.advance("0")
    for number, (parent, counts) in enumerate(steps, 1):
        name, below = str(number), str(parent % number)
        parents[name] = below
        tree.add(name, below)
        before = tree.tip.hash
        change = tree.tip.advance(hash_of(name)) if counts else None
        if change is None:
            assert tree.tip.hash == before
            continue
        for gone in change.disconnected:
            assert chain.pop() == names((gone,))
        for come in change.connected:
            if isinstance(change, TipChange) and chain and parents[names((come,))] != chain[-1]:
                chain.clear()  # the blocks between were forgotten, and it says so by leaving nothing
            chain.append(names((come,)))
        assert tree.tip.hash == hash_of(name) == hash_of(chain[-1])
