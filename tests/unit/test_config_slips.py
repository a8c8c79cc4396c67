"""What slips into configurations without being meant: blanks around values, blank values, settings that stand twice."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from sprint.config import ENV_FILE, load
from sprint.errors import ConfigError
from sprint.settings import variables
from sprint.tiers import Tier

if TYPE_CHECKING:
    from pathlib import Path

GOOD = {
    "TIER": "turbo",
    "WRITE_DEADLINE": "700us",
    "BLOCK_BUFFER_SIZE": "2048",
    "NETWORK": "regtest",
    "INTERFACE": "eth7",
    "CAPTURE": "ringbuf",
    "BITCOIN_NODE": "127.0.0.1:1",
    "ZMQ_NODE": "127.0.0.1:2",
    "ZMQ_PROOF": "header",
    "CONNECTIONS_PER_ADDRESS": "7",
    "DELIVERY_WORKERS": "3",
    "SHM_SOCKET": "/run/here.sock",
    "DATA_DIR": "/srv/here",
    "LOG_FORMAT": "json",
    **dict.fromkeys(("API_BIND", "STREAM_BIND", "UDP_BIND", "ZMQ_BIND"), "127.0.0.1:3"),
    **dict.fromkeys(
        ("USE_SHARED_MEMORY", "USE_DIRECT_P2P", "USE_MEMORY_CHANNEL", "OPTIMIZE_SYSTEM", "ENABLE_KERNEL_BYPASS"), "on"
    ),
}
NAMES = [variable.name for variable in variables()]


def test_the_good_values_here_cover_every_variable() -> None:
    assert set(GOOD) == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_blanks_around_a_value_mean_nothing(name: str, tmp_path: Path) -> None:
    assert load({name: f" \t{GOOD[name]} "}, tmp_path) == load({name: GOOD[name]}, tmp_path)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("value", [" ", "\t", "a\nb", "\x1b[2J", "\u202ex", "\udcff"])
def test_blanks_alone_and_what_cannot_be_printed_are_refused_in_one_line(name: str, value: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        load({name: value}, tmp_path)
    line = str(refused.value)
    assert line.startswith(f"{name}=")
    assert line.replace("\t", "").isprintable()
    assert "\n" not in line


def test_a_setting_that_stands_twice_in_the_file_is_warned_of_once_and_the_last_counts(tmp_path: Path) -> None:
    (tmp_path / ENV_FILE).write_text("TIER=pro\nNETWORK=regtest\nTIER=free\nexport TIER=turbo\n", encoding="utf-8")
    loaded = load({}, tmp_path)
    assert loaded.tier is Tier.TURBO
    assert loaded.warnings == (".env: TIER is set more than once: the last one counts",)
