"""Fixtures of the tests that load BPF programs; without root, bcc or kernel headers they skip with that reason."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from tests.net.netns import Namespace, veth_pair
from tests.net.slowness import SLOWNESS
from tests.net.subscribers import SOURCE_PORT, Cable, switch_gro
from xdp import features, loader
from xdp.fanout import Fanout, open_fanout
from xdp.fanout_maps import Sender
from xdp.fanout_run import FanoutRun
from xdp.fanout_table import FanoutTable
from xdp.features import Feature

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


@pytest.fixture(scope="session")
def tcx(bpf_loadable: None) -> bool:
    """Whether this kernel has links for tc (6.6). Before, a filter on the interface outlives who attached it."""
    trials = (features.probe(Feature.TCX).available for _ in range(SLOWNESS))
    found = next((trial for trial in trials if trial is not None), None)
    assert found is not None
    return found


@pytest.fixture(scope="session")
def capture_programs(bpf_loadable: None) -> Iterator[loader.Loaded]:
    """capture.c, loaded once: seconds here, minutes where the machine is emulated."""
    with loader.load(REGTEST_MAGIC, [REGTEST_PORT], timeout_s=loader.TIMEOUT_S * SLOWNESS) as programs:
        yield programs


@pytest.fixture(scope="module")
def loaded(capture_programs: loader.Loaded) -> loader.Loaded:
    """capture.c for regtest, as a module's tests find it, and attached to nothing."""
    capture_programs.watch([REGTEST_PORT])
    capture_programs.configure(express=1, wakeup=1, mirror_ifindex=0, every_magic=1)
    return capture_programs


# ── the fan-out ──


@pytest.fixture(scope="module")
def launch(bpf_loadable: None) -> Iterator[Namespace]:
    """The namespace that the module's tests are in."""
    with Namespace() as space, space.entered():
        yield space


@pytest.fixture(scope="module")
def fanout(launch: Namespace) -> Iterator[Fanout]:
    with open_fanout(loader.TIMEOUT_S * SLOWNESS) as opened:
        yield opened


@pytest.fixture
def far() -> Iterator[Namespace]:
    with Namespace() as space:
        yield space


@pytest.fixture
def cable(launch: Namespace, far: Namespace) -> Iterator[Cable]:
    pair = Cable(*veth_pair(launch, far))
    switch_gro(pair.far, on=True)
    yield pair
    launch.delete_link(pair.near.name)


@pytest.fixture
def second(launch: Namespace, far: Namespace) -> Iterator[Cable]:
    pair = Cable(*veth_pair(launch, far, ("near2", "far2")))
    switch_gro(pair.far, on=True)
    yield pair
    launch.delete_link(pair.near.name)


@pytest.fixture
def table(fanout: Fanout) -> Iterator[FanoutTable]:
    with FanoutTable(fanout.handover(), SOURCE_PORT) as made:
        yield made


@pytest.fixture
def run(fanout: Fanout) -> Iterator[FanoutRun]:
    with FanoutRun(fanout.handover(), Sender.RELAY) as made:
        yield made
