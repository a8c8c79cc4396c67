"""Random trees of headers in random order: the chain must agree with a model that is too simple to be wrong."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sprint.bench.synthetic import mine
from sprint.bitcoin.block import double_sha256, work_of
from sprint.bitcoin.difficulty import header_time, required_bits
from sprint.bitcoin.networks import MAIN, REGTEST, TESTNET3, TESTNET4, Network
from sprint.chain import Accepted, HeaderChain, Reject, Reorg

GENESIS_TIME = header_time(REGTEST.genesis_header)
FAR = 1 << 32


@dataclass
class Model:
    """Parents by hash, in order of arrival; every block has the same work, so height is work."""

    parents: dict[bytes, bytes] = field(default_factory=lambda: {REGTEST.genesis_hash: bytes(32)})
    tip: bytes = REGTEST.genesis_hash

    def path(self, block_hash: bytes) -> list[bytes]:
        """Genesis first."""
        path = []
        while block_hash in self.parents:
            path.append(block_hash)
            block_hash = self.parents[block_hash]
        return path[::-1]

    def add(self, block_hash: bytes, parent: bytes) -> tuple[bool, Reorg | None]:
        self.parents[block_hash] = parent
        old, new = self.path(self.tip), self.path(block_hash)
        if len(new) <= len(old):
            return False, None
        self.tip = block_hash
        shared = sum(1 for a, b in zip(old, new, strict=False) if a == b)
        if shared == len(old):
            return True, None
        return True, Reorg(shared - 1, tuple(old[shared:]), tuple(new[shared:]))


@st.composite
def trees(draw: st.DrawFn) -> list[tuple[bytes, bytes]]:
    """(header, hash) of a random tree on genesis; parents lean towards the newest, so that branches compete."""
    count = draw(st.integers(1, 60))
    nodes = [(b"", REGTEST.genesis_hash, 0)]
    for number in range(count):
        parent = nodes[max(0, len(nodes) - draw(st.integers(1, 6)))]
        height = parent[2] + 1
        header, block_hash = mine(
            parent[1], number.to_bytes(32, "little"), GENESIS_TIME + 600 * height, REGTEST.pow_limit_bits
        )
        nodes.append((header, block_hash, height))
    return [(header, block_hash) for header, block_hash, _ in nodes[1:]]


@settings(max_examples=300, deadline=None)
@given(tree=trees(), data=st.data())
def test_any_tree_in_any_order_gives_the_tip_and_the_reorganisations_of_the_model(
    tree: list[tuple[bytes, bytes]], data: st.DataObject
) -> None:
    waiting = data.draw(st.permutations(tree))
    chain = HeaderChain(REGTEST)
    model = Model()
    while waiting:
        orphans = []
        for header, block_hash in waiting:
            outcome = chain.accept(header, FAR)
            if header[4:36] not in model.parents:
                assert outcome is Reject.UNKNOWN_PARENT
                orphans.append((header, block_hash))
                continue
            best, reorg = model.add(block_hash, header[4:36])
            height = len(model.path(block_hash)) - 1
            assert outcome == Accepted(block_hash, height, best, duplicate=False, reorg=reorg)
            assert chain.tip_hash == model.tip
        waiting = orphans
    best_path = model.path(model.tip)
    assert [chain.hash_at(height) for height in range(chain.tip_height + 1)] == best_path
    for block_hash in model.parents:
        path = model.path(block_hash)
        assert chain.height_of(block_hash) == len(path) - 1
        assert chain.is_best(block_hash) == (block_hash in best_path)
        assert chain.fork_height(block_hash) == sum(a == b for a, b in zip(path, best_path, strict=False)) - 1
        assert chain.work_of(block_hash) == 2 * len(path)
    parents = set(model.parents.values())
    assert {tip.hash for tip in chain.tips()} == {node for node in model.parents if node not in parents}


@settings(max_examples=200, deadline=None)
@given(tree=trees(), data=st.data())
def test_branches_in_batches_give_the_same_tip_and_net_reorganisations(
    tree: list[tuple[bytes, bytes]], data: st.DataObject
) -> None:
    headers = {block_hash: header for header, block_hash in tree}
    chain = HeaderChain(REGTEST)
    model = Model()
    # Whole paths from genesis, ending at random nodes: known headers first, then new ones.
    for _, end in data.draw(st.permutations(tree)):
        path = []
        at = end
        while at in headers:
            path.append(at)
            at = headers[at][4:36]
        path.reverse()
        old = model.path(model.tip)
        new = [block_hash for block_hash in path if block_hash not in model.parents]
        for block_hash in new:
            model.add(block_hash, headers[block_hash][4:36])
        result = chain.extend(b"".join(headers[block_hash] for block_hash in path), FAR)
        assert (result.duplicates, result.accepted, result.rejection) == (len(path) - len(new), len(new), None)
        assert chain.tip_hash == model.tip
        now = model.path(model.tip)
        shared = sum(a == b for a, b in zip(old, now, strict=False))
        expected = Reorg(shared - 1, tuple(old[shared:]), tuple(now[shared:])) if shared < len(old) else None
        assert result.reorg == expected
        assert result.best == (bool(new) and model.tip == new[-1])


@settings(max_examples=200, deadline=None)
@given(tree=trees(), data=st.data())
def test_headers_restored_in_the_order_of_acceptance_give_the_same_chain(
    tree: list[tuple[bytes, bytes]], data: st.DataObject
) -> None:
    chain = HeaderChain(REGTEST)
    accepted = b""
    waiting = data.draw(st.permutations(tree))
    while waiting:
        results = [(header, block_hash, chain.accept(header, FAR)) for header, block_hash in waiting]
        accepted += b"".join(header for header, _, outcome in results if isinstance(outcome, Accepted))
        waiting = [(header, block_hash) for header, block_hash, outcome in results if isinstance(outcome, Reject)]
    again = HeaderChain(REGTEST)
    restored = again.restore(accepted)
    assert (restored.kept, restored.end, restored.rejection) == (len(tree), len(tree), None)
    assert again.tip_hash == chain.tip_hash
    assert again.tips() == chain.tips()


@pytest.mark.parametrize("base", [MAIN, TESTNET3, TESTNET4], ids=lambda network: network.name)
@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_every_branch_takes_the_bits_and_times_that_its_own_past_allows(base: Network, data: st.DataObject) -> None:
    network = replace(
        base,
        genesis_header=REGTEST.genesis_header,
        genesis_hash=REGTEST.genesis_hash,
        pow_limit=REGTEST.pow_limit,
        pow_limit_bits=REGTEST.pow_limit_bits,
        interval=4,
        target_timespan=2400,
        bip34_height=0,
        bip66_height=0,
        bip65_height=0,
    )
    chain = HeaderChain(network)
    paths = [[network.genesis_header]]
    works = {network.genesis_hash: chain.tip_work}
    tip = network.genesis_hash
    for number in range(data.draw(st.integers(1, 24))):
        path = paths[max(0, len(paths) - data.draw(st.integers(1, 3)))]
        time = header_time(path[-1]) + data.draw(st.sampled_from([300, 500, 700, 1201, 1500, -500, -700, -2000]))
        bits = required_bits(network, len(path), time, path.__getitem__)
        parent = double_sha256(path[-1])
        salt = number.to_bytes(32, "little")
        if bits != network.pow_limit_bits:
            assert chain.accept(mine(parent, salt, time, network.pow_limit_bits)[0], FAR) is Reject.BAD_BITS
        header, block_hash = mine(parent, salt, time, bits)
        times = sorted(map(header_time, path[-11:]))
        warped = network.bip94 and len(path) % network.interval == 0 and time < header_time(path[-1]) - 600
        if time <= times[len(times) // 2] or warped:
            assert chain.accept(header, FAR) is Reject.TIME_TOO_OLD
            continue
        works[block_hash] = works[parent] + work_of(bits)
        if works[block_hash] > works[tip]:
            tip = block_hash
        outcome = chain.accept(header, FAR)
        assert isinstance(outcome, Accepted)
        assert (outcome.height, chain.work_of(block_hash)) == (len(path), works[block_hash])
        assert (chain.tip_hash, chain.tip_work) == (tip, works[tip])
        paths.append([*path, header])
    for path in paths:
        result = HeaderChain(network).extend(b"".join(path[1:]), FAR)
        assert (result.accepted, result.rejection) == (len(path) - 1, None)
        asked = chain.next_bits(double_sha256(path[-1]))
        assert asked == required_bits(network, len(path), None, path.__getitem__)
