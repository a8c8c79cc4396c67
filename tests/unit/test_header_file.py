from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from sprint.bench.synthetic import joined, mine, mine_branch
from sprint.bitcoin.difficulty import header_time
from sprint.bitcoin.networks import MAIN, NETWORKS, REGTEST
from sprint.chain import HeaderChain
from sprint.errors import HeaderFileError, HostError
from sprint.header_file import HeaderFile

GENESIS_TIME = header_time(REGTEST.genesis_header)
FAR = 1 << 32
PREAMBLE = 80


def _load(path: Path) -> tuple[HeaderChain, int, int]:
    """The chain in that file, how many headers were loaded, how many bytes were cut off."""
    chain = HeaderChain(REGTEST)
    with HeaderFile.open(path, REGTEST) as file:
        return chain, file.load_into(chain), file.cut_bytes


@pytest.fixture(name="path")
def _path(tmp_path: Path) -> Path:
    return tmp_path / "headers"


def test_a_new_file_holds_nothing_but_its_documented_preamble(path: Path) -> None:
    assert _load(path)[1:] == (0, 0)
    expected = b"SPRH" + bytes([1, 0, 80, 0]) + REGTEST.magic + REGTEST.genesis_hash + bytes(36)
    assert path.read_bytes() == expected


def test_headers_come_back_with_their_side_branches_and_the_tip_that_was_best(path: Path) -> None:
    trunk = mine_branch(REGTEST.genesis_hash, 0, 20)
    rival = mine_branch(trunk[14][1], 15, 8, salt=1)
    chain = HeaderChain(REGTEST)
    with HeaderFile.open(path, REGTEST) as file:
        for piece in (trunk[:18], rival[:2], trunk[18:], rival[2:]):
            assert chain.extend(joined(piece), FAR).accepted == len(piece)
            file.append(joined(piece))
    again, loaded, cut = _load(path)
    assert (loaded, cut) == (28, 0)
    assert again.tip_hash == chain.tip_hash == rival[-1][1]
    assert again.tips() == chain.tips()


def test_loading_tells_its_progress_and_more_can_be_appended_afterwards(path: Path) -> None:
    trunk = mine_branch(REGTEST.genesis_hash, 0, 9000)
    with HeaderFile.open(path, REGTEST) as file:
        file.append(joined(trunk[:8500]))
    seen: list[tuple[int, int]] = []
    chain = HeaderChain(REGTEST)
    with HeaderFile.open(path, REGTEST) as file:
        assert file.load_into(chain, lambda done, total: seen.append((done, total))) == 8500
        file.append(joined(trunk[8500:]))
    assert seen == [(4000, 8500), (8000, 8500), (8500, 8500)]
    assert _load(path)[0].tip_hash == trunk[-1][1]


def test_a_header_accepted_before_is_loaded_whatever_our_clock_says_now(path: Path) -> None:
    header, _ = mine(REGTEST.genesis_hash, bytes(32), 0xFFFFFFFF, REGTEST.pow_limit_bits)
    with HeaderFile.open(path, REGTEST) as file:
        file.append(header)
    assert _load(path)[1] == 1


def test_a_file_cut_at_any_byte_of_its_last_two_headers_loads_the_whole_ones_and_goes_on(path: Path) -> None:
    trunk = mine_branch(REGTEST.genesis_hash, 0, 6)
    with HeaderFile.open(path, REGTEST) as file:
        file.append(joined(trunk))
    whole = path.read_bytes()
    for size in range(PREAMBLE + 4 * 80, len(whole)):
        path.write_bytes(whole[:size])
        complete, torn = divmod(size - PREAMBLE, 80)
        chain = HeaderChain(REGTEST)
        with HeaderFile.open(path, REGTEST) as file:
            assert (file.load_into(chain), file.cut_bytes) == (complete, torn)
            file.append(joined(trunk[complete:]))
        assert path.read_bytes() == whole


def test_appending_to_a_torn_file_that_was_not_loaded_cuts_the_tail_first(path: Path) -> None:
    trunk = mine_branch(REGTEST.genesis_hash, 0, 3)
    with HeaderFile.open(path, REGTEST) as file:
        file.append(joined(trunk[:2]))
    with path.open("ab") as raw:
        raw.write(b"torn")
    with HeaderFile.open(path, REGTEST) as file:
        file.append(trunk[2][0])
    assert _load(path)[1:] == (3, 0)


@pytest.mark.parametrize("size", range(PREAMBLE))
def test_a_preamble_cut_at_any_byte_is_written_anew(path: Path, size: int) -> None:
    _load(path)
    whole = path.read_bytes()
    path.write_bytes(whole[:size])
    assert _load(path)[1] == 0
    assert path.read_bytes() == whole


@pytest.mark.parametrize("field", [0, 4, 36, 68, 72, 76])
def test_damage_in_the_middle_ends_the_chain_there_and_what_follows_is_cut_off(path: Path, field: int) -> None:
    trunk = mine_branch(REGTEST.genesis_hash, 0, 10)
    with HeaderFile.open(path, REGTEST) as file:
        file.append(joined(trunk))
    damaged = bytearray(path.read_bytes())
    at = PREAMBLE + 5 * 80 + field
    damaged[at : at + 4] = bytes(byte ^ 0xFF for byte in damaged[at : at + 4])
    path.write_bytes(damaged)
    chain, loaded, cut = _load(path)
    # At regtest's limit every second changed header is valid by chance, a block of its own.
    assert loaded in {5, 6}
    assert cut == (10 - loaded) * 80
    assert chain.hash_at(5) == trunk[4][1]
    with HeaderFile.open(path, REGTEST) as file:
        file.load_into(HeaderChain(REGTEST))
        assert chain.extend(joined(trunk), FAR).rejection is None
        file.append(joined(trunk[5:]))
    assert _load(path)[0].tip_hash == trunk[-1][1]


def test_a_header_whose_parent_is_not_kept_is_passed_over(path: Path) -> None:
    trunk = mine_branch(REGTEST.genesis_hash, 0, 6)
    stranger, _ = mine(b"\5" * 32, bytes(32), GENESIS_TIME + 600, REGTEST.pow_limit_bits)
    with HeaderFile.open(path, REGTEST) as file:
        file.append(joined(trunk[:3]) + stranger + joined(trunk[3:]))
    chain, loaded, cut = _load(path)
    assert (loaded, cut, chain.tip_height) == (6, 0, 6)


@pytest.mark.parametrize("name", [name for name in NETWORKS if name != "regtest"])
def test_another_networks_file_is_refused_by_name_and_left_alone(path: Path, name: str) -> None:
    HeaderFile.open(path, NETWORKS[name]).close()
    before = path.read_bytes()
    with pytest.raises(HeaderFileError, match=rf"{path}.*{REGTEST.magic.hex()} \(regtest\)"):
        HeaderFile.open(path, REGTEST)
    assert path.read_bytes() == before


@pytest.mark.parametrize("content", [b"\x7fELF", b"S", b"SPRH\2\0\x50\0", bytes(80), bytes(4000)])
def test_a_file_of_another_format_is_refused_and_left_alone(path: Path, content: bytes) -> None:
    if content == b"S":
        content = b"Something else\n"
    path.write_bytes(content)
    with pytest.raises(HeaderFileError, match=str(path)):
        HeaderFile.open(path, MAIN)
    assert path.read_bytes() == content


def test_a_later_version_is_refused_with_both_versions_named(path: Path) -> None:
    HeaderFile.open(path, REGTEST).close()
    content = bytearray(path.read_bytes())
    content[4] = 2
    path.write_bytes(content)
    with pytest.raises(HeaderFileError, match=r"version 2 .* 1 with 80 was expected"):
        HeaderFile.open(path, REGTEST)


def test_a_file_in_use_is_refused_until_it_is_closed(path: Path) -> None:
    with HeaderFile.open(path, REGTEST) as file:
        with pytest.raises(HeaderFileError, match=f"{path}: another process holds it"):
            HeaderFile.open(path, REGTEST)
        file.close()
        HeaderFile.open(path, REGTEST).close()


def test_a_folder_that_is_missing_is_the_hosts_error_and_names_the_file(path: Path) -> None:
    with pytest.raises(HostError, match=str(path / "deep")):
        HeaderFile.open(path / "deep", REGTEST)


def test_a_length_that_is_no_whole_header_is_refused(path: Path) -> None:
    with HeaderFile.open(path, REGTEST) as file, pytest.raises(ValueError, match="80"):
        file.append(bytes(79))


def test_a_short_write_is_finished_by_another(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trunk = mine_branch(REGTEST.genesis_hash, 0, 4)
    write = os.write
    with HeaderFile.open(path, REGTEST) as file:
        monkeypatch.setattr("sprint.header_file.os.write", lambda fd, data: write(fd, data[:77]))
        file.append(joined(trunk))
        monkeypatch.undo()
    assert _load(path)[1:] == (4, 0)


def test_a_full_disk_leaves_the_file_as_it_was_and_later_headers_still_fit(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trunk = mine_branch(REGTEST.genesis_hash, 0, 4)
    write = os.write
    room = [100]

    def full(fd: int, data: memoryview) -> int:
        if not room[0]:
            raise OSError(28, "No space left on device")
        written = write(fd, data[: room[0]])
        room[0] -= written
        return written

    with HeaderFile.open(path, REGTEST) as file:
        file.append(trunk[0][0])
        before = path.read_bytes()
        monkeypatch.setattr("sprint.header_file.os.write", full)
        with pytest.raises(HostError, match=f"{path}.*240 bytes can't be written: No space"):
            file.append(joined(trunk[1:]))
        assert path.read_bytes() == before
        monkeypatch.undo()
        file.append(joined(trunk[1:]))
    assert _load(path)[1:] == (4, 0)


LIMITED_WRITER = textwrap.dedent(
    """
    import resource, sys
    from sprint.bench.synthetic import SYNTHETIC, synthetic_headers
    from sprint.errors import HostError
    from sprint.header_file import HeaderFile

    headers = next(synthetic_headers(20))
    with HeaderFile.open(sys.argv[1], SYNTHETIC) as file:
        file.append(headers[:240])
        unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, unlimited[1]))
        try:
            file.append(headers[240:])
        except HostError as error:
            print(error)
        print(open(sys.argv[1], "rb").seek(0, 2))
        resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
        file.append(headers[240:])
        print(open(sys.argv[1], "rb").seek(0, 2))
    """
)


def test_a_write_that_the_kernel_really_cuts_short_is_taken_back(path: Path) -> None:
    command = [sys.executable, "-c", LIMITED_WRITER, str(path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True)
    error, before, after = done.stdout.splitlines()
    assert error == f"header file {path}: 1360 bytes can't be written: File too large"
    assert (before, after) == (str(PREAMBLE + 3 * 80), str(PREAMBLE + 20 * 80))


WRITER = textwrap.dedent(
    """
    import sys
    from sprint.bench.synthetic import SYNTHETIC, synthetic_headers
    from sprint.chain import HeaderChain
    from sprint.header_file import HeaderFile

    chain = HeaderChain(SYNTHETIC)
    with HeaderFile.open(sys.argv[1], SYNTHETIC) as file:
        loaded = file.load_into(chain)
        print(loaded, flush=True)
        at = 0
        for piece in synthetic_headers(1 << 30, batch=7):
            at += len(piece) // 80
            if at <= chain.tip_height:
                continue
            result = chain.extend(piece, 1 << 32)
            assert result.rejection is None
            new = piece[result.duplicates * 80 :]
            file.append(new)
            if at % 700 == 0:
                print(at, flush=True)
    """
)


def test_a_writer_killed_at_any_moment_loses_nothing_it_had_written(path: Path) -> None:
    written = 0
    for lines in (1, 3, 5, 2):
        with subprocess.Popen(
            [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, cwd=Path(__file__).parents[2], text=True
        ) as writer:
            assert writer.stdout is not None
            assert int(writer.stdout.readline()) >= written
            for _ in range(lines):
                written = int(writer.stdout.readline())
            writer.send_signal(signal.SIGKILL)
            assert writer.wait() == -signal.SIGKILL
        assert (path.stat().st_size - PREAMBLE) // 80 >= written
