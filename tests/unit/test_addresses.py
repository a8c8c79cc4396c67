from __future__ import annotations

import socket

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sprint.addresses import MAX_HOST_LENGTH, Address, parse_address

WRITTEN = [
    ("localhost:8333", "localhost", 8333),
    ("  127.0.0.1:1 ", "127.0.0.1", 1),
    ("turbo-node_1.internal.:65535", "turbo-node_1.internal.", 65535),
    ("bücher.example:80", "bücher.example", 80),
    ("[::1]:8333", "::1", 8333),
    ("[2001:db8::1]:00080", "2001:db8::1", 80),
    ("[fe80::1%eth1]:8333", "fe80::1%eth1", 8333),
    ("[::ffff:192.0.2.1]:8333", "::ffff:192.0.2.1", 8333),
]
WITHOUT_PORT = [("localhost", "localhost"), ("::1", "::1"), ("[::1]", "::1"), ("2001:db8::1", "2001:db8::1")]
NO_HOST = [
    *("", " ", ":80", "[]:80", "two words:80", "a@b:80", "a,b:80", "http://a:80", "a/b:80", "a\tb:80", "a\nb:80"),
    *("a\x00b:80", "\x1b2J:80", "a\u202eb:80", "\udc80:80", "a..b:80", ".a:80", "x" * 64 + ".example:80"),
    *("[localhost]:80", "[127.0.0.1]:80", "[::1%]:80", "::1:x", "127.0.0.1:80:80", "1:2:3", "[::1\n]:80"),
    *("a]:80", "[[::1]:80", "x." * (MAX_HOST_LENGTH // 2 + 1) + "y:80"),
]
NO_PORT = ["a:0", "a:65536", "a:-1", "a:+1", "a:1.0", "a: 80", "a:8 0", "a:٨٠", "a:0x50", "a:http", "[::1]:70000"]
# What int() of the first few digits would take for a good port.
NO_PORT += ["a:000080801", "a:0000008080", "a:" + "0" * 5_000 + "80", "a:" + "8" * 5_000]


@pytest.mark.parametrize(("text", "host", "port"), WRITTEN)
def test_a_host_and_its_port_are_told_apart(text: str, host: str, port: int) -> None:
    assert parse_address(text) == Address(host, port)
    assert parse_address(text, default_port=7) == Address(host, port)


@pytest.mark.parametrize(("text", "host"), WITHOUT_PORT)
def test_without_a_port_the_default_counts_and_without_a_default_one_is_demanded(text: str, host: str) -> None:
    assert parse_address(text, default_port=18444) == Address(host, 18444)
    with pytest.raises(ValueError, match="a port is missing"):
        parse_address(text)


@pytest.mark.parametrize("text", ["localhost:", "[::1]:"])
def test_a_colon_without_a_port_is_refused_even_with_a_default(text: str) -> None:
    with pytest.raises(ValueError, match="a port is missing behind the colon"):
        parse_address(text, default_port=8333)


@pytest.mark.parametrize("text", ["[::1", "[::1]8333", "[::1]x:80", "[::1:8333", "[[::1]]:80"])
def test_brackets_that_do_not_close_around_the_address_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"expected \[address\]:port"):
        parse_address(text)


@pytest.mark.parametrize("text", NO_HOST)
def test_what_no_resolver_can_be_asked_for_is_no_host(text: str) -> None:
    with pytest.raises(ValueError, match="expected host:port"):
        parse_address(text, default_port=8333)


@pytest.mark.parametrize("text", NO_PORT)
def test_a_port_out_of_range_or_not_a_number_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="expected 1 to 65535") as caught:
        parse_address(text, default_port=8333)
    assert len(str(caught.value)) < 80


def test_port_0_is_for_those_who_bind_only() -> None:
    assert parse_address("localhost:0", lowest_port=0) == Address("localhost", 0)
    with pytest.raises(ValueError, match="expected 0 to 65535"):
        parse_address("localhost:65536", lowest_port=0)


@given(st.one_of(st.text(max_size=60), st.text("0123456789abf.:[]%@/, \n\x1b", max_size=40)))
def test_any_text_is_an_address_that_reads_back_or_a_plain_complaint(text: str) -> None:
    try:
        address = parse_address(text, default_port=8333)
    except ValueError as error:
        complaint: str | None = str(error)
    else:
        complaint = None
        assert parse_address(str(address)) == address
        assert 1 <= address.port <= 65_535
    if complaint is not None:
        assert complaint.isprintable()
        assert "expected" in complaint or "missing" in complaint


@given(st.text(max_size=60))
def test_whatever_is_taken_for_a_host_makes_the_resolver_fail_in_its_own_way_only(host: str) -> None:
    try:
        address = parse_address(host, default_port=8333)
    except ValueError:
        return
    numeric = socket.AI_NUMERICHOST | socket.AI_NUMERICSERV  # nothing is asked of any server
    try:
        found = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM, flags=numeric)
    except OSError:
        found = []
    assert all(entry[4][1] == 8333 for entry in found)
