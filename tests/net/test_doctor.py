"""The doctor on interfaces that the test made: its forecasts beside what attaching really gives, and what it leaves."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import ExitStack, suppress
from typing import TYPE_CHECKING, Any

import pytest
from pyroute2 import IPRoute  # type: ignore[import-untyped]  # it ships no types

from sprint import config
from sprint.demo.stage import Plan, Stage
from sprint.doctor import Finding, State, examine
from tests.net.netns import Namespace, veth_pair
from tests.net.tiny_bpf import EXIT, XDP, XDP_PASS, attach_xdp, load_program, mov
from tests.real.scripted_peer import ScriptedPeer
from xdp.interfaces import interfaces
from xdp.links import Owner, create_mirror, leftovers
from xdp.prospects import Prospect, prospects

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="needs root: makes network namespaces and links")
GENERIC = 2
ENTERPRISE = {"TIER": "enterprise", "ENABLE_KERNEL_BYPASS": "true", "NETWORK": "regtest", "API_BIND": "127.0.0.1:1"}


@pytest.fixture
def space() -> Iterator[Namespace]:
    """A namespace that the test is in."""
    with Namespace() as made, made.entered():
        yield made


def forecast(name: str) -> Prospect:
    (found,) = [each for each in prospects() if each.interface.name == name]
    return found


def really(index: int) -> str:
    """The best mode that a program is really taken in."""
    with load_program(XDP, mov(0, XDP_PASS), EXIT) as program:
        for mode, flag in (("native", 4), ("generic", GENERIC)):
            with suppress(OSError), attach_xdp(program, index, flag):
                return mode
    return "none"


def told(folder: Path, **settings: str) -> dict[str, Finding]:
    """The doctor's findings by name, no node being there, for the interface `nic`."""
    environ = {"BITCOIN_NODE": "127.0.0.1:1", **ENTERPRISE, "INTERFACE": "nic", **settings}
    return {each.name: each for each in examine(config.load(environ, folder), quick=True)}


@pytest.mark.parametrize(
    ("mtu", "peer_mtu", "queues", "peer_queues", "mode"),
    [
        (1500, 1500, 1, 1, "native"),
        (1500, 3506, 1, 1, "native"),
        (1500, 3507, 1, 1, "generic"),
        (9000, 1500, 1, 1, "native"),
        (9000, 9000, 1, 1, "generic"),
        (1500, 1500, 1, 2, "generic"),
        (1500, 1500, 2, 1, "native"),
        (1500, 1500, 2, 2, "native"),
    ],
)
def test_a_forecast_for_veth_is_what_attaching_gives(
    space: Namespace, mtu: int, peer_mtu: int, queues: int, peer_queues: int, mode: str
) -> None:
    def ends(count: int) -> dict[str, int]:
        return {"num_rx_queues": count, "num_tx_queues": count}

    with IPRoute(groups=0) as route:
        peer = {"ifname": "wire", "mtu": peer_mtu, **ends(peer_queues)}
        route.link("add", ifname="nic", kind="veth", mtu=mtu, peer=peer, **ends(queues))
    index = space.index("nic")
    prospect = forecast("nic")
    assert (prospect.mode, really(index)) == (mode, mode)
    assert bool(prospect.obstacles) == (mode != "native")


@pytest.mark.parametrize("kind", ["dummy", "bridge", "ifb", "vlan"])
def test_a_forecast_for_what_has_no_native_xdp_is_what_attaching_gives(space: Namespace, kind: str) -> None:
    veth_pair(space, space, ("nic", "wire"))
    special = {"link": space.index("nic"), "vlan_id": 7} if kind == "vlan" else {}
    with IPRoute(groups=0) as route:
        try:
            route.link("add", ifname="other", kind=kind, **special)
        except Exception as error:  # pyroute2 has several; the kernel may be built without this kind
            pytest.skip(f"no {kind} can be made here: {error}")
    assert (forecast("other").mode, really(space.index("other"))) == ("generic", "generic")


def test_a_veth_into_another_namespace_is_forecast_with_a_doubt(space: Namespace) -> None:
    with Namespace() as far:
        nic, _ = veth_pair(space, far, ("nic", "wire"))
        prospect = forecast("nic")
        assert (prospect.mode, really(nic.index)) == ("native", "native")
        assert "another network namespace" in prospect.doubts[0].what


def test_a_look_attaches_nothing_and_changes_nothing(space: Namespace, tmp_path: Path) -> None:
    veth_pair(space, space, ("nic", "wire"))
    before = interfaces()
    programs = {name for name in space.names() if name not in {"nic", "wire", "lo"}}
    found = told(tmp_path)
    assert interfaces() == before
    assert {name for name in space.names() if name not in {"nic", "wire", "lo"}} == programs
    assert found["XDP mode nic"].state is State.OK
    assert "would get native" in found["XDP mode nic"].detail
    assert found["LRO nic"].state is State.OK
    assert not [each for each in found.values() if "could not be examined" in each.detail]


def test_an_mtu_too_large_is_told_with_the_command_that_mends_it(space: Namespace, tmp_path: Path) -> None:
    nic, _ = veth_pair(space, space, ("nic", "wire"), mtu=9000)
    found = told(tmp_path)
    for name in ("MTU nic", "XDP mode nic"):
        assert (found[name].state, found[name].remedy) == (State.DEGRADED, "ip link set dev wire mtu 3506")
    space.set_link("wire", mtu=3506)
    assert (forecast("nic").mode, really(nic.index)) == ("native", "native")


@pytest.mark.parametrize(("flag", "mode"), [(4, "native"), (GENERIC, "generic")])
def test_somebody_elses_program_is_named_and_stays(space: Namespace, tmp_path: Path, flag: int, mode: str) -> None:
    nic, _ = veth_pair(space, space, ("nic", "wire"))
    with load_program(XDP, mov(0, XDP_PASS), EXIT) as program, attach_xdp(program, nic.index, flag):
        finding = told(tmp_path)["XDP mode nic"]
        assert (
            finding.state,
            f"XDP program tiny (id {forecast('nic').interface.xdp[0].program_id}, {mode})" in finding.detail,
        ) == (State.MISSING, True)
        assert forecast("nic").interface.xdp


def test_a_dead_runs_link_is_told_and_clean_removes_it(space: Namespace, tmp_path: Path) -> None:
    veth_pair(space, space, ("nic", "wire"))
    child = subprocess.Popen(["sleep", "60"])
    dead = Owner(child.pid, 0, Owner.this_process().pid_namespace)
    child.kill()
    child.wait()
    link = create_mirror(owner=dead)
    found = told(tmp_path)
    assert "sprint doctor --clean" in found["leftovers"].remedy
    assert not {f"interface {link.near}", f"interface {link.far}"} & set(found)
    done = sprint(tmp_path, "doctor", "--clean")
    assert (done.returncode, done.stdout.startswith("removed: ")) == (0, True)
    assert leftovers() == []
    assert told(tmp_path)["leftovers"].state is State.OK


def sprint(folder: Path, *arguments: str, **settings: str) -> subprocess.CompletedProcess[str]:
    environ = {**os.environ, "BITCOIN_NODE": "127.0.0.1:1", **ENTERPRISE, **settings}
    command = [sys.executable, "-m", "sprint", *arguments]
    return subprocess.run(command, env=environ, cwd=folder, capture_output=True, text=True, timeout=110, check=False)


def report(done: subprocess.CompletedProcess[str]) -> dict[str, dict[str, Any]]:
    assert done.stderr == ""
    return {f"{each['check']} {each['subject']}".rstrip(): each for each in json.loads(done.stdout)}


def test_a_host_that_can_do_it_all_is_told_so_and_exits_with_0(
    space: Namespace, tmp_path: Path, bpf_loadable: None
) -> None:
    """With the programs really compiled and loaded, and a node that shakes hands."""
    veth_pair(space, space, ("nic", "wire"))
    with ScriptedPeer() as peer:
        peer.open()
        address = peer.address
        done = sprint(tmp_path, "doctor", "--json", BITCOIN_NODE=address, INTERFACE="nic")
    found = report(done)
    assert "accepted by the kernel: classify" in found["kernel bypass programs"]["detail"]
    assert "v1 handshake" in found[f"node {address}"]["detail"]
    assert found["tier enterprise"]["state"] in {"ok", "degraded"}, found["tier enterprise"]["detail"]
    assert done.returncode == 0


def test_a_user_who_is_not_root_is_told_what_that_leaves_and_exits_with_1(tmp_path: Path) -> None:
    """The same command after root is given up, in a namespace without a way out."""
    script = (
        "import os, sys\n"
        "os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)\n"
        "sys.argv = ['sprint', 'doctor', '--json', '--quick']\n"
        "from sprint.cli import main\n"
        "main()\n"
    )
    environ = {**os.environ, **ENTERPRISE, "BITCOIN_NODE": "127.0.0.1:1", "HOME": "/", "PYTHONDONTWRITEBYTECODE": "1"}
    with Namespace() as space, space.entered():
        done = subprocess.run(
            [sys.executable, "-c", script],
            env=environ,
            cwd="/",
            capture_output=True,
            text=True,
            timeout=110,
            check=False,
        )
    found = report(done)
    assert done.returncode == 1
    assert found["kernel feature XDP programs"]["state"] == "unknown"
    assert found["capability CAP_NET_ADMIN"]["state"] == "missing"
    assert found["kernel bypass programs"]["state"] == "missing"
    assert "root" in found["kernel bypass programs"]["detail"]
    assert "nothing to capture on" in found["interface"]["detail"]
    assert not [each for each in found.values() if "could not be examined" in each["detail"]]


def test_a_machine_without_bcc_is_told_the_package(space: Namespace, tmp_path: Path) -> None:
    """The interpreter alone, without the system's packages, as in a virtual environment made without them."""
    veth_pair(space, space, ("nic", "wire"))
    hide = (
        "import importlib.util, sys\n"
        "find = importlib.util.find_spec\n"
        "importlib.util.find_spec = lambda name, *rest: None if name == 'bcc' else find(name, *rest)\n"
        "sys.argv = ['sprint', 'doctor', '--json']\n"
        "from sprint.cli import main\n"
        "main()\n"
    )
    environ = {**os.environ, **ENTERPRISE, "BITCOIN_NODE": "127.0.0.1:1", "INTERFACE": "nic"}
    done = subprocess.run(
        [sys.executable, "-c", hide],
        env=environ,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=110,
        check=False,
    )
    found = report(done)
    assert done.returncode == 1
    assert (found["bcc"]["state"], "python3-bpfcc" in found["bcc"]["remedy"]) == ("missing", True)
    assert found["kernel feature XDP programs"]["state"] == "ok"  # that needs no bcc
    assert "bcc is not importable" in found["kernel bypass programs"]["detail"]


def test_a_running_sprint_is_asked_and_its_program_is_not_taken_for_somebody_elses(
    bpf_loadable: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The demo's whole stage, on a wire of its own."""
    monkeypatch.setenv("OPTIMIZE_SYSTEM", "false")
    monkeypatch.delenv("TIER", raising=False)
    with ExitStack() as stack:
        stage = Stage(Plan(once=True, as_json=True, blocks=1, subscribers=1, interval_s=0.1), stack)
        bypass = stage.relay.ask("turbo-status")["kernelBypass"]
        assert bypass["active"], bypass["reason"]
        settings = {"API_BIND": stage.api.removeprefix("http://"), "INTERFACE": ",".join(bypass["interfaces"])}
        found = report(sprint(tmp_path, "doctor", "--json", "--quick", **settings))
    for name in bypass["interfaces"]:
        mode = found[f"XDP mode {name}"]
        assert (mode["state"], "Sprint runs on it now" in mode["detail"]) == ("ok", True)
    assert "the running capture saw" in next(each["detail"] for name, each in found.items() if name.startswith("flows"))
