"""Kernel features as tried, beside what the kernel does when really asked; and that trying leaves no trace."""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import subprocess
import sys
import threading
from typing import TYPE_CHECKING

import pytest

from tests.descriptors import open_descriptors
from tests.net.netns import Namespace, Veth, veth_pair
from tests.net.tiny_bpf import EXIT, XDP, XDP_PASS, attach_xdp, load_program, mov
from xdp import features
from xdp.features import (
    SINCE,
    Feature,
    UntriedError,
    can_be_redirected_to,
    devmap_xmit_tracepoint,
    in_own_namespace,
    live_frames,
    probe,
    probe_all,
    release_number,
)
from xdp.interfaces import interfaces
from xdp.netdev import XdpFeature, xdp_features

if TYPE_CHECKING:
    from collections.abc import Iterator

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: loads programs, makes namespaces and links")
NOBODY = 65_534


@pytest.fixture
def pair() -> Iterator[tuple[Veth, Veth]]:
    """In a namespace that the test is in."""
    with Namespace() as space, space.entered():
        yield veth_pair(space, space, ("nic", "wire"))


@needs_root
@pytest.mark.parametrize("feature", Feature)
def test_a_kernel_that_should_have_a_feature_has_it(feature: Feature) -> None:
    found = probe(feature)
    number = release_number(os.uname().release)
    assert number is not None
    if number >= SINCE[feature]:
        assert found.available, found.detail
    else:
        assert not found.available
    assert (found.feature, "\n" in found.detail) == (feature, False)


@needs_root
def test_trying_everything_leaves_no_link_no_descriptor_and_no_thread() -> None:
    probe_all()
    descriptors, threads = len(open_descriptors()), threading.active_count()
    probe_all()
    assert len(open_descriptors()) == descriptors
    assert threading.active_count() <= threads  # on a very slow machine the first time ran out, and its thread goes on
    assert not {"near", "far"} & {each.name for each in interfaces()}


def test_whoever_may_not_try_learns_nothing_about_the_kernel() -> None:
    """In a child that gives up root: untried, with the version as a hint, and nothing raised."""
    script = (
        "import os, sys\n"
        "if os.geteuid() == 0:\n"
        f"    os.setgroups([]); os.setresgid(*[{NOBODY}] * 3); os.setresuid(*[{NOBODY}] * 3)\n"
        "from xdp.features import probe_all\n"
        "for found in probe_all():\n"
        "    print(found.feature.name, found.available, found.detail, sep='\\t')\n"
    )
    environ = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environ, capture_output=True, text=True, timeout=60, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    told = {
        name: (available, detail) for name, available, detail in (line.split("\t") for line in done.stdout.splitlines())
    }
    assert set(told) == {feature.name for feature in Feature}
    for feature in (Feature.TCX, Feature.AF_XDP, Feature.XDP_LINK, Feature.NDO_XMIT):
        available, detail = told[feature.name]
        assert available == "None"
        assert "Operation not permitted" in detail
        assert os.uname().release in detail
    assert told["BTF"][0] in {"True", "False"}


@needs_root
def test_a_kernel_without_a_feature_is_told_by_its_own_words(monkeypatch: pytest.MonkeyPatch) -> None:
    """No kernel has that kind of map."""
    monkeypatch.setattr(features, "_RINGBUF", 9_999)
    found = probe(Feature.RING_BUFFER)
    assert (found.available, found.detail) == (False, "BPF_MAP_CREATE: Invalid argument")


@needs_root
def test_where_no_veth_pair_can_be_made_nothing_else_is_blamed(monkeypatch: pytest.MonkeyPatch) -> None:
    @contextlib.contextmanager
    def refuse(what: str) -> Iterator[None]:
        raise OSError(errno.EOPNOTSUPP, f"{what}: Operation not supported")
        yield

    monkeypatch.setattr(features, "rtnetlink", refuse)
    found = {each.feature: each for each in probe_all()}
    assert found[Feature.VETH].available is False
    for feature in (Feature.XDP_LINK, Feature.AF_XDP, Feature.TCX, Feature.NDO_XMIT):
        assert found[feature].available is None
        assert "a veth pair: Operation not supported" in found[feature].detail
    assert found[Feature.XDP].available


@pytest.mark.parametrize(
    ("error", "available"),
    [
        (OSError(errno.EPERM, "no"), None),
        (OSError(errno.EMFILE, "full"), None),
        (UntriedError("no way"), None),
        (OSError(errno.EINVAL, "what?"), False),
        (OSError("bpf(2) has no known number on riscv64"), False),
    ],
)
def test_a_refusal_says_something_about_the_kernel_or_about_us(
    monkeypatch: pytest.MonkeyPatch, error: Exception, available: bool | None
) -> None:
    def refuse() -> str:
        raise error

    monkeypatch.setitem(features._ALONE, Feature.XDP, refuse)
    assert probe(Feature.XDP).available is available


@needs_root
def test_the_short_answers_are_those_of_the_trials() -> None:
    assert live_frames() is probe(Feature.LIVE_FRAMES).available
    assert devmap_xmit_tracepoint() is probe(Feature.DEVMAP_XMIT).available


@needs_root
def test_a_veth_can_be_redirected_to_while_its_peer_runs_xdp(pair: tuple[Veth, Veth]) -> None:
    nic, wire = pair
    if can_be_redirected_to(nic.index) is None:
        pytest.skip("before Linux 6.3 the kernel doesn't tell")
    assert can_be_redirected_to(nic.index) is False
    with load_program(XDP, mov(0, XDP_PASS), EXIT) as program, attach_xdp(program, wire.index):
        assert can_be_redirected_to(nic.index) is True
    assert can_be_redirected_to(nic.index) is False
    told = xdp_features(nic.index)
    assert told is not None
    assert XdpFeature.BASIC | XdpFeature.REDIRECT in told


@needs_root
def test_work_in_a_namespace_of_its_own_is_in_no_other_and_its_errors_come_back() -> None:
    before = set(socket.if_nameindex())
    assert in_own_namespace(socket.if_nameindex) == [(1, "lo")]
    assert set(socket.if_nameindex()) >= {(1, "lo")} & before

    def fail() -> None:
        raise OSError(errno.ENODEV, "nothing here")

    with pytest.raises(OSError, match="nothing here"):
        in_own_namespace(fail)


@needs_root
def test_a_trial_that_hangs_is_given_up() -> None:
    release = threading.Event()
    try:
        with pytest.raises(OSError, match=r"no end within 0\.05 s"):
            in_own_namespace(lambda: release.wait(30), timeout_s=0.05)
    finally:
        release.set()


@pytest.mark.parametrize(
    ("release", "number"),
    [("6.1.0-37-amd64", (6, 1)), ("10.0", (10, 0)), ("6.18.44-fc", (6, 18)), ("unheard-of", None), ("", None)],
)
def test_kernels_are_compared_by_number(release: str, number: tuple[int, int] | None) -> None:
    assert release_number(release) == number
