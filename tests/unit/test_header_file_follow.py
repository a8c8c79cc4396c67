"""HeaderFile.follow: what another process that was forked with the open file has appended since."""

from __future__ import annotations

import os
import warnings
from typing import TYPE_CHECKING

import pytest

from sprint.bench.synthetic import joined, mine_branch
from sprint.bitcoin.networks import REGTEST
from sprint.chain import HeaderChain
from sprint.errors import HeaderFileError
from sprint.header_file import HeaderFile

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

TRUNK = mine_branch(REGTEST.genesis_hash, 0, 40)
HASHES = [block_hash for _, block_hash in TRUNK]


@pytest.fixture(name="path")
def _path(tmp_path: Path) -> Path:
    return tmp_path / "headers"


def in_a_child(life: Callable[[], None]) -> None:
    """A forked process lives this life, and dies without a word."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
        pid = os.fork()
    if not pid:
        code = 1
        try:
            life()
            code = 0
        finally:
            os._exit(code)
    assert os.waitpid(pid, 0)[1] == 0


def loaded(path: Path) -> tuple[HeaderChain, int]:
    chain = HeaderChain(REGTEST)
    with HeaderFile.open(path, REGTEST) as file:
        return chain, file.load_into(chain)


def test_what_another_process_appended_is_read_and_nothing_else(path: Path) -> None:
    with HeaderFile.open(path, REGTEST) as file:
        file.append(joined(TRUNK[:10]))
        chain = HeaderChain(REGTEST)
        file.load_into(chain)
        in_a_child(lambda: file.append(joined(TRUNK[10:13])))
        assert chain.tip_hash == HASHES[9]
        assert file.follow(chain) == 3
        assert chain.tip_hash == HASHES[12]
        assert file.cut_bytes == 0
        assert file.follow(chain) == 0


def test_what_is_appended_after_following_leaves_the_others_headers_alone(path: Path) -> None:
    with HeaderFile.open(path, REGTEST) as file:
        file.append(joined(TRUNK[:10]))
        chain = HeaderChain(REGTEST)
        file.load_into(chain)
        in_a_child(lambda: file.append(joined(TRUNK[10:13])))
        file.follow(chain)
        file.append(joined(TRUNK[13:15]))
    again, count = loaded(path)
    assert count == 15
    assert again.tip_hash == HASHES[14]


def test_one_child_after_the_other_follows_and_appends_while_the_first_process_only_holds_the_file(path: Path) -> None:
    with HeaderFile.open(path, REGTEST) as file:
        file.append(joined(TRUNK[:5]))
        chain = HeaderChain(REGTEST)
        file.load_into(chain)

        def life(first: int) -> None:
            assert file.follow(chain) == first - 5
            assert chain.tip_hash == HASHES[first - 1]
            file.append(joined(TRUNK[first : first + 7]))

        for first in (5, 12, 19, 26):
            in_a_child(lambda first=first: life(first))  # type: ignore[misc]  # bound now
        assert chain.tip_hash == HASHES[4]
    again, count = loaded(path)
    assert (count, again.tip_hash) == (33, HASHES[32])


@pytest.mark.parametrize("torn", [1, 79])
def test_what_a_killed_process_left_torn_is_cut_off_and_replaced(path: Path, torn: int) -> None:
    with HeaderFile.open(path, REGTEST) as file:
        file.append(joined(TRUNK[:10]))
        chain = HeaderChain(REGTEST)
        file.load_into(chain)

        def life() -> None:
            file.append(joined(TRUNK[10:12]))
            os.write(file._fd, joined(TRUNK[12:13])[:torn])

        in_a_child(life)
        assert file.follow(chain) == 2
        assert file.cut_bytes == torn
        file.append(joined(TRUNK[12:14]))
    again, count = loaded(path)
    assert (count, again.tip_hash) == (14, HASHES[13])


def test_damage_that_another_process_left_is_cut_off_with_all_that_follows(path: Path) -> None:
    with HeaderFile.open(path, REGTEST) as file:
        file.append(joined(TRUNK[:10]))
        chain = HeaderChain(REGTEST)
        file.load_into(chain)
        in_a_child(lambda: file.append(joined(TRUNK[10:12]) + bytes(80) + joined(TRUNK[12:14])))
        assert file.follow(chain) == 2
        assert file.cut_bytes == 240
        file.append(joined(TRUNK[12:14]))
    assert loaded(path)[1] == 14


def test_a_file_that_somebody_shortened_is_not_filled_with_zeros(path: Path) -> None:
    with HeaderFile.open(path, REGTEST) as file:
        file.append(joined(TRUNK[:10]))
        chain = HeaderChain(REGTEST)
        file.load_into(chain)
        os.truncate(path, 80 * 6)
        assert file.follow(chain) == 0
        assert path.stat().st_size == 80 * 6
        file.append(joined(TRUNK[10:12]))
        assert bytes(80) not in {path.read_bytes()[at : at + 80] for at in range(80, path.stat().st_size, 80)}
    assert loaded(path)[1] == 5  # what followed is fetched anew


def test_the_lock_is_held_until_the_last_of_the_processes_has_gone(path: Path) -> None:
    reading, writing = os.pipe()
    with HeaderFile.open(path, REGTEST) as file, os.fdopen(reading, "rb"), os.fdopen(writing, "wb") as pipe:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*multi-threaded.*fork", category=DeprecationWarning)
            pid = os.fork()
        if not pid:
            try:
                os.close(writing)
                os.read(reading, 1)
            finally:
                os._exit(0)
        file.close()
        with pytest.raises(HeaderFileError, match="another process holds it"):
            HeaderFile.open(path, REGTEST)
        pipe.close()
        assert os.waitpid(pid, 0)[1] == 0
        HeaderFile.open(path, REGTEST).close()
