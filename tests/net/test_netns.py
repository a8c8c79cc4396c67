"""The aids of these tests hold what they promise: nothing is left behind, and the bad wire is bad as ordered."""

from __future__ import annotations

import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tests.net.forwarder import Counts, Policy, bad_wire
from tests.net.netns import Namespace, veth_pair
from tests.net.slowness import SLOWNESS

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces and links")
ROOT = Path(__file__).resolve().parents[2]


def transfer(near: Namespace, far: Namespace, address: str, data: bytes) -> bytes:
    """Send data by TCP from `near` to that address in `far`; what arrived."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    received = bytearray()
    with (
        far.open_socket(family, socket.SOCK_STREAM) as listener,
        near.open_socket(family, socket.SOCK_STREAM) as sender,
    ):
        for end in (listener, sender):
            end.settimeout(20 * SLOWNESS)
        listener.bind((address, 8333))
        listener.listen()

        def receive() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.settimeout(20 * SLOWNESS)
                while chunk := connection.recv(65536):
                    received.extend(chunk)

        reader = threading.Thread(target=receive)
        reader.start()
        sender.connect((address, 8333))
        sender.sendall(data)
        sender.shutdown(socket.SHUT_WR)
        reader.join()
    return bytes(received)


def through(policy: Policy, size: int, addresses: tuple[str, str] = ("10.3.0.1/24", "10.3.0.2/24")) -> Counts:
    data = random.Random(7).randbytes(size)
    with Namespace() as near, Namespace() as far, bad_wire(near, far, policy, addresses=addresses) as wire:
        assert transfer(near, far, addresses[1].partition("/")[0], data) == data
        return wire.stop()


@pytest.mark.parametrize("addresses", [("10.3.0.1/24", "10.3.0.2/24"), ("fd00:3::1/64", "fd00:3::2/64")])
def test_a_good_wire_carries_tcp_and_changes_nothing(addresses: tuple[str, str]) -> None:
    counts = through(Policy(), 1 << 20, addresses)
    assert counts.forwarded > 700
    assert (counts.lost, counts.duplicated, counts.held, counts.lost_once) == (0, 0, 0, 0)


def test_a_bad_wire_loses_doubles_and_reorders_and_tcp_still_gets_through() -> None:
    counts = through(Policy(loss=0.03, duplicate=0.05, reorder=0.05), 1 << 20)
    assert counts.lost > 0
    assert counts.duplicated > 10
    assert counts.held > 10


def test_one_frame_can_be_lost_by_what_is_in_it() -> None:
    data = random.Random(7).randbytes(1 << 20)
    counts = through(Policy(lose_once=data[500_000:500_016].hex()), 1 << 20)
    assert (counts.lost_once, counts.lost) == (1, 0)


def test_two_namespaces_may_use_the_same_names_and_addresses() -> None:
    with Namespace() as one, Namespace() as two, Namespace() as three, Namespace() as four:
        for near, far in ((one, two), (three, four)):
            veth_pair(near, far, addresses=("10.1.0.1/24", "10.1.0.2/24"))
            assert transfer(near, far, "10.1.0.2", b"hello") == b"hello"


KILLED = """
import os, sys
from tests.net.netns import Namespace, veth_pair
near = object.__new__(Namespace)
near.descriptor = os.open("/proc/self/ns/net", os.O_RDONLY)
far = Namespace()
veth_pair(near, far)
far.start(["sleep", "1000"])
print("made", flush=True)
sys.stdin.read()
"""


def test_a_killed_test_leaves_no_namespace_no_link_and_no_process() -> None:
    with Namespace() as space:
        command = [sys.executable, "-c", KILLED]
        with space.start(command, cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == b"made\n"
            assert space.names() == {"lo", "near"}
            process.send_signal(signal.SIGKILL)
        # The far end lies in a namespace that the killed process made, where its child was: this end goes with both.
        deadline = time.monotonic() + 10
        while space.names() != {"lo"}:
            assert time.monotonic() < deadline, "the namespace of the killed process lives on"
            os.sched_yield()
