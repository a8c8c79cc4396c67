"""An owner that is killed anywhere on its way up, or down: what is left of it is known as its own, and removed."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from typing import TYPE_CHECKING

import pytest

from tests.net.netns import Namespace, Veth, veth_pair
from tests.net.test_capture import PATIENCE_S, drain
from xdp import kernel, links
from xdp.attachment import attach
from xdp.capture import Capture
from xdp.interfaces import interface

if TYPE_CHECKING:
    from collections.abc import Iterator
    from types import FrameType

    from xdp.loader import Loaded

KILLED_AT = 6
"""Places on the way, evenly spread."""


@pytest.fixture
def nic(loaded: Loaded) -> Iterator[Veth]:
    drain(loaded)
    with Namespace() as near, Namespace() as far, near.entered():
        yield veth_pair(near, far, ("nic", "wire"))[0]


def start_and_stop(loaded: Loaded) -> None:
    with attach(loaded, "nic") as attachment, Capture(attachment.handover()) as capture:
        capture.poll()


def steps(loaded: Loaded, killed_at: int) -> int:
    """How many steps of the package's own code that takes, in a child that is killed at that one; 0: never."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        taken = 0

        def step(frame: FrameType, _event: str, _argument: object) -> None:
            nonlocal taken
            if frame.f_globals.get("__name__", "").startswith("xdp."):
                taken += 1
                if taken == killed_at:
                    os.kill(os.getpid(), signal.SIGKILL)

        try:
            sys.setprofile(step)
            start_and_stop(loaded)
            sys.setprofile(None)
            os.write(writer, str(taken).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader) as told:
        said = told.read()
    os.waitpid(child, 0)
    return int(said or 0)


def names() -> set[str]:
    return {name for _, name in socket.if_nameindex()}


@pytest.mark.parametrize("filters", [False, True], ids=["as here", "without TCX"])
def test_whenever_the_owner_is_killed_no_program_stays_and_the_rest_is_cleaned(
    loaded: Loaded, nic: Veth, monkeypatch: pytest.MonkeyPatch, *, filters: bool
) -> None:
    if filters:
        monkeypatch.setattr(kernel, "ATTACH_TCX_INGRESS", 0x7FFF)  # as a kernel before 6.6: EINVAL
    start_and_stop(loaded)
    whole = steps(loaded, 0)
    assert whole > KILLED_AT
    left = []
    for at in range(1, whole, whole // KILLED_AT):
        assert steps(loaded, at) == 0
        give_up = time.monotonic() + PATIENCE_S
        while interface("nic").xdp:  # the kernel takes it off a moment after the process
            assert time.monotonic() < give_up
        left.append(len(links.ours()))
        assert len(links.clean()) == left[-1], at
        assert names() == {"lo", "nic"}, at
        assert links.ours() == []
    assert max(left) > 0
    start_and_stop(loaded)
