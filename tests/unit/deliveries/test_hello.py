from __future__ import annotations

import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sprint.addresses import Address
from sprint.deliveries.hello import MAX_HELLO, MAX_KEY, Hello, Refusal, read_hello, refusal_line, welcome_line
from sprint.frames import Format
from sprint.tiers import Tier

ACCEPTED = [
    (b"{}", Hello()),
    (b"{}\r\n", Hello()),
    (b'{"format":"json"}\n', Hello(format=Format.JSON)),
    (b'{"format":"binary"}\n', Hello(format=Format.BINARY)),
    (b'{"key":"abc","since":1}', Hello("abc", 1)),
    (b'{"since":18446744073709551615}', Hello(None, (1 << 64) - 1)),
    (b'{"udp":":9"}', Hello(udp=Address("", 9))),
    (b'{"udp":"127.0.0.1:9"}', Hello(udp=Address("127.0.0.1", 9))),
    (b'{"udp":"[2001:DB8::1]:9"}', Hello(udp=Address("2001:db8::1", 9))),
    (b'{"udp":"[::ffff:192.0.2.1]:9"}', Hello(udp=Address("192.0.2.1", 9))),
    (b'{"key":null,"since":null,"format":null,"udp":null}', Hello()),
]

REFUSED = [
    (b"", "not JSON"),
    (b"\n", "not JSON"),
    (b"GET / HTTP/1.1\r\n", "not JSON"),
    (b'{"since":1', "not JSON"),
    (b"\xff{}", "not JSON"),
    (b"[" * 4000, "not JSON"),
    (b"[]", "not an object"),
    (b'"json"', "not an object"),
    (b"null", "not an object"),
    (b'{"sinse":1}', "unknown key 'sinse'"),
    (b'{"\\ud800":1}', "unknown key"),
    (b'{"since":0}', "since"),
    (b'{"since":-1}', "since"),
    (b'{"since":true}', "since"),
    (b'{"since":1.5}', "since"),
    (b'{"since":"1"}', "since"),
    (b'{"since":18446744073709551616}', "since"),
    (b'{"since":' + b"9" * 4000 + b"}", "since|not JSON"),  # Python 3.10 has no limit on digits
    (b'{"format":"xml"}', "format: expected binary or json"),
    (b'{"format":1}', "format"),
    (b'{"format":[]}', "format"),
    (b'{"key":""}', "key"),
    (b'{"key":7}', "key"),
    (b'{"key":"\\ud800"}', "key"),
    (b'{"key":"a\\u0000"}', "key"),
    (b'{"key":"' + b"k" * (MAX_KEY + 1) + b'"}', "key"),
    (b'{"udp":9}', "udp: expected"),
    (b'{"udp":""}', "udp: expected"),
    (b'{"udp":":0"}', "udp: expected"),
    (b'{"udp":":65536"}', "udp: expected"),
    (b'{"udp":"localhost:9"}', "udp: expected"),
    (b'{"udp":"127.0.0.1"}', "udp: expected"),
    (b'{"udp":"0.0.0.0:9"}', "udp: expected"),
    (b'{"udp":"[::]:9"}', "udp: expected"),
    (b'{"udp":"224.0.0.1:9"}', "udp: expected"),
    (b'{"udp":"255.255.255.255:9"}', "udp: expected"),
    (b'{"udp":"[ff02::1]:9"}', "udp: expected"),
    (b'{"udp":"[fe80::1%eth0]:9"}', "udp: expected"),
    (b'{"udp":":' + b"9" * 100 + b'"}', "udp: expected"),
    (b"{" + b" " * MAX_HELLO + b"}", "longer than 4096"),
]


@pytest.mark.parametrize(("line", "hello"), ACCEPTED)
def test_a_hello_asks_for_what_it_names_and_the_defaults(line: bytes, hello: Hello) -> None:
    assert read_hello(line) == hello


@pytest.mark.parametrize(("line", "words"), REFUSED)
def test_anything_else_is_refused_in_words(line: bytes, words: str) -> None:
    refusal = read_hello(line)
    assert isinstance(refusal, Refusal)
    assert any(word in refusal.error for word in words.split("|"))
    assert json.loads(refusal_line(refusal)) == {"error": refusal.error}
    assert len(refusal_line(refusal)) < 256


@settings(deadline=None)
@given(st.binary(max_size=200))
def test_no_bytes_make_the_reader_fail(line: bytes) -> None:
    assert isinstance(read_hello(line), (Hello, Refusal))


def test_the_welcome_tells_tier_deadline_sequences_session_network_and_format() -> None:
    line = welcome_line(Tier.TURBO, 500_000, oldest=3, next_sequence=9, session=0xABC, network="main", form=Format.JSON)
    assert (
        line
        == (
            '{"tier":"turbo","writeDeadline":"500µs","oldest":3,"next":9,'
            '"session":"0000000000000abc","network":"main","format":"json"}\n'
        ).encode()
    )


def test_a_refusal_that_may_pass_says_so() -> None:
    assert json.loads(refusal_line(Refusal("too many subscribers", retry=True))) == {
        "error": "too many subscribers",
        "retry": True,
    }
