"""Both ways to wake another process: a signal is never lost, many become one, and the writer never waits."""

from __future__ import annotations

import os
import select
import socket
from typing import TYPE_CHECKING

import pytest

from sprint.channels import EventChannel, SocketChannel
from tests.unit.shm_host import PATIENCE_S, ended, fork

if TYPE_CHECKING:
    from collections.abc import Iterator

    from sprint.channels import Channel


@pytest.fixture(params=[EventChannel, SocketChannel])
def channel(request: pytest.FixtureRequest) -> Iterator[Channel]:
    made: Channel = request.param()
    yield made
    if isinstance(made, SocketChannel):
        made._socket.close()
    else:
        os.close(made.fileno())


def readable(channel: Channel, timeout_s: float = 0) -> bool:
    waiting = select.poll()
    waiting.register(channel.fileno(), select.POLLIN)
    return bool(waiting.poll(timeout_s * 1000))


def test_a_channel_is_readable_from_a_signal_until_it_is_drained(channel: Channel) -> None:
    assert not readable(channel)
    channel.publish()
    assert readable(channel, PATIENCE_S)
    channel.drain()
    assert not readable(channel)


def test_signals_that_nobody_has_read_become_one(channel: Channel) -> None:
    for _ in range(1000):
        channel.publish()
    assert readable(channel, PATIENCE_S)
    channel.drain()
    assert not readable(channel)


def test_draining_an_empty_channel_does_not_wait(channel: Channel) -> None:
    channel.drain()
    assert not readable(channel)


def test_the_writer_never_waits_for_a_reader_that_never_reads(channel: Channel) -> None:
    for _ in range(20_000):
        channel.publish()
    assert readable(channel, PATIENCE_S)


def test_a_signal_reaches_a_process_that_was_forked_before_it(channel: Channel) -> None:
    def life() -> None:
        assert readable(channel, PATIENCE_S)
        channel.drain()

    child = fork(life)
    channel.publish()
    assert ended(child) == 0
    assert not readable(channel)


def test_signals_wait_for_a_reader_that_takes_its_predecessor_s_place(channel: Channel) -> None:
    assert ended(fork(channel.publish)) == 0
    assert ended(fork(lambda: None)) == 0
    assert readable(channel, PATIENCE_S)


def test_an_eventfd_that_is_full_has_told_all_there_is_to_tell() -> None:
    channel = EventChannel()
    os.eventfd_write(channel.fileno(), (1 << 64) - 2)
    channel.publish()
    assert readable(channel)
    channel.drain()
    assert not readable(channel)
    os.close(channel.fileno())


def test_a_stranger_s_datagram_does_not_wake_a_socket_channel() -> None:
    channel = SocketChannel()
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as stranger:
        stranger.sendto(b"x", channel._socket.getsockname())
        assert not readable(channel, 0.05)
    channel._socket.close()


def test_no_descriptor_of_a_channel_is_inherited_over_exec(channel: Channel) -> None:
    assert not os.get_inheritable(channel.fileno())
