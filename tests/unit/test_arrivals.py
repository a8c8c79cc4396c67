from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sprint.arrivals import MAX_SPAN, Arrivals
from sprint.errors import RemoteProtocolError
from sprint.events import Lapped

steps = st.lists(
    st.one_of(
        st.tuples(st.just("take"), st.integers(0, 40), st.just(1)),
        st.tuples(st.just("lose"), st.integers(1, 40), st.integers(1, 12)),
        st.tuples(st.just("expect"), st.integers(0, 40), st.just(1)),
        st.tuples(st.just("doubt"), st.integers(0, 40), st.just(1)),
    ),
    max_size=40,
)


@settings(deadline=None)
@given(st.integers(0, 10), steps)
def test_it_says_what_a_plain_set_of_sequences_says(settled: int, todo: list[tuple[str, int, int]]) -> None:
    arrivals = Arrivals(settled)
    have, known = set(range(settled + 1)), settled
    for what, sequence, count in todo:
        if what == "take":
            assert arrivals.take(sequence) is (sequence not in have)
            have.add(sequence)
            known = max(known, sequence)
        elif what == "lose":
            lost = {one for run in arrivals.lose(sequence, count) for one in range(run.first, run.first + run.lost)}
            assert lost == set(range(sequence, sequence + count)) - have
            have |= lost
            known = max(known, sequence + count - 1)
        elif what == "expect":
            arrivals.expect(sequence)
            known = max(known, sequence)
        else:
            arrivals.doubt(sequence)
            known = max(sequence, *have)
        missing = sorted(set(range(known + 1)) - have)
        watermark = (missing[0] if missing else max(known, *have) + 1) - 1
        assert arrivals.settled >= settled
        span = arrivals.missing(7)
        if not missing:
            assert span is None
        else:
            assert arrivals.settled == watermark
            assert span is not None
            assert span.first == missing[0]
            assert span.first + span.lost - 1 == max(one for one in missing if one < missing[0] + 7)


def test_losses_are_told_in_runs_around_what_came() -> None:
    arrivals = Arrivals(10)
    assert arrivals.take(13)
    assert arrivals.lose(8, 8) == [Lapped(11, 2), Lapped(14, 2)]
    assert arrivals.lose(8, 8) == []
    assert arrivals.settled == 15


def test_what_is_kept_is_bounded_whatever_is_told() -> None:
    arrivals = Arrivals(0)
    with pytest.raises(RemoteProtocolError):
        arrivals.take(MAX_SPAN + 1)
    with pytest.raises(RemoteProtocolError):
        arrivals.expect(1 << 63)
    with pytest.raises(RemoteProtocolError):
        arrivals.lose(5, 1 << 62)
    assert arrivals.lose(1, 1 << 62) == [Lapped(1, 1 << 62)]
    assert arrivals.settled == 1 << 62
