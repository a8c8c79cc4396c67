"""Fixtures of the tests that load BPF programs; without root, bcc or kernel headers they skip with that reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from xdp import loader

if TYPE_CHECKING:
    from collections.abc import Iterator

REGTEST_MAGIC = bytes.fromhex("fabfb5da")
REGTEST_PORT = 18444


@pytest.fixture(scope="session")
def bpf_loadable() -> None:
    """Skips what asks for it where no BPF program can be loaded."""
    reason = loader.missing()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(scope="module")
def loaded(bpf_loadable: None) -> Iterator[loader.Loaded]:
    """capture.c for regtest, loaded once for a module's tests and attached to nothing."""
    with loader.load(REGTEST_MAGIC, [REGTEST_PORT]) as programs:
        yield programs
