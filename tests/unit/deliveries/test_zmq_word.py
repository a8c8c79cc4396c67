"""What waits for the operator's node to say that it has connected a block, and what ends the wait."""

from __future__ import annotations

import struct

from hypothesis import given
from hypothesis import strategies as st

from sprint.deliveries.zmq_tip import NodeTip
from sprint.deliveries.zmq_word import MAX_WAITING, PATIENCE_NS, NodeWord

EASY = 0x207FFFFF


def hash_of(name: str) -> bytes:
    return name.encode().ljust(32, b"\0")


class Stage:
    """A chain a1, a2, … and a branch b2, b3, … from a1, all known."""

    def __init__(self) -> None:
        self.tree = NodeTip()
        self.word = NodeWord(self.tree)
        for height in range(1, 6):
            self.add(f"a{height}", f"a{height - 1}", height)
        self.add("b2", "a1", 2)
        self.add("b3", "b2", 3)

    def add(self, name: str, parent: str, height: int) -> None:
        header = struct.pack("<i32s32sIII", 1, hash_of(parent), bytes(32), 0, EASY, 0)
        self.tree.learn(hash_of(name), header, height, best=True)

    def validated(self, name: str, now_ns: int = 0, *, listening: bool = True) -> str:
        return names(self.word.validated(hash_of(name), now_ns, listening=listening))

    def named(self, name: str) -> str:
        return names(self.word.named(hash_of(name)))


def names(hashes: list[bytes]) -> str:
    return " ".join(one.rstrip(b"\0").decode() for one in hashes)


def test_a_block_waits_for_the_node_s_word() -> None:
    stage = Stage()
    assert stage.validated("a1") == ""
    assert stage.named("a1") == "a1"
    assert stage.named("a1") == "", "a hashblock and a rawblock name it twice"


def test_what_the_node_has_named_waits_no_more() -> None:
    stage = Stage()
    assert stage.named("a1") == "a1", "the record of it was here"
    assert stage.validated("a1") == "a1", "and whoever told it already knows"


def test_a_block_that_the_node_names_before_its_record_is_here_counts_when_it_is() -> None:
    stage = Stage()
    assert stage.named("c1") == ""
    assert names(stage.word.learnt(hash_of("a1"))) == ""
    stage.add("c1", "a5", 6)
    assert names(stage.word.learnt(hash_of("c1"))) == "c1"


def test_where_the_node_can_t_be_heard_nothing_waits() -> None:
    stage = Stage()
    assert stage.validated("a1", listening=False) == "a1"


def test_a_block_that_the_node_names_brings_its_ancestors_and_nothing_else() -> None:
    stage = Stage()
    for name in ("a1", "a2", "b2", "a3"):
        assert stage.validated(name) == ""
    assert stage.named("a4") == "a1 a2 a3 a4"
    assert names(stage.word.unheard()) == "b2"


def test_all_that_waits_is_told_when_the_node_is_gone() -> None:
    stage = Stage()
    stage.validated("a1")
    stage.validated("a2")
    assert names(stage.word.unheard()) == "a1 a2"
    assert stage.word.unheard() == []


def test_a_node_that_says_nothing_is_waited_for_once_until_it_speaks() -> None:
    stage = Stage()
    stage.validated("a1", 100)
    assert stage.word.overdue(99 + PATIENCE_NS) == []
    assert names(stage.word.overdue(100 + PATIENCE_NS)) == "a1"
    assert stage.validated("a2") == "a2"
    assert stage.named("a3") == "a3"
    assert stage.validated("a4") == ""


@given(st.lists(st.tuples(st.sampled_from("vnu"), st.integers(0, 199)), max_size=300))
def test_what_waits_is_bounded_and_every_block_that_counts_counts(steps: list[tuple[str, int]]) -> None:
    tree = NodeTip()
    word = NodeWord(tree)
    for height in range(200):
        header = struct.pack("<i32s32sIII", 1, hash_of(str(height - 1)), bytes(32), 0, EASY, 0)
        tree.learn(hash_of(str(height)), header, height, best=True)
    validated: set[bytes] = set()
    told: set[bytes] = set()
    for step, height in steps:
        one = hash_of(str(height))
        if step == "v":
            told |= set(word.validated(one, 0, listening=True))
            validated.add(one)
        elif step == "n":
            told |= set(word.named(one))
        else:
            told |= set(word.unheard())
        assert len(word._waiting) <= MAX_WAITING
    assert validated <= told | set(word.unheard())
