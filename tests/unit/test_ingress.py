"""When what is tried on which interface, and what is said of it, with interfaces and a kernel made of paper."""

from __future__ import annotations

import json
from itertools import pairwise
from typing import TYPE_CHECKING, Any, cast

import pytest

from sprint import ingress
from sprint.config import load as load_config
from sprint.ingress import LAST_PAUSE_NS, MAX_REASONS, Ingress
from sprint.settings import MAX_INTERFACES
from sprint.status import BYPASS_SIZE, StatusBlock
from sprint.tiers import NS_PER_S
from tests.unit.paper_kernel import COUNTED, PaperKernel
from xdp.interfaces import LinkChange, LinkState
from xdp.netdev import XdpFeature

if TYPE_CHECKING:
    from collections.abc import Sequence


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> PaperKernel:
    made = PaperKernel()
    monkeypatch.setattr(ingress, "interface", made.interface)
    monkeypatch.setattr(ingress, "load", made.load)
    monkeypatch.setattr(ingress, "Outlet", made.make_outlet)
    monkeypatch.setattr(ingress, "climb", made.climb)
    monkeypatch.setattr(ingress, "xdp_features", lambda _index: None)
    return made


def ingress_on(kernel: PaperKernel, *names: str) -> Ingress:
    environ = {"TIER": "enterprise", "ENABLE_KERNEL_BYPASS": "true", "INTERFACE": ",".join(names)}
    return Ingress(load_config(environ), kernel)


def news(holding: Ingress, *changes: LinkChange, now_ns: int = 0) -> bool:
    holding.hear(changes, now_ns)
    return holding.tend(now_ns)


def attached(holding: Ingress) -> list[tuple[str, str | None, bool, str | None]]:
    rows: Sequence[dict[str, Any]] = holding.said()["attached"]
    return [(row["interface"], row["mode"], row["active"], row["reason"]) for row in rows]


def test_all_are_attached_at_once_and_handed_over(kernel: PaperKernel) -> None:
    kernel.add("alpha", 7)
    kernel.add("beta", 8)
    holding = ingress_on(kernel, "alpha", "beta")
    assert holding.handover() is None
    assert holding.tend(0)
    assert not holding.tend(1)
    said = holding.said()
    assert (said["active"], said["mode"], said["interfaces"]) == (True, "native", ["alpha", "beta"])
    assert said["reason"] is None
    assert said["ingest"] == {name: count for name, count in COUNTED.items() if name != "surplus"}
    facts, descriptors = holding.handover() or ({}, [])
    assert json.loads(json.dumps(facts))["baseline"] == {"packets": 1}
    assert descriptors == [3, 4, 5]
    assert kernel.outlets == 1


def test_what_either_way_out_had_no_room_for_is_dropped(kernel: PaperKernel, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel.add("alpha", 7)
    holding = ingress_on(kernel, "alpha")
    holding.tend(0)
    monkeypatch.setattr(kernel, "counters", lambda: {**COUNTED, "dropped": 3, "socketDropped": 4, "mirrorLost": 100})
    assert holding.said()["ingest"]["dropped"] == 7


def test_packets_that_the_mirror_misses_for_want_of_metadata_are_told(
    kernel: PaperKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The self-test's own frame has room for it, whatever the driver."""
    kernel.add("alpha", 7)
    holding = ingress_on(kernel, "alpha")
    holding.tend(0)
    assert holding.said()["reason"] is None
    monkeypatch.setattr(kernel, "counters", lambda: {**COUNTED, "unmarked": 5})
    said = holding.said()
    assert (said["active"], said["mode"]) == (True, "native")
    assert said["reason"] == "5 packets not mirrored: their driver leaves no room for XDP metadata"


def test_the_mode_is_the_worst_of_those_that_are_active_and_the_reason_names_them(kernel: PaperKernel) -> None:
    kernel.add("alpha", 7)
    kernel.add("beta", 8)
    kernel.rungs["beta"] = ("tc", "native: Operation not supported; generic: Device or resource busy")
    kernel.refusals["gamma"] = "interface gamma has XDP program other already: it is not replaced"
    kernel.add("gamma", 9)
    holding = ingress_on(kernel, "alpha", "beta", "gamma")
    holding.tend(0)
    said = holding.said()
    assert (said["active"], said["mode"], said["interfaces"]) == (True, "tc", ["alpha", "beta"])
    lower = "interface beta: native: Operation not supported; generic: Device or resource busy"
    assert said["reason"] == f"{lower}; {kernel.refusals['gamma']}"
    assert attached(holding) == [
        ("alpha", "native", True, None),
        ("beta", "tc", True, lower),
        ("gamma", None, False, kernel.refusals["gamma"]),
    ]


def test_one_that_fails_is_tried_again_at_growing_pauses_told_once_and_keeps_no_other_waiting(
    kernel: PaperKernel,
) -> None:
    kernel.add("alpha", 7)
    kernel.add("beta", 8)
    kernel.refusals["alpha"] = "native: no; generic: no; tc: no"
    holding = ingress_on(kernel, "alpha", "beta")
    tried = []
    for tick in range(4 * 250):
        before = kernel.climbs.count("alpha")
        holding.tend(tick * NS_PER_S // 4)
        if kernel.climbs.count("alpha") > before:
            tried.append(tick / 4)
    assert [later - earlier for earlier, later in pairwise(tried)] == [1, 2, 4, 8, 16, 32, 60, 60, 60]
    assert kernel.climbs.count("beta") == 1
    assert [values["reason"] for event, values in kernel.log if "inactive" in event] == [kernel.refusals["alpha"]]
    assert LAST_PAUSE_NS == 60 * NS_PER_S


def test_a_change_ends_the_pause_but_not_more_than_once_a_second(kernel: PaperKernel) -> None:
    kernel.add("alpha", 7)
    kernel.refusals["alpha"] = "no"
    holding = ingress_on(kernel, "alpha")
    for now_s in (0, 1, 3, 7):
        holding.tend(now_s * NS_PER_S)
    assert len(kernel.climbs) == 4
    news(holding, LinkChange(LinkState.UP, 7, "alpha"), now_ns=8 * NS_PER_S)
    assert len(kernel.climbs) == 4  # news, and nothing new
    kernel.add("alpha", 7, mtu=9000)
    news(holding, LinkChange(LinkState.UP, 7, "alpha"), now_ns=9 * NS_PER_S)
    assert len(kernel.climbs) == 5
    kernel.add("alpha", 7, mtu=1500)  # as a driver may that is reset by what was tried
    news(holding, LinkChange(LinkState.UP, 7, "alpha"), now_ns=9 * NS_PER_S + 1)
    assert len(kernel.climbs) == 5
    holding.tend(10 * NS_PER_S)
    assert len(kernel.climbs) == 6


def test_what_cannot_be_loaded_is_the_reason_for_all_and_tried_again_at_growing_pauses(kernel: PaperKernel) -> None:
    kernel.add("alpha", 7)
    kernel.load_error = "bcc is not importable"
    holding = ingress_on(kernel, "alpha", "beta")
    for now_s in range(8):
        holding.tend(now_s * NS_PER_S)
        assert holding.said()["reason"] == "bcc is not importable"
        assert attached(holding)[0] == ("alpha", None, False, "bcc is not importable")
    assert [values for _, values in kernel.log if values["reason"] == "bcc is not importable"] == [
        {"reason": "bcc is not importable"}
    ]
    kernel.load_error = None
    holding.tend(14 * NS_PER_S)
    assert not holding.said()["active"]
    holding.tend(15 * NS_PER_S)
    assert holding.said()["active"]
    assert holding.said()["reason"] == "interface beta: No such device"


def test_nothing_is_loaded_before_there_is_an_interface_that_is_up(kernel: PaperKernel) -> None:
    kernel.load_error = "not to be asked for"
    kernel.add("beta", 8, up=False, carrier=False)
    holding = ingress_on(kernel, "alpha", "beta")
    holding.tend(0)
    assert holding.said()["reason"] == "interface alpha: No such device; interface beta is down"
    assert not holding.said()["active"]


def test_one_that_goes_down_stays_attached_is_told_and_proven_again_when_it_is_back(kernel: PaperKernel) -> None:
    kernel.add("alpha", 7)
    kernel.add("beta", 8)
    holding = ingress_on(kernel, "alpha", "beta")
    holding.tend(0)
    kernel.add("alpha", 7, up=False, carrier=False)
    assert not news(holding, LinkChange(LinkState.DOWN, 7, "alpha"))
    assert attached(holding)[0] == ("alpha", "native", False, "interface alpha is down")
    assert holding.said()["interfaces"] == ["beta"]
    kernel.add("alpha", 7, carrier=False)
    news(holding, LinkChange(LinkState.DOWN, 7, "alpha"))
    assert attached(holding)[0] == ("alpha", "native", False, "interface alpha has no carrier")
    kernel.add("alpha", 7)
    assert not news(holding, LinkChange(LinkState.UP, 7, "alpha"))
    assert attached(holding)[0] == ("alpha", "native", True, None)
    assert [hook.proofs for hook in kernel.hooks] == [1, 0]
    assert kernel.climbs == ["alpha", "beta"]


def test_one_that_came_back_and_works_no_more_is_attached_anew(kernel: PaperKernel) -> None:
    kernel.add("alpha", 7)
    holding = ingress_on(kernel, "alpha")
    holding.tend(0)
    kernel.hooks[0].works = False
    kernel.add("alpha", 7, up=False)
    news(holding, LinkChange(LinkState.DOWN, 7, "alpha"))
    kernel.add("alpha", 7)
    news(holding, LinkChange(LinkState.UP, 7, "alpha"))
    assert [hook.closed for hook in kernel.hooks] == [True, False]
    assert holding.said()["active"]


@pytest.mark.parametrize("index", [7, 12])
def test_one_that_is_deleted_and_made_again_is_attached_at_once_and_the_other_is_left_alone(
    kernel: PaperKernel, index: int
) -> None:
    kernel.add("alpha", 7)
    kernel.add("beta", 8)
    holding = ingress_on(kernel, "alpha", "beta")
    holding.tend(0)
    del kernel.nics["alpha"]
    news(holding, LinkChange(LinkState.GONE, 7, "alpha"))
    assert attached(holding)[0] == ("alpha", None, False, "interface alpha: No such device")
    kernel.add("alpha", index)
    assert not news(holding, LinkChange(LinkState.UP, index, "alpha"))
    assert kernel.climbs == ["alpha", "beta", "alpha"]
    assert [hook.closed for hook in kernel.hooks] == [True, False, False]
    assert holding.said()["interfaces"] == ["alpha", "beta"]


def test_one_that_is_replaced_between_two_looks_is_attached_anew(kernel: PaperKernel) -> None:
    kernel.add("alpha", 7)
    holding = ingress_on(kernel, "alpha")
    holding.tend(0)
    news(holding, LinkChange(LinkState.GONE, 7, "alpha"), LinkChange(LinkState.UP, 7, "alpha"))
    assert [hook.closed for hook in kernel.hooks] == [True, False]


def test_one_that_is_renamed_is_let_go_until_there_is_one_of_that_name(kernel: PaperKernel) -> None:
    kernel.add("alpha", 7)
    holding = ingress_on(kernel, "alpha")
    holding.tend(0)
    del kernel.nics["alpha"]
    kernel.add("gamma", 7)
    news(holding, LinkChange(LinkState.UP, 7, "gamma"))
    assert kernel.hooks[0].closed
    assert attached(holding) == [("alpha", None, False, "interface alpha: No such device")]
    kernel.add("alpha", 7)
    news(holding, LinkChange(LinkState.UP, 7, "alpha"))
    assert holding.said()["active"]


def test_after_lost_news_everything_is_looked_at(kernel: PaperKernel) -> None:
    kernel.add("alpha", 7)
    holding = ingress_on(kernel, "alpha")
    holding.tend(0)
    kernel.add("alpha", 12)
    news(holding, LinkChange(LinkState.MISSED))
    assert [hook.index for hook in kernel.hooks] == [7, 12]


def test_a_program_that_was_forced_off_is_put_back(kernel: PaperKernel) -> None:
    kernel.add("alpha", 7)
    holding = ingress_on(kernel, "alpha")
    holding.tend(0)
    kernel.hooks[0].there = False
    holding.tend(1)
    assert [hook.closed for hook in kernel.hooks] == [True, False]
    assert holding.said()["active"]


def test_on_a_lower_rung_another_mtu_is_a_reason_to_climb_again(kernel: PaperKernel) -> None:
    kernel.rungs["alpha"] = ("generic", "native: Numerical result out of range")
    kernel.add("alpha", 7, mtu=9000)
    kernel.add("beta", 8, mtu=9000)
    holding = ingress_on(kernel, "alpha", "beta")
    holding.tend(0)
    kernel.rungs.clear()
    for name, index in (("alpha", 7), ("beta", 8)):
        kernel.add(name, index)
        news(holding, LinkChange(LinkState.UP, index, name))
    assert kernel.climbs == ["alpha", "beta", "alpha"]
    assert holding.said()["mode"] == "native"


def climbs_of(kernel: PaperKernel, holding: Ingress, from_s: int, to_s: int) -> list[int]:
    """At which seconds it was tried again."""
    tried = []
    for now_s in range(from_s, to_s):
        before = len(kernel.climbs)
        assert not holding.tend(now_s * NS_PER_S)  # nothing is handed over anew
        tried += [now_s] * (len(kernel.climbs) - before)
    return tried


def test_from_a_lower_rung_it_climbs_again_at_growing_pauses_and_no_more_once_it_is_up(kernel: PaperKernel) -> None:
    kernel.rungs["alpha"] = ("generic", "native: No space left on device")
    kernel.add("alpha", 7)
    kernel.add("beta", 8)
    holding = ingress_on(kernel, "alpha", "beta")
    holding.tend(0)
    tried = [0, *climbs_of(kernel, holding, 1, 3_000)]
    assert [later - earlier for earlier, later in pairwise(tried)] == [30, 60, 120, 240, 480, 600, 600, 600]
    assert holding.said()["mode"] == "generic"
    assert [hook.closed for hook in kernel.hooks if hook.interface == "alpha"] == [True] * 8 + [False]
    assert kernel.climbs.count("beta") == 1
    assert [values["interface"] for event, values in kernel.log if "active" in event] == ["alpha", "beta"]  # told once
    kernel.rungs.clear()
    assert climbs_of(kernel, holding, 3_000, 6_000) == [3_330]
    assert holding.said()["mode"] == "native"


def test_a_change_makes_it_climb_at_once_but_not_one_that_its_own_try_may_have_caused(kernel: PaperKernel) -> None:
    kernel.rungs["alpha"] = ("generic", "native: the self-test packet did not come out")
    kernel.add("alpha", 7)
    holding = ingress_on(kernel, "alpha")
    holding.tend(0)
    assert climbs_of(kernel, holding, 1, 40) == [30]
    for now_s, carrier in ((32, False), (35, True)):  # as after a driver's reset
        kernel.add("alpha", 7, carrier=carrier)
        news(holding, LinkChange(LinkState.UP, 7, "alpha"), now_ns=now_s * NS_PER_S)
    assert climbs_of(kernel, holding, 36, 80) == []
    kernel.add("alpha", 7, carrier=False)
    news(holding, LinkChange(LinkState.UP, 7, "alpha"), now_ns=80 * NS_PER_S)
    assert climbs_of(kernel, holding, 80, 82) == []  # not without a carrier
    kernel.add("alpha", 7)
    news(holding, LinkChange(LinkState.UP, 7, "alpha"), now_ns=82 * NS_PER_S)
    assert len(kernel.climbs) == 3
    assert climbs_of(kernel, holding, 83, 180) == [112, 172]


def test_where_the_driver_says_that_it_has_no_native_mode_nothing_is_taken_off_to_try_it(
    kernel: PaperKernel, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel.rungs["alpha"] = ("generic", "native: Operation not supported")
    kernel.add("alpha", 7)
    holding = ingress_on(kernel, "alpha")
    holding.tend(0)
    monkeypatch.setattr(ingress, "xdp_features", lambda _index: XdpFeature.REDIRECT)
    assert climbs_of(kernel, holding, 1, 1_000) == []
    monkeypatch.setattr(ingress, "xdp_features", lambda _index: XdpFeature.BASIC)  # another driver, or its new firmware
    assert climbs_of(kernel, holding, 1_000, 3_000)[:1] == [1_530]


@pytest.mark.parametrize("noticed", ["news", "look"])
def test_without_the_mirror_all_is_made_anew_and_handed_over_again(kernel: PaperKernel, noticed: str) -> None:
    kernel.add("alpha", 7)
    holding = ingress_on(kernel, "alpha")
    holding.tend(0)
    first = holding.handover_facts()
    kernel.mirror_there = False
    if noticed == "news":
        holding.hear([LinkChange(LinkState.GONE, 90, kernel.mirror.near)], 1)
    assert holding.tend(1)
    assert holding.handover_facts() != first
    assert (holding.handover_facts() or {})["mirror_index"] == 2
    assert kernel.hooks[0].closed
    assert holding.said()["active"]


def test_a_mirror_that_cannot_be_made_anew_is_told_to_whoever_has_it(kernel: PaperKernel) -> None:
    kernel.add("alpha", 7)
    holding = ingress_on(kernel, "alpha")
    holding.tend(0)
    kernel.mirror_there, kernel.outlet_error = False, "mirror link: Operation not permitted"
    holding.hear([LinkChange(LinkState.GONE, 90, kernel.mirror.near)], 1)
    assert holding.tend(1)
    assert holding.handover() is None
    assert holding.said()["reason"] == kernel.outlet_error
    kernel.outlet_error = None
    assert not holding.tend(2)
    assert holding.tend(2 * NS_PER_S)
    assert holding.said()["active"]


def test_whatever_is_named_in_reasons_all_of_it_fits_into_the_status(kernel: PaperKernel) -> None:
    names = [f"quite-long-nic{number}" for number in range(MAX_INTERFACES)]
    for index, name in enumerate(names):
        kernel.add(name, index)
        kernel.refusals[name] = 300 * '"\\\n\N{SNOWMAN}'
    holding = ingress_on(kernel, *names)
    for tick in range(MAX_INTERFACES):
        holding.tend(tick)
    said = holding.said()
    assert len(said["reason"]) == MAX_REASONS
    status = StatusBlock.create(1, {})
    status.bypass = {**said, "requested": True, "egress": cast("Any", {"subscribers": 2**64, "sent": 2**64})}
    assert status.bypass is not None
    assert len(json.dumps(said)) < BYPASS_SIZE * 3 // 4
