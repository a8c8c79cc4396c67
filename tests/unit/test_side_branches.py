from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sprint.side_branches import SideBranches, SideHeader

ROOT = b"\xff" * 32
LIMIT = 8


def _hash(number: int) -> bytes:
    return number.to_bytes(32, "little")


def _header(previous: bytes) -> bytes:
    return bytes(4) + previous + bytes(44)


def _leaves(model: dict[bytes, SideHeader]) -> list[SideHeader]:
    parents = {side.previous for side in model.values()}
    return [side for side in model.values() if side.hash not in parents]


@settings(max_examples=300, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["root", "child", "drop"]), st.integers(0, 30), st.integers(1, 4)), max_size=80
    )
)
def test_the_leaf_of_least_work_goes_first_and_of_equals_the_oldest(steps: list[tuple[str, int, int]]) -> None:
    branches = SideBranches(LIMIT)
    model: dict[bytes, SideHeader] = {}
    for number, (what, pick, work) in enumerate(steps):
        if what == "drop" and model:
            leaves = _leaves(model)
            gone = leaves[pick % len(leaves)].hash
            branches.remove(gone)
            del model[gone]
        else:
            parent = list(model.values())[pick % len(model)] if what == "child" and model else None
            previous, base = (parent.hash, parent.work) if parent else (ROOT, 0)
            side = branches.add(_hash(number), _header(previous), 1, base + work)
            model[side.hash] = side
            if sum(1 for _ in branches.branch(side.hash)) > LIMIT:
                branches.remove(side.hash)
                del model[side.hash]
                continue
            branches.trim(side.hash)
            while len(model) > LIMIT:
                candidates = [leaf for leaf in _leaves(model) if leaf.hash != side.hash]
                del model[min(candidates, key=lambda leaf: (leaf.work, leaf.order)).hash]
        assert {side.hash for side in branches.tips()} == {side.hash for side in _leaves(model)}
        assert len(branches) == len(model)
        assert all(branches.get(block_hash) is side for block_hash, side in model.items())
        assert len(branches._leaves) <= 2 * LIMIT + 17


def test_a_branch_is_walked_down_to_the_best_chain_and_no_further() -> None:
    branches = SideBranches()
    previous = ROOT
    for number in range(5):
        previous = branches.add(_hash(number), _header(previous), 10 + number, number).hash
    assert [side.height for side in branches.branch(_hash(4))] == [14, 13, 12, 11, 10]
    assert list(branches.branch(ROOT)) == []


def test_a_parent_that_lost_its_child_can_be_evicted_itself() -> None:
    branches = SideBranches(2)
    parent = branches.add(_hash(1), _header(ROOT), 1, 1)
    child = branches.add(_hash(2), _header(parent.hash), 2, 2)
    for number, gone in ((3, child), (4, parent)):
        newest = branches.add(_hash(number), _header(ROOT), 1, 10)
        branches.trim(newest.hash)
        assert gone.hash not in branches
    assert {side.hash for side in branches.tips()} == {_hash(3), _hash(4)}


def test_headers_that_come_and_go_leave_nothing_behind() -> None:
    branches = SideBranches(LIMIT)
    for number in range(1000):
        branches.add(_hash(number), _header(ROOT), 1, number)
        branches.remove(_hash(number))
    assert len(branches) == len(branches._children) == 0
    assert len(branches._leaves) <= 2 * LIMIT + 17
