from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sprint.bench.synthetic import SYNTHETIC, synthetic_headers
from sprint.bench.wire_headers import measure_headers, verify

if TYPE_CHECKING:
    from pathlib import Path


def test_the_figures_come_from_fresh_processes_that_verified_every_header() -> None:
    steps: list[tuple[str, int, int]] = []
    result = measure_headers(5000, lambda *step: steps.append(step), runs=2)
    assert (result["tip_height"], result["headers"], result["retargets"], result["runs"]) == (5000, 5000, 2, 2)
    assert result["retargets_that_changed_bits"] == 2
    assert result["headers_per_second"] > 0
    assert 0 < result["chain_rss_mb"] <= result["chain_peak_rss_mb"]
    assert steps[-1] == ("verifying headers, run", 2, 2)


def test_a_chain_with_one_bad_header_yields_no_figures(tmp_path: Path) -> None:
    headers = bytearray(b"".join(synthetic_headers(3000)))
    headers[2500 * 80 + 4] ^= 1
    path = tmp_path / "headers"
    path.write_bytes(headers)
    with pytest.raises(RuntimeError, match="header 2501 was refused"):
        verify(path)


def test_the_synthetic_chain_is_the_same_each_time_and_in_any_pieces() -> None:
    assert b"".join(synthetic_headers(700, batch=33)) == next(synthetic_headers(700))
    assert SYNTHETIC.interval == 2016
