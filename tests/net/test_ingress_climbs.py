"""The capture's ladder on a real interface: what keeps it from the first rung may pass, and nothing on it tells."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sprint import ingress
from sprint.config import load as load_config
from sprint.ingress import FIRST_CLIMB_NS, Ingress
from sprint.tiers import NS_PER_S
from tests.net.netns import Namespace, veth_pair
from tests.unit.paper_kernel import PaperKernel

if TYPE_CHECKING:
    import pytest

    from xdp.loader import Loaded


def test_native_mode_that_the_other_end_of_the_link_had_ruled_out_is_taken_up_once_it_can_be(
    loaded: Loaded, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingress, "load", lambda *_arguments, **_options: loaded)
    monkeypatch.setattr(loaded, "close", lambda: None)  # it serves other tests
    environ = {"TIER": "enterprise", "ENABLE_KERNEL_BYPASS": "true", "INTERFACE": "nic"}
    with Namespace() as near, Namespace() as far, near.entered():
        _, wire = veth_pair(near, far, ("nic", "wire"))
        far.set_link("wire", mtu=9000)  # a veth's program must have room for what its peer may send
        holding = Ingress(load_config(environ), PaperKernel())
        try:
            holding.tend(0)
            said = holding.said()
            assert (said["active"], said["mode"]) == (True, "generic")
            assert "nic: native: " in said["reason"]
            before = holding.handover_facts()
            assert not holding.tend(FIRST_CLIMB_NS)
            assert holding.said()["mode"] == "generic"
            wire.namespace.set_link("wire", mtu=1500)
            assert not holding.tend(3 * FIRST_CLIMB_NS - NS_PER_S)
            assert holding.said()["mode"] == "generic"
            assert not holding.tend(3 * FIRST_CLIMB_NS)
            said = holding.said()
            assert (said["active"], said["mode"], said["reason"]) == (True, "native", None)
            assert holding.handover_facts() == before  # the relay's capture is the same one
        finally:
            holding.close()
