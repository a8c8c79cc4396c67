"""docs/shared-memory.md says what the code does, and the reader in C beside it runs as it stands."""

from __future__ import annotations

import json
import platform
import re
import shutil
import signal
import subprocess
from contextlib import closing, contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

import pytest

from sprint import ring as ring_module
from sprint.deliveries.gate import OpenGate
from sprint.deliveries.hello import MAX_HELLO, Hello, read_hello
from sprint.deliveries.requests import MAX_EXTRA
from sprint.deliveries.shm import MODE
from sprint.deliveries.stream import HELLO_TIMEOUT_NS
from sprint.ring import HEADER_SIZE, LAYOUT, MAGIC, Ring, RingWriter, size_for
from sprint.tiers import NS_PER_S, Tier
from tests.unit.shm_host import SESSION, Client, record_of, refusal, serving, until

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "shared-memory.md").read_text(encoding="utf-8")
SOURCE = ROOT / "docs" / "shared_reader.c"
BLOCKS: dict[str, str] = {match[1]: match[2] for match in re.finditer(r"```json ([\w-]+)\n(.*?)```", PAGE, re.DOTALL)}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "shm.sock"


# The page


def test_every_example_on_the_page_is_checked_here() -> None:
    assert set(BLOCKS) == {"hello", "welcome", "refusal"}


def test_the_hello_on_the_page_is_answered_as_the_page_says(path: Path) -> None:
    assert read_hello(BLOCKS["hello"].encode()) == Hello("k-123")
    with (
        serving(path, slots=2048, network="main", gate=OpenGate(lambda _: ring_tier())) as host,
        closing(Client(path, BLOCKS["hello"].encode())) as client,
    ):
        assert host.ring.session == SESSION
        said = json.loads(BLOCKS["welcome"])
        assert client.answer() == {**said, "session": f"{SESSION:016x}"}
        assert len(client.descriptors) == 2
    with serving(path) as host:
        assert refusal(path, b'{"key":"pro"}\n') == json.loads(BLOCKS["refusal"])


def ring_tier() -> Tier:
    return Tier.TURBO


def test_the_offsets_on_the_page_are_where_the_ring_keeps_its_index() -> None:
    rows = dict(re.findall(r"^\| (\d+) \| (\w+)", PAGE, re.MULTILINE))
    slots = 5
    memory = bytearray(size_for(slots))
    ring = Ring.create(memory, slots, SESSION)
    writer = RingWriter(ring)
    for sequence in range(1, 4):
        writer.claim()[:] = record_of(sequence)
        writer.commit(best=sequence == 2)
    writer.claim()
    expected = {
        "magic": MAGIC,
        "layout": LAYOUT,
        "slots": slots,
        "record": 192,
        "session": SESSION,
        "intent": 4,
        "tail": 3,
        "best": 2,
    }
    words = {name: int.from_bytes(memory[int(at) : int(at) + 8], "little") for at, name in rows.items()}
    assert {name: words[name] for name in expected} == expected
    assert rows[str(HEADER_SIZE)] == "slot"
    for sequence in range(1, 4):
        at = HEADER_SIZE + 192 * ((sequence - 1) % slots)
        assert bytes(memory[at : at + 192]) == ring.copy(sequence)
    assert "`SPRRING1`" in PAGE
    assert MAGIC.to_bytes(8, "little") == b"SPRRING1"
    assert [name for name in rows.values() if name not in expected] == ["slot"]


def test_the_bounds_on_the_page_are_the_code_s() -> None:
    assert f"at most {MAX_HELLO:,} bytes with its line feed, within {HELLO_TIMEOUT_NS // NS_PER_S} seconds" in PAGE
    assert f"{MAX_EXTRA:,} bytes are ignored" in PAGE
    assert f"mode {MODE:04o}" in PAGE
    assert ring_module.LAYOUT == 1


def test_the_page_points_to_the_reader_in_c_and_says_how_it_is_compiled() -> None:
    assert "(shared_reader.c)" in PAGE
    assert f"`{' '.join(GCC)}`" in PAGE


# The reader in C

GCC = ("gcc", "-Wall", "-Wextra", "-Werror", "-O2")
needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="there is no gcc to compile the reader in C with")
needs_x86 = pytest.mark.skipif(
    platform.machine().lower() not in ("x86_64", "amd64"), reason="the ring between processes needs x86-64"
)


@pytest.fixture(scope="module")
def program(tmp_path_factory: pytest.TempPathFactory) -> Path:
    compiled = tmp_path_factory.mktemp("c") / "shared_reader"
    built = subprocess.run([*GCC, "-o", compiled, SOURCE], capture_output=True, text=True, check=False)
    assert (built.returncode, built.stderr) == (0, "")
    return compiled


class Running:
    """The program, and the lines it prints."""

    def __init__(self, process: subprocess.Popen[str], output: IO[str]) -> None:
        self.process = process
        self.output = output

    def line(self) -> str:
        return self.output.readline().rstrip("\n")


@contextmanager
def running(program: Path, *arguments: object) -> Iterator[Running]:
    with subprocess.Popen([program, *map(str, arguments)], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield Running(process, process.stdout)
        finally:
            process.kill()


def printed(sequence: int) -> str:
    """As the program should print record_of(sequence), whose hash is its sequence in wire order."""
    return f"{sequence} 1 {sequence:064x}"


@needs_gcc
@needs_x86
def test_the_reader_in_c_prints_every_record_as_it_comes(program: Path, path: Path) -> None:
    with serving(path, slots=64) as host:
        host.put(5)
        with running(program, path, "turbo") as c:
            assert json.loads(c.line())["slots"] == 64
            until(lambda: _is_waiting(c.process.pid))
            for sequence in range(6, 206):
                host.put()
                assert c.line() == printed(sequence)
            host.put(50)
            assert [c.line() for _ in range(50)] == [printed(sequence) for sequence in range(206, 256)]


@needs_gcc
@needs_x86
def test_the_reader_in_c_tells_what_it_lost_and_goes_on_with_the_oldest_that_is_left(program: Path, path: Path) -> None:
    with serving(path, slots=8) as host, running(program, path, "enterprise") as c:
        assert json.loads(c.line())["tier"] == "enterprise"
        until(lambda: _is_waiting(c.process.pid))
        host.put(2)
        assert [c.line(), c.line()] == [printed(1), printed(2)]
        until(lambda: _is_waiting(c.process.pid))
        c.process.send_signal(signal.SIGSTOP)
        until(lambda: _state(c.process.pid) == "T")
        host.put(20)
        host.writer.claim()[:] = bytes(192)  # and one more is begun: its slot is gone already
        c.process.send_signal(signal.SIGCONT)
        assert c.line() == "lost 13 from 3"
        assert [c.line() for _ in range(7)] == [printed(sequence) for sequence in range(16, 23)]


@needs_gcc
@needs_x86
def test_the_reader_in_c_keeps_its_account_of_a_hundred_thousand_records(program: Path, path: Path) -> None:
    count = 100_000
    with serving(path, slots=512) as host, running(program, path, "turbo") as c:
        c.line()
        until(lambda: _is_waiting(c.process.pid))
        writer = host.writer
        record = bytearray(record_of(1))
        for sequence in range(1, count + 1):
            slot = writer.claim()
            record[64:72] = sequence.to_bytes(8, "little")
            slot[:64], slot[64:] = record[:64], record[64:]
            writer.commit(best=True)
            if not sequence & 63:
                host.channel.publish()
        host.channel.publish()
        following = 1
        while following <= count:
            words = c.line().split()
            if words[0] == "lost":
                assert (int(words[1]) > 0, int(words[3])) == (True, following)
                following += int(words[1])
            else:
                assert words == printed(following).split()
                following += 1


@needs_gcc
@needs_x86
def test_the_reader_in_c_ends_when_the_server_does_or_refuses_it(program: Path, path: Path) -> None:
    with serving(path) as host, running(program, path) as c:
        assert json.loads(c.line()) == {"error": "tier free has no shared memory: enterprise and turbo have"}
        assert c.process.wait(60) == 3
    with serving(path, max_readers=1) as host, closing(Client(path)) as client:
        client.answer()
        for _ in range(20):  # whether it is refused before or after it has said its hello
            with running(program, path, "turbo") as c:
                assert json.loads(c.line()) == {"error": "too many subscribers", "retry": True}
                assert c.process.wait(60) == 3
    with serving(path) as host, running(program, path, "turbo") as c:
        c.line()
        until(lambda: _is_waiting(c.process.pid))
        host.kill_worker()
        assert c.process.wait(60) == 0


def _state(pid: int) -> str:
    """The letter that /proc has for what the process does."""
    return Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]


def _is_waiting(pid: int) -> bool:
    return "epoll" in Path(f"/proc/{pid}/wchan").read_text(encoding="ascii")
